"""Pieces that the attention kernels share, written once: the mask, moving tiles, the online softmax."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are base 2: exp2 is one instruction, exp is two

# The row maximum before any key is seen. Masked scores are -inf; a maximum that is finite from the start keeps
# -inf - maximum from being NaN where a window hides a whole tile from a row.
LOWEST = tl.constexpr(-1.0e30)

# A row's sum is carried as 8 sums, one of the columns with the same remainder by 8: in the tensor cores' layout these lie in
# one thread, which adds them up without asking others.
SUM_PARTS = tl.constexpr(8)


@triton.jit
def visible(q_pos, k_pos, WINDOW: tl.constexpr):
    """Which keys a query sees; shapes broadcast. WINDOW counts visible keys, the token itself included; 0: no limit."""
    distance = q_pos - k_pos
    if WINDOW > 0:
        return (distance >= 0) & (distance < WINDOW)
    return distance >= 0


@triton.jit
def cut_by_mask(q_first, q_last, k_first, k_last, WINDOW: tl.constexpr):
    """Whether some query of a tile does not see some key of it; if all see all, the tile needs no mask."""
    if WINDOW > 0:
        return (q_first < k_last) | (q_last - k_first >= WINDOW)
    return q_first < k_last


@triton.jit
def first_tile(q_first, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of the first tile of keys that queries from q_first on see."""
    if WINDOW > 0:
        return tl.maximum(q_first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    return 0


@triton.jit
def of_batch(ptr, batch, strides):
    """The address of x[batch] for a (B, T, H, D) tensor x; strides are (batch, token, head), multiples of 8. multiple_of
    promises that to the compiler, which may then load 16 bytes at once."""
    return ptr + tl.multiple_of(tl.cast(batch, tl.int64) * strides[0], 8)


@triton.jit
def tile_offsets(head, start, T, strides, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Offset of a tile of a (T, H, D) tensor, offsets of its elements from there, and which of them are inside."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    rows = tl.arange(0, ROWS)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    inside = rows < T - start
    if BLOCK_D > HEAD_DIM:
        inside = inside & (offs_d < HEAD_DIM)
    # 64 bits for the way to the tile, which may be long; 32 inside it, where address arithmetic is hot.
    tile = tl.cast(head, tl.int64) * strides[2] + tl.cast(start, tl.int64) * strides[1]
    return tl.multiple_of(tile, 8), rows * tl.multiple_of(strides[1], 8) + offs_d, inside


@triton.jit
def tile_source(ptr, H, T, strides, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr):
    """What load_tile takes tiles of a (T, H, D) tensor from: a tensor descriptor under LOAD="tma", else the pointer.

    A descriptor is built once a program, before the loop: built inside, it would stop the loop's pipelining.
    """
    if LOAD == "tma":
        BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
        return tl.make_tensor_descriptor(ptr, [H, T, HEAD_DIM], [strides[2], strides[1], 1], [1, ROWS, BLOCK_D])
    else:
        return ptr


@triton.jit
def load_tile(source, head, start, T, strides, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr):
    """Rows start, start + 1, .. of one head of a (T, H, D) tensor; what is outside it reads as 0.

    LOAD: "whole" promises that no tile sticks out of the tensor, "masked" looks, "tma" takes a tensor descriptor, which
    looks by itself.
    """
    if LOAD == "tma":
        return source.load([head, start, 0]).reshape(ROWS, triton.next_power_of_2(HEAD_DIM))
    else:
        tile, offsets, inside = tile_offsets(head, start, T, strides, ROWS, HEAD_DIM)
        if LOAD == "whole":
            return tl.load(source + tile + offsets)
        else:
            return tl.load(source + tile + offsets, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, x, head, start, T, strides, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The inverse of load_tile, rounding x to the dtype of ptr."""
    tile, offsets, inside = tile_offsets(head, start, T, strides, ROWS, HEAD_DIM)
    tl.store(ptr + tile + offsets, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_of_program():
    """(tile, head) of this program, the heads counted over all sequences. Programs start in the order of their numbers, the
    first axis first: some heads are walked side by side, all of them at tile 0, then tile 1, .., and then the next ones. So
    the longest rows start first while the keys and values of those heads still fit into the L2 cache."""
    return tl.program_id(1), tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def dot(a, b):
    """a @ b; float32 is multiplied as such, not as TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_in_parts(q, k):
    """q @ k^T for (M, D) and (N, D). In float32 D is halved until 16 numbers are left, and the products are added: one chain of
    D roundings would be off by more than the sums that libraries take for a single query."""
    if q.dtype == tl.float32 and q.shape[1] >= 32:  # tl.dot takes 16 numbers or more
        q_even, q_odd = tl.split(q.reshape(q.shape[0], q.shape[1] // 2, 2))
        k_even, k_odd = tl.split(k.reshape(k.shape[0], k.shape[1] // 2, 2))
        return dot_in_parts(q_even, k_even) + dot_in_parts(q_odd, k_odd)
    else:
        return dot(q, tl.trans(k))


@triton.jit
def add_dot(acc, a, b):
    """acc + a @ b. In float32 the tile's product is summed before it is added: in one chain over all T keys the
    roundings would add up. max_num_imprecise_acc keeps the compiler from making that chain of it again."""
    if a.dtype == tl.float32:
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def softmax_start(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(m_i, l_i, acc) before any key: the scaled row maximum, parts of the row sum, the unnormalised output."""
    m_i = tl.full([ROWS], LOWEST, tl.float32)
    l_i = tl.zeros([ROWS, SUM_PARTS], tl.float32)
    return m_i, l_i, tl.zeros([ROWS, triton.next_power_of_2(HEAD_DIM)], tl.float32)


@triton.jit
def softmax_step(scores, v, m_i, l_i, acc, qk_scale):
    """One tile of the online softmax (Milakov and Gimelshein 2018), base 2: scores (M, N) are unscaled, qk_scale holds
    log2(e). Only the end adds up the parts of the row sum."""
    m_new = tl.maximum(m_i, tl.max(scores, 1) * qk_scale)
    p = tl.exp2(scores * qk_scale - m_new[:, None])  # one fused multiply-add feeds the exponential
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha[:, None] + tl.sum(p.reshape(p.shape[0], p.shape[1] // SUM_PARTS, SUM_PARTS), 1)
    return m_new, l_i, add_dot(acc * alpha[:, None], p.to(v.dtype), v)


@triton.jit
def page_rows(table_ptr, max_pages, start, end, ROW: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where the positions start, start + 1, .. of a sequence lie: (tile, rows), to be added to the address of pages whose
    slots are ROW = H_kv * D elements apart. table_ptr is the sequence's row of the page table, a ring: the page of index j stands
    in column j % max_pages. Nothing is looked up from `end` on.

    If pages hold whole tiles, start must be a multiple of BLOCK_N; otherwise the ring must hold start up to end.
    """
    offs_n = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:  # one page id a tile, and offsets that no tile has to compute again
        page = tl.load(table_ptr + start // PAGE_SIZE % max_pages)
        return (page * PAGE_SIZE + start % PAGE_SIZE).to(tl.int64) * ROW, offs_n * ROW
    else:
        first = start // PAGE_SIZE
        index = first % max_pages + ((start + offs_n) // PAGE_SIZE - first)
        index = tl.where(index < max_pages, index, index - max_pages)  # the ring is wide enough to wrap only once
        page = tl.load(table_ptr + index, mask=start + offs_n < end, other=0)
        # slots are counted in 32 bits, elements in 64: one widening multiplication a row
        return tl.cast(0, tl.int64), (page * PAGE_SIZE + (start + offs_n) % PAGE_SIZE).to(tl.int64) * ROW


@triton.jit
def load_rows(ptr, rows, inside, HEAD_DIM: tl.constexpr):
    """Rows of HEAD_DIM elements each at its own offset, those that are not inside as 0."""
    offs_d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    inside = inside[:, None] & (offs_d < HEAD_DIM)
    return tl.load(ptr + tl.multiple_of(rows, 8)[:, None] + offs_d, mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, x, rows, inside, HEAD_DIM: tl.constexpr):
    """The inverse of load_rows, rounding x to the dtype of ptr."""
    offs_d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptr + tl.multiple_of(rows, 8)[:, None] + offs_d, x, mask=inside[:, None] & (offs_d < HEAD_DIM))
