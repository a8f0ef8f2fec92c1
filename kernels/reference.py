"""The definitions, in plain PyTorch. Every kernel is tested against these; nothing here is fast.

    out[t] = sum_s softmax_s(scale * q[t] . k[s]) v[s]        over the keys s that query t can see

Query t sees key s when 0 <= t - s, and with a window also t - s < window: a window counts visible keys, the
token itself included, so window=1 gives back v. window=0 means no limit.

Layout is (B, T, H, D) everywhere. Query head h reads KV head h // group, group = H // H_kv: K and V are never
repeated. The arithmetic is done in the inputs' dtype, so float64 inputs give the truth, and bfloat16 inputs give
the error that the plain formula has in bfloat16.
"""

import math

import torch


def visible(q_pos, k_pos, window):
    """Which keys each query sees: (..., T_q) and (..., T_k) positions to a bool mask (..., T_q, T_k)."""
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    mask = distance >= 0
    return mask & (distance < window) if window else mask


def attention(q, k, v, window=0, scale=None):
    """Causal attention by the formula, with the whole T_q x T_k score matrix in memory.

    q:      (B, T_q, H, D)
    k, v:   (B, T_k, H_kv, D), T_k >= T_q; the queries are the last T_q positions
    window: visible keys a query, itself included; 0 means all
    scale:  of the scores, 1 / sqrt(D) when None

    Returns (B, T_q, H, D) in the inputs' dtype. Source: Vaswani et al. 2017, section 3.2.1; grouped KV heads:
    Ainslie et al. 2023, section 2; windows: Beltagy et al. 2020, section 3.1.
    """
    T_q, D = q.shape[1], q.shape[3]
    T_k, H_kv = k.shape[1:3]
    scale = 1 / math.sqrt(D) if scale is None else scale
    q = q.unflatten(2, (H_kv, -1))  # (B, T_q, H_kv, group, D)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k) * scale
    k_pos = torch.arange(T_k, device=q.device)
    mask = visible(k_pos[T_k - T_q :], k_pos, window)
    probs = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhgqk,bkhd->bqhgd", probs, v).flatten(2, 3)
