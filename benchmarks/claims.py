"""What introductions to these methods say, measured: each claim with its formula, a measured figure and a verdict.

The verdict follows from the measurement by a rule written beside it, so it may differ from one machine to another. On
an NVIDIA GPU with the sizes of real models; elsewhere with tiny ones, which show how it works and little more.
"""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import variants
from benchmarks.claims_serving import contiguous_caches_waste, gqa_decodes_nearly_as_fast, grouping_shrinks_the_cache
from benchmarks.claims_training import (
    attention_costs_n2d_and_nd2,
    flash_never_holds_n_by_n,
    gqa_trains_as_fast,
    information_travels_by_layers,
    windows_make_cost_linear,
)
from benchmarks.measure import write_results
from benchmarks.plots import pyplot
from device import pick_device, pick_dtype

CLAIMS = (
    attention_costs_n2d_and_nd2,
    grouping_shrinks_the_cache,
    gqa_trains_as_fast,
    gqa_decodes_nearly_as_fast,
    windows_make_cost_linear,
    information_travels_by_layers,
    flash_never_holds_n_by_n,
    contiguous_caches_waste,
)


@dataclass(frozen=True)
class Answer:
    claim: str
    formula: str
    measured: str
    because: str  # why it does not hold as stated; empty when it does
    data: dict
    draw: Callable  # draw(axis)

    @property
    def verdict(self):
        return f"no, because {self.because}" if self.because else "holds"


DECODING = variants.SIZES["cuda"]._replace(batches=(1, 16, 64))  # 256 sequences of MHA would take 69 GB


@dataclass(frozen=True)
class Sizes:
    """What is measured, in tokens unless said otherwise."""

    lengths: tuple = (1024, 4096, 16384, 32768)
    widths: tuple = (768, 1536, 3072)  # channels
    window: int = 1024
    windowed_lengths: tuple = (8192, 16384, 32768, 65536)
    batch: int = 32  # sequences of a training step
    layers: int = 12
    heads: int = 12
    max_seq_len: int = 1024
    vocab_size: int = 50304
    decoding: variants.Sizes = DECODING
    requests: int = 256
    at_once: int = 64  # requests


TINY = Sizes(
    lengths=(32, 64, 128),
    widths=(64, 128),
    window=16,
    windowed_lengths=(64, 128, 256),
    batch=1,
    layers=2,
    heads=8,
    max_seq_len=64,
    vocab_size=256,
    decoding=variants.SIZES["cpu"]._replace(tokens=64, batches=(1, 2), steps=4),
    requests=8,
    at_once=4,
)


def bench_claims(config):
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    sizes = Sizes() if device.type == "cuda" else TINY
    answers = []
    for claim in CLAIMS:
        answer = Answer(**claim(sizes, device, dtype, config.rounds))
        answers.append(answer)
        print(
            f"{answer.claim}\n  formula:  {answer.formula}\n  measured: {answer.measured}\n  {answer.verdict}\n",
            flush=True,
        )
    name = "claims" if device.type == "cuda" else f"claims-{device.type}"
    folder = Path(config.out_dir)
    keys = ("claim", "formula", "measured", "verdict", "data")
    rows = [{key: getattr(answer, key) for key in keys} for answer in answers]
    write_results(folder / f"{name}.json", device, dtype, rows=rows)
    draw(answers, folder / f"{name}.png")


def draw(answers, path):
    plt = pyplot()
    figure, axes = plt.subplots(2, math.ceil(len(answers) / 2), figsize=(20, 9), layout="constrained")
    for axis, answer in zip(axes.flat, answers, strict=False):
        answer.draw(axis)
        axis.set_title(f"{textwrap.fill(answer.claim, 60)}\n{answer.verdict.partition(',')[0]}", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    for axis in axes.flat[len(answers) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
