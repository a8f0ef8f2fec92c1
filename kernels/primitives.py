"""Pieces that the attention kernels share, written once: the mask, moving tiles, the softmax step."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are base 2: exp2 is one instruction, exp is two

# The row maximum before any key is seen. Masked scores are -inf; a maximum that is finite from the start keeps
# -inf - maximum from being NaN where a window hides a whole tile from a row.
LOWEST = tl.constexpr(-1.0e30)


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
def of_batch(ptr, batch, strides):
    """Where one (T, H, D) element of a (B, T, H, D) tensor begins; strides are (batch, token, head), multiples of 8."""
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

    LOAD="whole" promises that no tile sticks out, which saves a twentieth of a loop's instructions.
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
def tile_of_program(num_tiles, heads_together):
    """(tile, head) of this program. Programs start in order of their number: heads_together heads are walked side by
    side, all of them at tile 0, then tile 1, .., so that the longest rows start first while the keys and values of
    those heads still fit into the L2 cache."""
    pid = tl.program_id(0)
    group_size = heads_together * num_tiles
    first_head = pid // group_size * heads_together
    heads = tl.minimum(heads_together, tl.num_programs(0) // num_tiles - first_head)
    return pid % group_size // heads, first_head + pid % group_size % heads


@triton.jit
def dot(a, b):
    """a @ b, without the tensor cores' shortened float32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_dot(acc, a, b):
    """acc + a @ b. In float32 the tile's product is summed before it is added: in one chain over all T keys the
    roundings would add up. max_num_imprecise_acc keeps the compiler from making that chain of it again."""
    if a.dtype == tl.float32:
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def softmax_step(scores, v, m_i, l_i, acc, qk_scale):
    """One tile of the online softmax (Milakov and Gimelshein 2018), base 2: qk_scale holds log2(e).

    scores (M, N) are unscaled; m_i is the scaled row maximum, l_i the row sum, acc the unnormalised output.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1) * qk_scale)
    p = tl.exp2(scores * qk_scale - m_new[:, None])  # one fused multiply-add feeds the exponential
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    return m_new, l_i, add_dot(acc * alpha[:, None], p.to(v.dtype), v)
