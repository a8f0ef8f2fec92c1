"""Every speed figure of the project: python bench.py NAME [--key=value ...]

attention: the training kernels against every peer that is there, forward and backward. GPU.
train:     a training step of GPT-2 124M with these kernels and with torch's, for each attention type. GPU.
decode:    attention over pages, one token a sequence, as a share of the bandwidth of a device copy. GPU.
engine:    whole runs of the engine: GPT-2 124M, and on a GPU Qwen3-0.6B's shape. Without a GPU, beside transformers.
variants:  cache bytes, largest batch and decoding speed of mha, gqa, mqa and swa. Any device.
claims:    what introductions to these methods say, measured. Any device; only a GPU's figures mean something.
tables:    nothing is measured: the files in results/ become the tables of the README.

Each but tables writes a file of this name below results/, where the name may say the device, and most a plot beside it. "GPU"
needs an NVIDIA GPU.

What is timed is validated first; claims mostly times what the others validate. Times are medians over rounds in
which all contestants take turns, so that a change of the clock meets all of them; but where each of them fills the memory, in
variants and on a GPU in engine, they come one after the other. The last line that they print is JSON.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from config import UserError, parse, pathname, run

PEERS = ("ours", "fa2", "cudnn", "efficient", "flex", "fa3")


@dataclass(frozen=True)
class BenchConfig:
    """What can be chosen about a measurement."""

    out_dir: Annotated[pathname, "where the results go"] = "results"
    peers: Annotated[str, "of attention, train, decode: contestants, with commas, ours among them"] = ",".join(PEERS)
    rounds: Annotated[int, "times that each contestant takes its turn"] = 9
    sweep: Annotated[bool, "in attention and decode: growing lengths and batches, too"] = True

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds takes 1 or more, got {self.rounds}")
        unknown = set(self.peers.split(",")) - set(PEERS)
        if unknown:
            raise ValueError(f"peers takes names of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
        if "ours" not in self.peers.split(","):  # what the others are compared with
            raise ValueError(f"peers takes ours and any others, got {self.peers}")


NEEDS_GPU = {"attention": True, "train": True, "decode": True, "engine": False, "variants": False, "claims": False, "tables": False}


def main(argv):
    words, config = parse(argv, BenchConfig, usage=__doc__)
    if len(words) != 1 or words[0] not in NEEDS_GPU:
        raise UserError(f"bench.py takes one of {', '.join(NEEDS_GPU)}; got {' '.join(words) or 'none'}")
    name = words[0]
    if NEEDS_GPU[name] and not torch.cuda.is_available():
        raise UserError(f"bench.py {name} times GPU kernels and finds no NVIDIA GPU; run it on a machine that has one")
    if name != "tables":
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)  # here, so that a wrong one fails before anything is measured
    # imported here, because each needs packages that the others do without
    if name == "attention":
        from benchmarks.attention import bench_attention as measure
    elif name == "train":
        from benchmarks.training import bench_train as measure
    elif name == "decode":
        from benchmarks.decode import bench_decode as measure
    elif name == "engine":
        from benchmarks.engine import bench_engine as measure
    elif name == "variants":
        from benchmarks.variants import bench_variants as measure
    elif name == "claims":
        from benchmarks.claims import bench_claims as measure
    else:
        from benchmarks.tables import write_tables as measure
    try:
        measure(config)
    except ImportError as error:  # of matplotlib, once the figures are written
        raise UserError(f"{error}; pip install -r requirements.txt") from None


if __name__ == "__main__":
    run(main)
