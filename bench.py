"""Every speed figure of the project: python bench.py NAME [--key=value ...]

attention: the training kernels against every peer that is there, forward and backward. Needs an NVIDIA GPU.
           Writes results/attention.json and results/attention.png.
train:     a training step of GPT-2 124M with these kernels and with each of torch's, for each attention type. Needs an
           NVIDIA GPU. Writes results/train.json.
engine:    greedy decoding with GPT-2 124M's shape and random weights, against transformers' cached generate where that
           is installed. Runs on any device. Writes results/engine-DEVICE.json.

Everything is validated before it is timed. Times are medians over rounds in which all contestants take turns, so that a
change of the clock meets all of them. The last line printed is JSON.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from config import UserError, parse, run


@dataclass(frozen=True)
class BenchConfig:
    """What can be chosen about a measurement."""

    out_dir: Annotated[str, "where the results go"] = "results"
    peers: Annotated[str, "which contestants, a list with commas"] = "ours,fa2,cudnn,efficient,flex,fa3"
    rounds: Annotated[int, "times that each contestant takes its turn"] = 9
    sweep: Annotated[bool, "time growing lengths, too"] = True


def main(argv):
    words, config = parse(argv, BenchConfig, usage=__doc__)
    names = ("attention", "train", "engine")
    if len(words) != 1 or words[0] not in names:
        raise UserError(f"bench.py takes the name of one measurement, {' or '.join(names)}, got {' '.join(words) or 'none'}")
    name = words[0]
    if name != "engine" and not torch.cuda.is_available():
        raise UserError(f"bench.py {name} times GPU kernels and finds no NVIDIA GPU; run it on a machine that has one")
    # imported here, because each needs packages that the others do without
    if name == "attention":
        from benchmarks.attention import bench_attention as measure
    elif name == "train":
        from benchmarks.training import bench_train as measure
    else:
        from benchmarks.engine import bench_engine as measure
    measure(config)


if __name__ == "__main__":
    run(main)
