"""Causal and sliding-window attention through torch's scaled_dot_product_attention: the fast path without Triton.

Plain causal attention is one call. A window is cut into chunks of queries, each with the few keys that the chunk can
see: time and memory grow with T * window. No mask is larger than a chunk's queries, of all heads of a group, times the
keys they see.
"""

import torch
import torch.nn.functional as F

from kernels.reference import visible


def attention(q, k, v, window=0, scale=None):
    """The same function as `reference.attention`: shapes and window are described there."""
    T_q, T_k = q.shape[1], k.shape[1]
    if T_q == T_k and (window == 0 or window >= T_k):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)
    chunk = min(max(window, 64), 512)
    k_pos = torch.arange(T_k, device=q.device)
    outs = []
    for start in range(T_k - T_q, T_k, chunk):
        stop = min(start + chunk, T_k)
        first = max(0, start - window + 1) if window else 0
        mask = visible(k_pos[start:stop], k_pos[first:stop], window)
        rows = slice(start - (T_k - T_q), stop - (T_k - T_q))
        outs.append(masked(q[:, rows], k[:, first:stop], v[:, first:stop], mask, scale))
    return torch.cat(outs, dim=1)


def masked(q, k, v, mask, scale):
    """Attention under a (T_q, T_k) mask. A group's query heads become rows of one head: not all of torch's backends
    take a mask together with grouped heads, and those that do not would repeat K and V."""
    T, H_kv = q.shape[1], k.shape[2]
    group = q.shape[2] // H_kv
    q = q.unflatten(2, (H_kv, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, H_kv, group * T, D)
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask.repeat(group, 1), scale=scale)
    return out.unflatten(2, (group, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)
