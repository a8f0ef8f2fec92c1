"""FlashAttention: causal attention and its gradients without the T x T matrix, for MHA, MQA, GQA and windows.

    s = scale * q k^T    p = exp2(log2(e) * s - lse)    o = p v                      (lse: base-2 log-sum-exp of a row)
    dv = p^T do    dp = do v^T    delta = rowsum(o * do)    ds = p * (dp - delta)    dq = scale * ds k    dk = scale * ds^T q

Layout is (B, T, H, D). Query head h reads KV head h // GROUP. The queries are the last T_q of T_k positions; a query
sees the keys with 0 <= q_pos - k_pos < window, window = 0 meaning no limit. Tiles that the mask hides are never visited.

Three kernels: forward; dq, which also computes delta; dkdv, which sums over the query heads of its group in a fixed order.
No atomics, so two runs give the same bits. Memory beyond inputs and outputs: B * H * T_q floats for lse, twice that in
the backward pass.

Limits: no dropout, bias or padding mask; D a multiple of 8 from 16 to 256, computed at the next power of two; float32
runs in IEEE arithmetic without tensor cores, so it is for checking, not for speed; no second derivatives,
no forward mode, no torch.func.

For those new to Triton: a kernel runs once for each cell of a grid, as a "program", on whole tiles, which are small matrices
in registers. tl.program_id says which cell. tl.constexpr arguments are compiled in, one kernel for each value. tl.load and
tl.store take tiles of addresses, and their mask switches elements off; tl.dot is a matrix product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash_tiles import HEADS_TOGETHER, choose_tiles, grid_of, heads_in_cache
from kernels.launch import cdiv, kernel_layout, next_power_of_2, require, require_computable, require_numbers, strides
from kernels.primitives import (
    LOG2_E,
    add_dot,
    cut_by_mask,
    dot,
    first_tile,
    load_tile,
    of_batch,
    softmax_start,
    softmax_step,
    store_tile,
    tile_of_program,
    tile_source,
    visible,
)


# do_not_specialize: else Triton would compile further kernels for lengths that are 1 or no multiple of 16.
@triton.jit(do_not_specialize=["T_q", "T_k"])
def _forward_kernel(
    q_ptr,  # (B, T_q, H, D)
    k_ptr,  # (B, T_k, H_kv, D)
    v_ptr,  # (B, T_k, H_kv, D)
    o_ptr,  # (B, T_q, H, D), written
    lse_ptr,  # (B, H, T_q), written
    q_strides,  # (batch, token, head), in elements; D is contiguous
    k_strides,
    v_strides,
    o_strides,
    H,
    T_q,
    T_k,
    scale,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOAD: tl.constexpr,  # of `load_tile`
):
    """One program makes BLOCK_M rows of one head's output."""
    tile, batch_head = tile_of_program()
    start_m = (tl.num_programs(1) - 1 - tile) * BLOCK_M  # the rows that see most keys start first
    batch, head, kv_head = tl.cast(batch_head // H, tl.int64), batch_head % H, batch_head % H // GROUP
    k_rows = of_batch(k_ptr, batch, k_strides)
    v_rows = of_batch(v_ptr, batch, v_strides)

    q = load_tile(of_batch(q_ptr, batch, q_strides), head, start_m, T_q, q_strides, BLOCK_M, HEAD_DIM, LOAD)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_pos = offs_m + (T_k - T_q)
    q_first = start_m + (T_k - T_q)
    q_last = tl.minimum(q_first + BLOCK_M, T_k) - 1
    m_i, l_i, acc = softmax_start(BLOCK_M, HEAD_DIM)
    for start_n in range(first_tile(q_first, WINDOW, BLOCK_N), q_last + 1, BLOCK_N):
        k = load_tile(k_rows, kv_head, start_n, T_k, k_strides, BLOCK_N, HEAD_DIM, LOAD)
        v = load_tile(v_rows, kv_head, start_n, T_k, v_strides, BLOCK_N, HEAD_DIM, LOAD)
        scores = dot(q, tl.trans(k))
        # Most tiles need no mask, and skip it. Keys past T_k need none of their own: they lie behind every query.
        if cut_by_mask(q_first, q_last, start_n, start_n + BLOCK_N - 1, WINDOW):
            k_pos = start_n + tl.arange(0, BLOCK_N)
            scores = tl.where(visible(q_pos[:, None], k_pos[None, :], WINDOW), scores, float("-inf"))
        m_i, l_i, acc = softmax_step(scores, v, m_i, l_i, acc, scale * LOG2_E)

    l_i = tl.sum(l_i, 1)
    lse = m_i + tl.log2(l_i)
    lse += (l_i * tl.exp2(m_i - lse) - 1) * LOG2_E  # a Newton step: the hardware's log2 is off by 10 roundings
    tl.store(lse_ptr + (batch * H + head) * T_q + offs_m, lse, mask=offs_m < T_q)
    o = acc * (1 / l_i)[:, None]
    store_tile(of_batch(o_ptr, batch, o_strides), o, head, start_m, T_q, o_strides, BLOCK_M, HEAD_DIM)


@triton.jit(do_not_specialize=["T_q", "T_k"])
def _dq_kernel(
    q_ptr,  # (B, T_q, H, D)
    k_ptr,  # (B, T_k, H_kv, D)
    v_ptr,  # (B, T_k, H_kv, D)
    o_ptr,  # (B, T_q, H, D)
    do_ptr,
    dq_ptr,  # written
    lse_ptr,  # (B, H, T_q)
    stats_ptr,  # (B, H, T_q, 2), written: lse and delta side by side, so that dkdv loads both at once
    q_strides,  # (batch, token, head), in elements; D is contiguous
    k_strides,
    v_strides,
    o_strides,  # of o and do
    dq_strides,
    H,
    T_q,
    T_k,
    scale,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOAD: tl.constexpr,
):
    """One program makes BLOCK_M rows of one head's dq, and their delta for the kernel that comes next."""
    tile, batch_head = tile_of_program()
    start_m = (tl.num_programs(1) - 1 - tile) * BLOCK_M
    batch, head, kv_head = tl.cast(batch_head // H, tl.int64), batch_head % H, batch_head % H // GROUP
    k_rows = of_batch(k_ptr, batch, k_strides)
    v_rows = of_batch(v_ptr, batch, v_strides)

    q = load_tile(of_batch(q_ptr, batch, q_strides), head, start_m, T_q, q_strides, BLOCK_M, HEAD_DIM, LOAD)
    do = load_tile(of_batch(do_ptr, batch, o_strides), head, start_m, T_q, o_strides, BLOCK_M, HEAD_DIM, LOAD)
    o = load_tile(of_batch(o_ptr, batch, o_strides), head, start_m, T_q, o_strides, BLOCK_M, HEAD_DIM, LOAD)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = (batch * H + head) * T_q + offs_m
    lse = tl.load(lse_ptr + rows, mask=offs_m < T_q, other=0.0)
    tl.store(stats_ptr + rows * 2, lse, mask=offs_m < T_q)
    tl.store(stats_ptr + rows * 2 + 1, delta, mask=offs_m < T_q)
    q_pos = offs_m + (T_k - T_q)
    q_first = start_m + (T_k - T_q)
    q_last = tl.minimum(q_first + BLOCK_M, T_k) - 1
    dq = tl.zeros([BLOCK_M, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for start_n in range(first_tile(q_first, WINDOW, BLOCK_N), q_last + 1, BLOCK_N):
        k = load_tile(k_rows, kv_head, start_n, T_k, k_strides, BLOCK_N, HEAD_DIM, LOAD)
        v = load_tile(v_rows, kv_head, start_n, T_k, v_strides, BLOCK_N, HEAD_DIM, LOAD)
        scores = dot(q, tl.trans(k))
        dp = dot(do, tl.trans(v))
        p = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])  # anything in rows past T_q, which are not stored
        if cut_by_mask(q_first, q_last, start_n, start_n + BLOCK_N - 1, WINDOW):
            k_pos = start_n + tl.arange(0, BLOCK_N)
            p = tl.where(visible(q_pos[:, None], k_pos[None, :], WINDOW), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = add_dot(dq, ds.to(k.dtype), k)

    store_tile(of_batch(dq_ptr, batch, dq_strides), dq * scale, head, start_m, T_q, dq_strides, BLOCK_M, HEAD_DIM)


@triton.jit(do_not_specialize=["T_q", "T_k"])
def _dkdv_kernel(
    q_ptr,  # (B, T_q, H, D)
    k_ptr,  # (B, T_k, H_kv, D)
    v_ptr,  # (B, T_k, H_kv, D)
    do_ptr,  # (B, T_q, H, D)
    dk_ptr,  # (B, T_k, H_kv, D), written, as dv
    dv_ptr,
    stats_ptr,  # (B, H, T_q, 2): lse and delta
    q_strides,  # (batch, token, head), in elements; D is contiguous
    k_strides,
    v_strides,
    do_strides,
    dk_strides,  # of dk and dv
    H,
    T_q,
    T_k,
    scale,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOAD: tl.constexpr,
):
    """One program makes BLOCK_N rows of one KV head's dk and dv. Scores are transposed, keys by queries, so that p^T
    and ds^T go from the registers of one product straight into the next."""
    ONCE: tl.constexpr = "whole" if LOAD == "whole" else "masked"  # no descriptor for a single tile
    tile, batch_head = tile_of_program()
    start_n = tile * BLOCK_N  # the first keys are seen by most queries
    H_kv = H // GROUP
    batch, kv_head = tl.cast(batch_head // H_kv, tl.int64), batch_head % H_kv
    q_tiles = tile_source(of_batch(q_ptr, batch, q_strides), H, T_q, q_strides, BLOCK_M, HEAD_DIM, LOAD)
    do_tiles = tile_source(of_batch(do_ptr, batch, do_strides), H, T_q, do_strides, BLOCK_M, HEAD_DIM, LOAD)

    k = load_tile(of_batch(k_ptr, batch, k_strides), kv_head, start_n, T_k, k_strides, BLOCK_N, HEAD_DIM, ONCE)
    v = load_tile(of_batch(v_ptr, batch, v_strides), kv_head, start_n, T_k, v_strides, BLOCK_N, HEAD_DIM, ONCE)
    k_pos = start_n + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    dv = tl.zeros([BLOCK_N, triton.next_power_of_2(HEAD_DIM)], tl.float32)

    shift = T_k - T_q  # position of the first query
    first = tl.maximum(start_n - shift, 0) // BLOCK_M * BLOCK_M
    end = T_q
    if WINDOW > 0:
        end = tl.minimum(start_n + BLOCK_N - 1 + WINDOW - shift, T_q)
    # One loop over all heads of the group, so that the loads of the next head are under way while one head ends.
    start_m = first
    head = kv_head * GROUP
    for _ in range(GROUP * tl.maximum(tl.cdiv(end - first, BLOCK_M), 0)):
        q = load_tile(q_tiles, head, start_m, T_q, q_strides, BLOCK_M, HEAD_DIM, LOAD)
        do = load_tile(do_tiles, head, start_m, T_q, do_strides, BLOCK_M, HEAD_DIM, LOAD)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        # lse and delta in one load: alone, each is so short that the compiler would have every thread fetch its own.
        stats = stats_ptr + (batch * H + head) * T_q * 2 + offs_m[:, None] * 2 + tl.arange(0, 2)[None, :]
        if LOAD == "whole":
            lse, delta = tl.split(tl.load(stats))
        else:
            lse, delta = tl.split(tl.load(stats, mask=offs_m[:, None] < T_q, other=0.0))

        scores = dot(k, tl.trans(q))
        dp = dot(v, tl.trans(do))
        p = tl.exp2(scores * (scale * LOG2_E) - lse[None, :])
        q_first = start_m + shift
        if cut_by_mask(q_first, q_first + BLOCK_M - 1, start_n, start_n + BLOCK_N - 1, WINDOW):
            p = tl.where(visible(offs_m[None, :] + shift, k_pos[:, None], WINDOW), p, 0.0)
        ds = p * (dp - delta[None, :])  # of rows past T_q p may be 1, but do, and with it dp and delta, are 0
        dv = add_dot(dv, p.to(do.dtype), do)
        dk = add_dot(dk, ds.to(q.dtype), q)

        head_done = start_m + BLOCK_M >= end
        head += head_done.to(tl.int32)
        start_m = tl.where(head_done, first, start_m + BLOCK_M)

    store_tile(of_batch(dk_ptr, batch, dk_strides), dk * scale, kv_head, start_n, T_k, dk_strides, BLOCK_N, HEAD_DIM)
    store_tile(of_batch(dv_ptr, batch, dk_strides), dv, kv_head, start_n, T_k, dk_strides, BLOCK_N, HEAD_DIM)


def launch(kernel, tiles, grid, inputs, **arguments):
    """Run a kernel: its own arguments, and those that all three share."""
    q, k, v, window, scale = inputs
    T_q, H, D = q.shape[1:]
    T_k, H_kv = k.shape[1:3]
    whole = T_q % tiles.block_m == 0 and T_k % tiles.block_n == 0 and D == next_power_of_2(D)
    if tiles.tma:  # descriptors live in memory that the kernel asks for; the allocator is the thread's, so set it here
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=q.device))
    kernel[grid](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        q_strides=strides(q),
        k_strides=strides(k),
        v_strides=strides(v),
        H=H,
        T_q=T_q,
        T_k=T_k,
        scale=scale,
        GROUP=H // H_kv,
        WINDOW=window,
        HEAD_DIM=D,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        LOAD="tma" if tiles.tma else "whole" if whole else "masked",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.maxnreg,
        # In float32, s - max must be 0 at the maximum, which a fused multiply-add would miss by a rounding.
        enable_fp_fusion=q.dtype != torch.float32,
        **arguments,
    )


@torch.library.custom_op("attention::flash_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """o and lse; lse is (B, H, T_q) float32."""
    B, T_q, H, D = q.shape
    q, k, v = (kernel_layout(x) for x in (q, k, v))
    o = q.new_empty(B, T_q, H, D)
    lse = q.new_empty(B, H, T_q, dtype=torch.float32)
    tiles = choose_tiles(q, window)[0]
    together = 1 if window else heads_in_cache(k, H // k.shape[2])
    launch(
        _forward_kernel,
        tiles,
        grid_of(cdiv(T_q, tiles.block_m), B * H, together),
        (q, k, v, window, scale),
        o_ptr=o,
        lse_ptr=lse,
        o_strides=strides(o),
    )
    return o, lse


@torch.library.custom_op("attention::flash_backward", mutates_args=())
def _backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, scale: float) -> Tensor:
    """dq, dk and dv side by side, (B, T_k, H + 2 H_kv, D), as a fused projection had q, k and v: its own backward pass,
    when compiled, then finds them in place and copies nothing. dq fills the last T_q tokens; those before are not written."""
    B, T_q, H, D = q.shape
    T_k, H_kv = k.shape[1:3]
    q, k, v, do = (kernel_layout(x) for x in (q, k, v, do.contiguous()))
    dqkv = q.new_empty(B, T_k, H + 2 * H_kv, D)
    dq, dk, dv = split_heads(dqkv, q, k)
    stats = lse.new_empty(*lse.shape, 2)
    _, dq_tiles, dkdv_tiles = choose_tiles(q, window)
    launch(
        _dq_kernel,
        dq_tiles,
        grid_of(cdiv(T_q, dq_tiles.block_m), B * H, 1 if window else HEADS_TOGETHER),
        (q, k, v, window, scale),
        o_ptr=o,
        do_ptr=do,
        dq_ptr=dq,
        lse_ptr=lse,
        stats_ptr=stats,
        o_strides=strides(o),
        dq_strides=strides(dq),
    )
    launch(
        _dkdv_kernel,
        dkdv_tiles,
        grid_of(cdiv(T_k, dkdv_tiles.block_n), B * H_kv, HEADS_TOGETHER),
        (q, k, v, window, scale),
        do_ptr=do,
        dk_ptr=dk,
        dv_ptr=dv,
        stats_ptr=stats,
        do_strides=strides(do),
        dk_strides=strides(dk),
    )
    return dqkv


def split_heads(dqkv, q, k):
    """The views dq, dk and dv of what `_backward` returns."""
    dq, dk, dv = dqkv.split([q.shape[2], k.shape[2], k.shape[2]], dim=2)
    return dq[:, k.shape[1] - q.shape[1] :], dk, dv


@_forward.register_fake
def _(q, k, v, window, scale):
    B, T_q, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T_q, dtype=torch.float32)


@_backward.register_fake
def _(do, q, k, v, o, lse, window, scale):
    return q.new_empty(k.shape[0], k.shape[1], q.shape[2] + 2 * k.shape[2], q.shape[3])


def _save(ctx, inputs, output):
    q, k, v, ctx.window, ctx.scale = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for lse
    ctx.save_for_backward(q, k, v, o, lse)


def _differentiate(ctx, do, _):
    q, k, v, o, lse = ctx.saved_tensors  # read once: under activation checkpointing a second access is an error
    return *split_heads(_backward(do, q, k, v, o, lse, ctx.window, ctx.scale), q, k), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def flash_attention(q, k, v, window=0, scale=None):
    """Causal attention, differentiable, in O(T) memory and, with a window, O(T * window) time.

    q:      (B, T_q, H, D), bfloat16, float16 or float32, on the current NVIDIA GPU (or the CPU under TRITON_INTERPRET=1)
    k, v:   (B, T_k, H_kv, D), T_k >= T_q: the queries are the last T_q positions; H a multiple of H_kv
    window: visible keys a query, itself included; 0 means all
    scale:  of the scores, above 0; 1 / sqrt(D) when None

    Returns (B, T_q, H, D) in q's dtype. Views of a fused projection are read in place. Wrong arguments raise a
    ValueError. Source: Dao 2023, FlashAttention-2, algorithms 1 and 2; definition: `kernels.reference.attention`.
    """
    check(q, k, v, window, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _forward(q, k, v, window if window < k.shape[1] else 0, scale)[0]


def check(q, k, v, window, scale):
    def takes(holds, name, value, what):
        require(holds, f"flash_attention: {name}", value, what)

    require_computable("flash_attention", "q", q, 4, "(B, T, heads, D)")
    B, T_q, H, D = q.shape
    for name, x in (("k", k), ("v", v)):
        takes(x.dim() == 4 and x.numel() > 0, f"{name}.shape", tuple(x.shape), "4 dimensions (B, T, heads, D), none of them 0")
        takes(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"q's {q.dtype}")
        takes(x.device == q.device, f"{name}.device", x.device, f"q's {q.device}")
    takes(k.shape[0] == B and k.shape[3] == D, "k.shape", tuple(k.shape), f"q's B={B} and D={D}")
    takes(k.shape[1] >= T_q, "k.shape[1]", k.shape[1], f"at least q's {T_q} tokens")
    takes(H % k.shape[2] == 0, "k.shape[2]", k.shape[2], f"a number of heads that divides q's {H}")
    takes(v.shape == k.shape, "v.shape", tuple(v.shape), f"k's shape {tuple(k.shape)}")
    require_numbers("flash_attention", window, scale)
