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


def write_pages(k, v, k_pages, v_pages, slot_mapping):
    """Store K and V of N tokens in the slots of the pages that were chosen for them.

    k, v:             (N, H_kv, D)
    k_pages, v_pages: (num_pages, page_size, H_kv, D), written in place
    slot_mapping:     (N,) page * page_size + offset of each token; below 0 a token is left out
    """
    kept = slot_mapping >= 0
    k_pages.flatten(0, 1)[slot_mapping[kept]] = k[kept]  # a view: pages are contiguous
    v_pages.flatten(0, 1)[slot_mapping[kept]] = v[kept]


def paged_attention(
    q, k_pages, v_pages, page_table, seq_lens, cu_seqlens, window=0, scale=None, *, max_query_len=None, max_seq_len=None
):
    """Causal attention of a packed batch of sequences whose K and V lie in pages, one sequence after the other.

    q:                (N, H, D), the query tokens of all sequences in a row; those of sequence i are the rows
                      cu_seqlens[i] up to cu_seqlens[i + 1], and they are its last positions
    k_pages, v_pages: (num_pages, page_size, H_kv, D), K and V of the query tokens among them
    page_table:       (num_seqs, max_pages) int32: position p lies in page page_table[i, p // page_size % max_pages].
                      A row is a ring: with a window, a sequence may be longer than its pages are
    seq_lens:         (num_seqs,) int32 tokens of each sequence; one without any gives zeros
    cu_seqlens:       (num_seqs + 1,) int32 cumulative numbers of query tokens
    window, scale:    as for `attention`
    max_query_len, max_seq_len: bounds by which kernels for GPUs are chosen; not looked at here

    Returns (N, H, D). A slot that no query sees is never read: it may hold anything, NaN too.
    Source: PagedAttention, Kwon et al. 2023, section 4.1.
    """
    page_size, max_pages = k_pages.shape[1], page_table.shape[1]
    starts = cu_seqlens.tolist()
    out = torch.zeros_like(q)
    for i, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        if length > 0:
            first = max(0, length - len(q[rows]) - window + 1) if window else 0  # the first key that the first query sees
            positions = torch.arange(first, length, device=q.device)
            pages = page_table[i, positions // page_size % max_pages].long()
            k, v = (x[pages, positions % page_size] for x in (k_pages, v_pages))  # (T_k, H_kv, D)
            out[rows] = attention(q[None, rows], k[None], v[None], window, scale)[0]
    return out
