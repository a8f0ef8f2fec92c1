"""Attention over a paged KV cache: writing K and V into pages, decoding one token a sequence, prefilling many.

    s = scale * q k^T    m = max_n log2(e) * s_n    l = sum_n exp2(log2(e) * s_n - m)    o = sum_n exp2(log2(e) * s_n - m) v_n / l

Pages are (num_pages, page_size, H_kv, D); a slot, page * page_size + offset, is the place of one token. Position p of a
sequence lies in the page table's column p // page_size modulo its width: the row of a sequence is a ring, so a windowed
sequence can go on without end. Query tokens are packed, (N, H, D); those of a sequence are its last positions, and see the
keys with 0 <= q_pos - k_pos < window, window = 0 meaning no limit. Query head h reads KV head h // GROUP. Pages that no query
of a tile sees are not read.

Decoding splits the keys of a sequence over programs:

    (m, l, o) of a split -> memory    the last split of a sequence to arrive: o = sum_i exp2(m_i - m) o_i / l, i ascending

so the order of the sum, and with it the result, is the same in every run, whoever comes last. Where a sequence is cut
depends on its own length and on the number of splits, which comes from the shapes and max_seq_len alone.

Lengths, page ids and slots are read by the kernels alone, so all of it can be captured in a CUDA graph. The counters by which
the last split knows itself belong to the device: launches on one device must not overlap, as those of one stream never do.

Limits: D a multiple of 8 from 16 to 256, computed at the next power of two; up to 128 query heads a KV head (64
from D 136 on); fewer than 2^31 slots; float32 runs in IEEE arithmetic without tensor cores, so it is for checking; no gradients.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import kernel_layout, next_power_of_2, require, require_computable, require_numbers, strides
from kernels.paged_tiles import COUNTERS, MAX_ROWS, choose_splits, choose_tiles, padded
from kernels.primitives import (
    LOG2_E,
    LOWEST,
    cut_by_mask,
    dot_in_parts,
    load_rows,
    page_rows,
    softmax_start,
    softmax_step,
    store_rows,
    visible,
)

# These arrays may begin anywhere within larger ones: Triton would compile one more kernel for each alignment.
INTEGERS = ["page_table_ptr", "seq_lens_ptr", "cu_seqlens_ptr"]


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _write_kernel(
    k_ptr,  # (N, H_kv, D), as v
    v_ptr,
    k_pages_ptr,  # (slots, H_kv, D), written, as v_pages
    v_pages_ptr,
    slot_ptr,  # (N,)
    k_strides,  # (token, head), in elements; D is contiguous
    v_strides,
    HEAD_DIM: tl.constexpr,
    ROW: tl.constexpr,  # H_kv * D
):
    """One program moves K and V of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot >= 0:
        offs = tl.arange(0, triton.next_power_of_2(ROW))
        head, offs_d = (offs // HEAD_DIM).to(tl.int64), offs % HEAD_DIM
        k_row = tl.multiple_of(token * k_strides[0], 8) + head * tl.multiple_of(k_strides[1], 8)
        v_row = tl.multiple_of(token * v_strides[0], 8) + head * tl.multiple_of(v_strides[1], 8)
        k = tl.load(k_ptr + k_row + offs_d, mask=offs < ROW)
        v = tl.load(v_ptr + v_row + offs_d, mask=offs < ROW)
        tl.store(k_pages_ptr + slot * ROW + offs, k, mask=offs < ROW)
        tl.store(v_pages_ptr + slot * ROW + offs, v, mask=offs < ROW)


@triton.jit
def _combine(m_ptr, l_ptr, acc_ptr, unit, num_splits, live, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of the splits of a unit, which is a sequence and a KV head: the `live` ones that have keys, in the order of their
    numbers, several at a time so that their loads overlap."""
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    SPLITS: tl.constexpr = max(1, 4096 // (HEADS * BLOCK_D))
    offs_h = tl.arange(0, HEADS)
    offs_d = tl.arange(0, BLOCK_D)
    m_i = tl.full([HEADS], LOWEST, tl.float32)
    l_i = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for start in range(0, live, SPLITS):
        split = start + tl.arange(0, SPLITS)
        rows = (unit * num_splits + split[:, None]) * GROUP + offs_h[None, :]
        there = (split[:, None] < live) & (offs_h[None, :] < GROUP)
        # .cg reads the L2 cache, where the other programs' stores are
        m = tl.load(m_ptr + rows, mask=there, other=LOWEST, cache_modifier=".cg")
        l = tl.load(l_ptr + rows, mask=there, other=0.0, cache_modifier=".cg")
        parts = acc_ptr + rows[:, :, None] * BLOCK_D + offs_d[None, None, :]
        part = tl.load(parts, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m_i, tl.max(m, 0))
        alpha, weight = tl.exp2(m_i - m_new), tl.exp2(m - m_new[None, :])
        l_i = l_i * alpha + tl.sum(l * weight, 0)
        acc = acc * alpha[:, None] + tl.sum(part * weight[:, :, None], 0)
        m_i = m_new
    return l_i, acc


@triton.jit(do_not_specialize=["table_stride", "max_pages", "shortest"], do_not_specialize_on_alignment=INTEGERS)
def _decode_kernel(
    q_ptr,  # (N, H, D), at most one token a sequence
    k_ptr,  # (slots, H_kv, D)
    v_ptr,
    o_ptr,  # (N, H, D), written
    page_table_ptr,  # (num_seqs, max_pages)
    seq_lens_ptr,  # (num_seqs,)
    cu_seqlens_ptr,  # (num_seqs + 1,)
    m_ptr,  # (num_seqs * H_kv, num_splits, GROUP), written, as l
    l_ptr,
    acc_ptr,  # (num_seqs * H_kv, num_splits, GROUP, BLOCK_D), written
    arrived_ptr,  # (num_seqs * H_kv,), 0 before and after
    q_strides,  # (token, head), in elements; D is contiguous
    table_stride,
    max_pages,
    scale,
    shortest,  # a split has at least so many tiles
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program takes one split of one sequence's keys for the query heads of one KV head, a row each."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    kv_head, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(1)
    length = tl.load(seq_lens_ptr + seq)
    token = tl.load(cu_seqlens_ptr + seq)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
        if PAGE_SIZE % BLOCK_N == 0:
            first = first // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(length - first, BLOCK_N)
    tiles_per_split = tl.maximum(tl.cdiv(tiles, num_splits), shortest)
    live = tl.maximum(tl.cdiv(tiles, tiles_per_split), 1)  # splits that have keys; of an empty sequence one, to write 0
    if (split >= live) | (token == tl.load(cu_seqlens_ptr + seq + 1)):  # no keys left for this split, or no query token
        return

    offs_m = tl.arange(0, BLOCK_M)
    q_rows = token.to(tl.int64) * q_strides[0] + (kv_head * GROUP + offs_m).to(tl.int64) * q_strides[1]
    q = load_rows(q_ptr, q_rows, offs_m < GROUP, HEAD_DIM)
    m_i, l_i, acc = softmax_start(BLOCK_M, HEAD_DIM)
    table_ptr = page_table_ptr + seq.to(tl.int64) * table_stride
    start = first + split * tiles_per_split * BLOCK_N
    for start_n in range(start, tl.minimum(start + tiles_per_split * BLOCK_N, length), BLOCK_N):
        tile, rows = page_rows(table_ptr, max_pages, start_n, length, ROW, BLOCK_N, PAGE_SIZE)
        tile += kv_head * HEAD_DIM
        seen = visible(length - 1, start_n + tl.arange(0, BLOCK_N), WINDOW)
        k = load_rows(k_ptr + tl.multiple_of(tile, 8), rows, seen, HEAD_DIM)
        v = load_rows(v_ptr + tl.multiple_of(tile, 8), rows, seen, HEAD_DIM)
        scores = tl.where(seen[None, :], dot_in_parts(q, k), float("-inf"))
        m_i, l_i, acc = softmax_step(scores, v, m_i, l_i, acc, scale * LOG2_E)

    l_i = tl.sum(l_i, 1)
    H = ROW // HEAD_DIM * GROUP
    o_row = token.to(tl.int64) * H + kv_head * GROUP
    if live == 1:
        o = acc / tl.where(l_i > 0, l_i, 1)[:, None]
        store_rows(o_ptr, o, (o_row + offs_m) * HEAD_DIM, offs_m < GROUP, HEAD_DIM)
    else:
        unit = seq.to(tl.int64) * tl.num_programs(0) + kv_head
        parts = (unit * num_splits + split) * GROUP + offs_m
        tl.store(m_ptr + parts, m_i, mask=offs_m < GROUP)
        tl.store(l_ptr + parts, l_i, mask=offs_m < GROUP)
        store_rows(acc_ptr, acc, parts * BLOCK_D, offs_m < GROUP, BLOCK_D)
        # The barrier puts the stores of all threads before the count. Its release publishes them, and the last program's
        # acquire sees those of all others.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + unit, 1, sem="acq_rel") == live - 1:
            l_sum, acc_sum = _combine(m_ptr, l_ptr, acc_ptr, unit, num_splits, live, GROUP, BLOCK_D)
            offs_h = tl.arange(0, triton.next_power_of_2(GROUP))
            store_rows(o_ptr, acc_sum / l_sum[:, None], (o_row + offs_h) * HEAD_DIM, offs_h < GROUP, HEAD_DIM)
            tl.store(arrived_ptr + unit, 0)  # for the next launch


@triton.jit
def _sequence_of_tile(tile, cu_seqlens_ptr, num_seqs, BLOCK_Q: tl.constexpr):
    """(sequence, its first tile). Sequence i begins with tile cu_seqlens[i] // BLOCK_Q + i, which leaves each one tile
    more than the rows of those before it can fill: enough for the tiles that are not full, and known without lengths. With
    BLOCK_Q = 4 and 5, 1 and 9 query tokens the first tiles are 0, 2 and 3."""
    seq = -1
    for start in range(0, num_seqs, 128):
        i = start + tl.arange(0, 128)
        begins = tl.load(cu_seqlens_ptr + i, mask=i < num_seqs, other=0) // BLOCK_Q + i
        seq += tl.sum(((begins <= tile) & (i < num_seqs)).to(tl.int32), 0)
    return seq, tl.load(cu_seqlens_ptr + seq) // BLOCK_Q + seq


@triton.jit(do_not_specialize=["table_stride", "max_pages", "num_seqs"], do_not_specialize_on_alignment=INTEGERS)
def _prefill_kernel(
    q_ptr,  # (N, H, D)
    k_ptr,  # (slots, H_kv, D)
    v_ptr,
    o_ptr,  # (N, H, D), written
    page_table_ptr,  # (num_seqs, max_pages)
    seq_lens_ptr,  # (num_seqs,)
    cu_seqlens_ptr,  # (num_seqs + 1,)
    q_strides,  # (token, head), in elements; D is contiguous
    table_stride,
    max_pages,
    num_seqs,
    scale,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program takes BLOCK_M // GROUP query tokens of one sequence for the query heads of one KV head: each token is
    GROUP rows of the tile, so that K and V are read once for all of them."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    tile_m = tl.num_programs(0) - 1 - tl.program_id(0)  # the rows that see most keys start first
    seq, first_tile = _sequence_of_tile(tile_m, cu_seqlens_ptr, num_seqs, BLOCK_Q)
    first_token = tl.load(cu_seqlens_ptr + seq)
    count = tl.load(cu_seqlens_ptr + seq + 1) - first_token
    length = tl.load(seq_lens_ptr + seq)
    start_m = (tile_m - first_tile) * BLOCK_Q
    if start_m >= count:
        return

    rows_m = tl.arange(0, BLOCK_M)
    offs_m = start_m + rows_m // GROUP
    heads = (kv_head * GROUP + rows_m % GROUP).to(tl.int64)
    inside = (rows_m < BLOCK_Q * GROUP) & (offs_m < count)
    tokens = (first_token + offs_m).to(tl.int64)
    q = load_rows(q_ptr, tokens * q_strides[0] + heads * q_strides[1], inside, HEAD_DIM)
    q_pos = offs_m + (length - count)
    q_first = start_m + (length - count)
    q_last = tl.minimum(q_first + BLOCK_Q, length) - 1
    m_i, l_i, acc = softmax_start(BLOCK_M, HEAD_DIM)
    table_ptr = page_table_ptr + seq.to(tl.int64) * table_stride

    first = 0
    if WINDOW > 0:
        first = tl.maximum(q_first - WINDOW + 1, 0)
    lowest = first
    if PAGE_SIZE % BLOCK_N == 0:
        first = first // BLOCK_N * BLOCK_N
    for start_n in range(first, q_last + 1, BLOCK_N):
        tile, rows = page_rows(table_ptr, max_pages, start_n, q_last + 1, ROW, BLOCK_N, PAGE_SIZE)
        tile += kv_head * HEAD_DIM
        k_pos = start_n + tl.arange(0, BLOCK_N)
        there = (k_pos >= lowest) & (k_pos <= q_last)
        k = load_rows(k_ptr + tl.multiple_of(tile, 8), rows, there, HEAD_DIM)
        v = load_rows(v_ptr + tl.multiple_of(tile, 8), rows, there, HEAD_DIM)
        scores = dot_in_parts(q, k)
        if cut_by_mask(q_first, q_last, start_n, start_n + BLOCK_N - 1, WINDOW):
            scores = tl.where(visible(q_pos[:, None], k_pos[None, :], WINDOW), scores, float("-inf"))
        m_i, l_i, acc = softmax_step(scores, v, m_i, l_i, acc, scale * LOG2_E)

    l_i = tl.sum(l_i, 1)
    o = acc * (1 / tl.where(l_i > 0, l_i, 1))[:, None]  # the token of an empty sequence sees no key
    H = ROW // HEAD_DIM * GROUP
    store_rows(o_ptr, o, (tokens * H + heads) * HEAD_DIM, inside, HEAD_DIM)


@cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def counters(device):
    """How many splits of each sequence have arrived; every launch leaves zeros behind."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # the zeros would be written when the graph runs, and not now
        raise RuntimeError("paged_attention: call it once on this device before it is captured in a CUDA graph")
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def check_alignment(k_pages, v_pages):
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        address = pages.data_ptr()
        require(address % 16 == 0, f"paged_attention: {name}.data_ptr()", address, "an address that is a multiple of 16")


def launch(kernel, grid, tiles, inputs, **arguments):
    """Run a kernel: its own arguments, and those that decoding and prefilling share."""
    q, k_pages, v_pages, page_table, seq_lens, cu_seqlens, window, scale = inputs
    _, page_size, H_kv, D = k_pages.shape
    group = q.shape[1] // H_kv
    block_m = max(tiles.block_m, next_power_of_2(group))
    check_alignment(k_pages, v_pages)
    kernel[grid](
        q_ptr=q,
        k_ptr=k_pages,
        v_ptr=v_pages,
        page_table_ptr=page_table,
        seq_lens_ptr=seq_lens,
        cu_seqlens_ptr=cu_seqlens,
        q_strides=strides(q[None])[1:],
        table_stride=page_table.stride(0),
        max_pages=page_table.shape[1],
        scale=scale,
        GROUP=group,
        WINDOW=window,
        HEAD_DIM=D,
        PAGE_SIZE=page_size,
        ROW=H_kv * D,
        BLOCK_M=block_m,
        BLOCK_N=tiles.block_n,
        num_warps=max(tiles.num_warps, block_m // 16),
        num_stages=tiles.num_stages,
        # In float32, s - max must be 0 at the maximum, which a fused multiply-add would miss by a rounding.
        enable_fp_fusion=q.dtype != torch.float32,
        **arguments,
    )


def decode(tiles, inputs, max_seq_len):
    """At most one query token a sequence."""
    q, k_pages, _, page_table, *_, window, _ = inputs
    (N, H, D), H_kv, num_seqs = q.shape, k_pages.shape[2], page_table.shape[0]
    max_keys = min(max_seq_len, window) if window else max_seq_len
    num_splits, shortest = choose_splits(num_seqs * H_kv, H // H_kv, max_keys, tiles, multiprocessors(q.device))
    o = q.new_empty(N, H, D)
    parts = (num_seqs * H_kv, num_splits, H // H_kv)
    launch(
        _decode_kernel,
        (H_kv, num_splits, num_seqs),
        tiles,
        inputs,
        o_ptr=o,
        m_ptr=q.new_empty(parts, dtype=torch.float32),
        l_ptr=q.new_empty(parts, dtype=torch.float32),
        acc_ptr=q.new_empty(*parts, next_power_of_2(D), dtype=torch.float32),
        arrived_ptr=counters(q.device),
        shortest=shortest,
    )
    return o


def prefill(tiles, inputs):
    """Any number of query tokens a sequence."""
    q, k_pages, _, page_table = inputs[:4]
    (N, H, D), H_kv, num_seqs = q.shape, k_pages.shape[2], page_table.shape[0]
    group = H // H_kv
    block_q = max(tiles.block_m, next_power_of_2(group)) // group
    o = q.new_empty(N, H, D)
    launch(_prefill_kernel, (N // block_q + num_seqs, H_kv), tiles, inputs, o_ptr=o, num_seqs=num_seqs)
    return o


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor,
    window: int,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
) -> Tensor:
    inputs = (kernel_layout(q[None])[0], k_pages, v_pages, page_table, seq_lens, cu_seqlens, window, scale)
    decode_tiles, prefill_tiles = choose_tiles(q, q.shape[1] // k_pages.shape[2])
    return decode(decode_tiles, inputs, max_seq_len) if max_query_len == 1 else prefill(prefill_tiles, inputs)


_paged = torch.library.custom_op("attention::paged", attend, mutates_args=())


@_paged.register_fake
def _(q, *_):
    return q.new_empty(q.shape)


def write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    k, v = (kernel_layout(x[None]) for x in (k, v))
    check_alignment(k_pages, v_pages)
    _write_kernel[(slot_mapping.shape[0],)](
        k_ptr=k,
        v_ptr=v,
        k_pages_ptr=k_pages,
        v_pages_ptr=v_pages,
        slot_ptr=slot_mapping,
        k_strides=strides(k)[1:],
        v_strides=strides(v)[1:],
        HEAD_DIM=k.shape[3],
        ROW=k.shape[2] * k.shape[3],
    )


_write = torch.library.custom_op("attention::write_pages", write, mutates_args=("k_pages", "v_pages"))


@_write.register_fake
def _(k, v, k_pages, v_pages, slot_mapping):
    return None


def write_pages(k, v, k_pages, v_pages, slot_mapping):
    """Store K and V of N tokens in the slots of the pages that were chosen for them.

    k, v:             (N, H_kv, D), views of a fused projection among them
    k_pages, v_pages: (num_pages, page_size, H_kv, D), written in place
    slot_mapping:     (N,) int64 or int32, page * page_size + offset of each token; below 0 a token is left out

    The definition is `kernels.reference.write_pages`. Wrong arguments raise a ValueError.
    """
    check("write_pages", "k", k, k_pages, v_pages)
    H_kv, like_k = k_pages.shape[2], (v.shape, v.dtype, v.device) == (k.shape, k.dtype, k.device)
    require(k.shape[1] == H_kv, "write_pages: k.shape", tuple(k.shape), f"the {H_kv} heads of k_pages")
    require(like_k, "write_pages: v", v, f"shape, dtype and device of k, {tuple(k.shape)}")
    fits = slot_mapping.shape == k.shape[:1] and slot_mapping.device == k.device and slot_mapping.is_contiguous()
    takes = f"({k.shape[0]},) int64 or int32 side by side on {k.device}"
    fits = fits and slot_mapping.dtype in (torch.int64, torch.int32)
    require(fits, "write_pages: slot_mapping", slot_mapping, takes)
    # outside torch.compile the op only costs time on the host, as much again as the rest of this call
    (_write if torch.compiler.is_compiling() else write)(k, v, k_pages, v_pages, slot_mapping)


def paged_attention(q, k_pages, v_pages, page_table, seq_lens, cu_seqlens, window=0, scale=None, *, max_query_len, max_seq_len):
    """Causal attention of a packed batch of sequences whose K and V lie in pages. No host synchronisation.

    q:                (N, H, D), the query tokens of all sequences in a row; those of sequence i are the rows
                      cu_seqlens[i] up to cu_seqlens[i + 1], and they are its last positions
    k_pages, v_pages: (num_pages, page_size, H_kv, D), K and V of the query tokens among them
    page_table:       (num_seqs, max_pages) int32: position p lies in page page_table[i, p // page_size % max_pages]
    seq_lens:         (num_seqs,) int32 tokens of each sequence; the output of an empty one is 0
    cu_seqlens:       (num_seqs + 1,) int32
    window, scale:    visible keys a query, itself included, 0 means all; of the scores, 1 / sqrt(D) when None
    max_query_len:    no sequence has more query tokens; 1 chooses the decode kernel
    max_seq_len:      no sequence is longer; decides how its keys are split

    Returns (N, H, D) in q's dtype. A slot that no query sees is never read. The definition is
    `kernels.reference.paged_attention`. Wrong arguments raise a ValueError; what lies on the device is trusted.
    Sources: PagedAttention, Kwon et al. 2023, section 4.1; splitting the keys: Flash-Decoding, Dao et al. 2023.
    """
    check("paged_attention", "q", q, k_pages, v_pages)
    (N, H, D), H_kv, num_seqs = q.shape, k_pages.shape[2], page_table.shape[0]

    def takes(holds, name, value, what):
        require(holds, f"paged_attention: {name}", value, what)

    shapes = ((num_seqs, *page_table.shape[1:2]), (num_seqs,), (num_seqs + 1,))
    for name, x, shape in zip(("page_table", "seq_lens", "cu_seqlens"), (page_table, seq_lens, cu_seqlens), shapes):
        fits = x.shape == shape and x.stride(-1) == 1 and x.dtype == torch.int32 and x.device == q.device
        takes(fits, name, x, f"{shape} int32 side by side on {q.device}")
    fits = page_table.dim() == 2 and page_table.numel() > 0 and num_seqs < 2**16
    takes(fits, "page_table", page_table, "(num_seqs, max_pages), 65535 sequences at most, none 0")
    most = MAX_ROWS[padded(D)]
    takes(H % H_kv == 0 and H <= most * H_kv, "q.shape[1]", H, f"a multiple of k_pages' {H_kv} heads, {most} times at most")
    require_numbers("paged_attention", window, scale)
    takes(max_query_len >= 1, "max_query_len", max_query_len, "a whole number from 1 on")
    fits = max_query_len > 1 or N <= num_seqs
    takes(fits, "q.shape[0]", N, f"at most one token for each of {num_seqs} sequences")
    takes(max_seq_len >= 0, "max_seq_len", max_seq_len, "a whole number from 0 on")
    scale = D**-0.5 if scale is None else scale
    compute = _paged if torch.compiler.is_compiling() else attend
    return compute(q, k_pages, v_pages, page_table, seq_lens, cu_seqlens, window, scale, max_query_len, max_seq_len)


def check(function, name, x, k_pages, v_pages):
    """What both functions ask of the tokens x, and of the pages that belong to them."""
    require_computable(function, name, x, 3, "(N, heads, D)")
    D = x.shape[2]
    for pages_name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        fits = pages.dim() == 4 and pages.numel() > 0 and pages.shape == k_pages.shape and pages.shape[3] == D
        fits = fits and pages.shape[0] * pages.shape[1] < 2**31
        takes = f"(num_pages, page_size, H_kv, {D}), none of them 0, fewer than 2^31 slots, k_pages and v_pages alike"
        require(fits, f"{function}: {pages_name}.shape", tuple(pages.shape), takes)
        fits = pages.dtype == x.dtype and pages.device == x.device and pages.is_contiguous()
        takes = f"contiguous {x.dtype} on {x.device}, as {name}"
        require(fits, f"{function}: {pages_name}", pages, takes)
