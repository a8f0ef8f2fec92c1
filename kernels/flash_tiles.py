"""How the kernels of flash_attention.py cut their work into programs, by GPU and head size."""

from functools import cache
from typing import NamedTuple

import torch

from kernels.launch import next_power_of_2, on_hopper


class Tiles(NamedTuple):
    """How a kernel cuts its work into programs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False  # dkdv alone: its loop loads through tensor descriptors
    maxnreg: int | None = None  # most registers per thread; fewer let more programs share a multiprocessor


# (forward, dq, dkdv) by the padded head size and by whether there is a window; without an entry (size, True) that without a
# window is taken. A window makes loops short, which favours small tiles. Chosen on an H100 80GB HBM3 in bf16 by
# `python bench.py attention`, and by the kernels' times one by one (NOTES.md); 256 is not tuned.
HOPPER = {
    (64, False): (Tiles(64, 64, 4, 3, maxnreg=128), Tiles(64, 64, 4, 2, maxnreg=128), Tiles(64, 64, 4, 3, maxnreg=232)),
    (128, False): (Tiles(64, 64, 4, 3, maxnreg=168), Tiles(128, 64, 8, 3, maxnreg=200), Tiles(64, 64, 4, 2, tma=True)),
    (128, True): (Tiles(64, 64, 4, 3, maxnreg=168), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2, tma=True)),
    (256, False): (Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 8, 2)),
}
# The same by the padded head size alone: what fits into the 99 KB of shared memory of every GPU since Ampere. Not tuned.
AMPERE = {
    64: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2)),
    128: (Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)),
    256: (Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2)),
}
FLOAT32 = {64: (Tiles(32, 32, 4, 1),) * 3, 128: (Tiles(32, 32, 4, 1),) * 3, 256: (Tiles(16, 16, 4, 1),) * 3}
HEADS_TOGETHER = 16  # in the backward pass: their programs alternate, so that the long ones of all start before the short ones
L2_SHARE = 16 << 20  # bytes that heads walked together may read over and over: a third of an H100's L2 cache


def choose_tiles(q, window):
    """(forward, dq, dkdv) for these queries and the GPU that they are on."""
    padded = max(64, next_power_of_2(q.shape[3]))
    if q.dtype == torch.float32:
        return FLOAT32[padded]
    return HOPPER.get((padded, window > 0), HOPPER[padded, False]) if on_hopper(q) else AMPERE[padded]


def heads_in_cache(k, group):
    """How many query heads to walk side by side, so that the keys and values that they read fit into L2_SHARE."""
    return max(1, group * L2_SHARE // (2 * k.shape[1] * k.shape[3] * k.element_size()))


def grid_of(num_tiles, heads, together):
    """A program for each tile of each head, in the order of `tile_of_program`: `together` heads side by side, or the next
    number below that divides them. Divided here once, and not in every program."""
    together = divisor(heads, together)
    return together, num_tiles, heads // together


@cache
def divisor(heads, most):
    third_axis = 65535  # programs along it, at most
    divisors = [n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= third_axis]
    return max((n for n in divisors if n <= most), default=divisors[0])
