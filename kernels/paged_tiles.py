"""How the kernels of paged_attention.py cut their work into programs, by GPU and head size."""

from typing import NamedTuple

import torch

from kernels.launch import cdiv, on_hopper


class Tiles(NamedTuple):
    """How a kernel is run."""

    block_m: int  # rows at least; more, if a KV head has more query heads
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 0  # decoding: the keys are split for so many programs on each multiprocessor


# (decode, prefill) by the padded head size. Keys are found through page ids, so two loads follow each other: five stages
# are two tiles under way, seven are three. Decoding at 64 and 128 was tuned on an H100 80GB HBM3 in bf16 with the shapes of
# `python bench.py decode` (NOTES.md); the rest was not.
HOPPER = {
    64: (Tiles(16, 32, 1, 7, 16), Tiles(64, 64, 4, 5)),
    128: (Tiles(16, 64, 2, 5, 16), Tiles(64, 64, 4, 5)),
    256: (Tiles(16, 32, 4, 5, 16), Tiles(64, 32, 4, 5)),
}
MANY_ROWS = Tiles(64, 64, 4, 5, 6)  # decoding on Hopper at 128 with more than 16 query heads a KV head, as in MQA
# The same for the 99 KB of shared memory of every GPU since Ampere. Not tuned.
AMPERE = {
    64: (Tiles(16, 64, 4, 5, 12), Tiles(64, 64, 4, 5)),
    128: (Tiles(16, 32, 4, 5, 12), Tiles(64, 32, 4, 5)),
    256: (Tiles(16, 16, 4, 5, 12), Tiles(64, 16, 4, 3)),
}
FLOAT32 = {
    64: (Tiles(16, 32, 4, 1, 12), Tiles(32, 32, 4, 1)),
    128: (Tiles(16, 32, 4, 1, 12), Tiles(32, 32, 4, 1)),
    256: (Tiles(16, 16, 4, 1, 12), Tiles(16, 16, 4, 1)),
}
MAX_ROWS = {64: 128, 128: 128, 256: 64}  # query heads a KV head, by the padded head size: what fits into registers
SHORTEST, LONGEST = 128, 4096  # keys of a split: fewer do not pay for the combining, more would be a long tail
MANY_SPLITS = 16  # more are made only to give each multiprocessor a program: each costs the program that combines them
COUNTERS = 1 << 14  # with more sequences times KV heads than this nothing needs to be split


def padded(D):
    return 64 if D <= 64 else 128 if D <= 128 else 256


def choose_tiles(q, group):
    """(decode, prefill) for these queries and the GPU that they are on."""
    if q.dtype == torch.float32 or not on_hopper(q):
        return (FLOAT32 if q.dtype == torch.float32 else AMPERE)[padded(q.shape[2])]
    decode_tiles, prefill_tiles = HOPPER[padded(q.shape[2])]
    return MANY_ROWS if group > 16 and padded(q.shape[2]) == 128 else decode_tiles, prefill_tiles


def choose_splits(units, rows, max_keys, tiles, multiprocessors):
    """(splits of a sequence, least number of tiles in one), for `units` pairs of a sequence and a KV head, `rows` query heads
    each. A sequence is cut into equal parts, as many as fill the chip with all units; the shorter it is, the fewer, and
    the more rows have to be written and read again for each part, the fewer. With many rows, parts are as long as those
    of the longest sequence: shorter sequences are cut less, and no program works much longer than another.
    """
    if units > COUNTERS:
        return 1, 1
    wanted = cdiv(multiprocessors * tiles.programs * 16, units * max(16, rows))
    fill = min(wanted, max(MANY_SPLITS, multiprocessors // units), cdiv(max_keys, SHORTEST))
    splits = max(fill, cdiv(max_keys, LONGEST), 1)
    shortest = cdiv(max_keys, splits) if rows > 16 else max(SHORTEST, min(1024 // wanted, 4 * SHORTEST))
    return splits, cdiv(shortest, tiles.block_n)
