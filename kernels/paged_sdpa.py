"""Attention over a paged KV cache through torch's scaled_dot_product_attention: the fast path without Triton.

    page_table, positions -> slots -> K, V of the visible keys gathered into one batch -> one call for many sequences

Only slots of visible keys are gathered, so a window bounds the work, and what lies in unused slots does not matter.
Sequences that decode (one query token) go through in groups, each padded to its own longest; a group's K and V stay
below GATHER_BYTES, because they are read again at once: from the processor's cache if they are few, and from fresh
pages of memory, which the operating system must clear first, if they are many (16 sequences of 192 tokens, 12 heads
of 64, float32, 12 layers, AMD EPYC, 2 cores: 12 ms in groups of 4, 58 ms all at once).
"""

import torch
import torch.nn.functional as F

from kernels import sdpa

GATHER_BYTES = 4 * 2**20


def paged_attention(
    q, k_pages, v_pages, page_table, seq_lens, cu_seqlens, window=0, scale=None, *, max_query_len=None, max_seq_len=None
):
    """The same function as `reference.paged_attention`: shapes and meanings are described there."""
    starts, lengths = cu_seqlens.tolist(), seq_lens.tolist()
    row_bytes = 2 * k_pages[0, 0].numel() * k_pages.element_size()  # K and V of one token
    out = torch.zeros_like(q)
    i = 0
    while i < len(lengths):
        if lengths[i] == 0 or starts[i + 1] == starts[i]:
            j = i + 1  # an empty sequence, whose row stays 0, or one without a turn
        elif starts[i + 1] - starts[i] == 1:
            j = end_of_group(i, starts, lengths, window, GATHER_BYTES // row_bytes)
            rows = slice(starts[i], starts[j])
            out[rows] = decode(q[rows], k_pages, v_pages, page_table[i:j], lengths[i:j], window, scale)
        else:
            j = i + 1
            rows = slice(starts[i], starts[j])
            out[rows] = prefill(q[rows], k_pages, v_pages, page_table[i], lengths[i], window, scale)
        i = j
    return out


def end_of_group(first, starts, lengths, window, max_tokens):
    """One past the last of the decoding sequences, from `first` on, that fit into one gathered batch."""
    longest, stop = 0, first
    while stop < len(lengths) and starts[stop + 1] - starts[stop] == 1 and lengths[stop] > 0:
        longest = max(longest, visible_keys(lengths[stop], window))
        if stop > first and longest * (stop + 1 - first) > max_tokens:
            break
        stop += 1
    return stop


def visible_keys(length, window):
    """Keys that the last token of a sequence sees."""
    return min(length, window) if window else length


def decode(q, k_pages, v_pages, page_table, lengths, window, scale):
    """One query token a sequence: q (n, H, D), page_table (n, max_pages) to (n, H, D).

    The keys end together, at each sequence's last token: shorter sequences begin with padding.
    """
    visible = [visible_keys(length, window) for length in lengths]
    T = max(visible)
    last = torch.tensor(lengths, device=q.device)[:, None] - 1
    positions = last + torch.arange(1 - T, 1, device=q.device)  # (n, T), negative in the padding
    slots = slots_of(positions.clamp(min=0), page_table, k_pages.shape[1])  # the padding repeats the first token ...
    k, v = gather(k_pages, slots), gather(v_pages, slots)  # (n, T, H_kv, D)
    mask = None if min(visible) == T else (positions >= 0)[:, None, None]  # ... which the mask hides
    q = q.unflatten(1, (k.shape[2], -1))  # (n, H_kv, group, D): a group's heads are rows that share their keys
    return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale).flatten(1, 2)


def prefill(q, k_pages, v_pages, page_table, length, window, scale):
    """Many query tokens of one sequence, its last ones: q (T_q, H, D), page_table (max_pages,) to (T_q, H, D)."""
    first = max(0, length - len(q) - window + 1) if window else 0  # the first key that the first query sees
    positions = torch.arange(first, length, device=q.device)[None]
    slots = slots_of(positions, page_table[None], k_pages.shape[1])
    return sdpa.attention(q[None], gather(k_pages, slots), gather(v_pages, slots), window, scale)[0]


def slots_of(positions, page_table, page_size):
    """Where tokens lie: (n, T) positions and (n, max_pages) page ids, a ring, to (n, T) slots."""
    return page_table.gather(1, positions // page_size % page_table.shape[1]) * page_size + positions % page_size


def gather(pages, slots):
    """(num_pages, page_size, H_kv, D) and (n, T) slots to (n, T, H_kv, D)."""
    tokens = pages.flatten(0, 1).flatten(1)  # (slots, H_kv * D), a view; rows of one piece are copied fastest
    return tokens.index_select(0, slots.flatten()).view(*slots.shape, *pages.shape[2:])
