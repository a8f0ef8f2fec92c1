"""Drawing tokens, on any device, in operations that a CUDA graph can hold.

    logits -> / temperature -> what top_k, top_p and min_p let in -> cumulative distribution -> the token at u

One uniform number a token decides, and it depends on nothing but the sequence's seed and how many tokens it has
generated: neither neighbours nor preemption can change a draw.

No value is read by the host, and no shape depends on one. What the host knows about a step's requests (a `Style`)
chooses the operations: none but argmax when all are greedy, no sorting when nobody has top_k or top_p.
"""

from typing import NamedTuple

import numpy as np
import torch

WIDTHS = (64, 1024)  # numbers of logits that top_k and top_p may sort; beyond, and for top_p alone, all of them
CHUNK = 512  # tokens whose probabilities are first added up, then searched; two short searches instead of a long one
ALTERNATIVES = 20  # most log-probabilities beside that of the drawn token
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # by which SplitMix64 goes on: 2^64 / the golden ratio


class Style(NamedTuple):
    """What some request of a step wants done, so that it must be done for all rows."""

    draws: bool = False  # a temperature above 0
    width: int = 0  # logits in order that top_k and top_p need; 0: none
    logprobs: int | None = None  # of drawn tokens, and of so many likeliest ones: 0 or ALTERNATIVES, so that shapes are few


class Limits(NamedTuple):
    """How each row draws, (n,) tensors of the numbers in `Request`, and its number in [0, 1)."""

    temperature: torch.Tensor
    top_k: torch.Tensor  # int32; the others are float32
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor


def style_of(requests, vocab_size):
    width = 0
    for r in requests:
        if r.temperature and (r.top_k or r.top_p < 1):
            width = max(width, min(r.top_k or vocab_size, vocab_size))
    if width:
        width = min(next((w for w in WIDTHS if w >= width), vocab_size), vocab_size)
    asked = [r.logprobs for r in requests if r.logprobs is not None]
    return Style(any(r.temperature for r in requests), width, (ALTERNATIVES if any(asked) else 0) if asked else None)


def states_of(seeds):
    """Where the numbers of each seed begin: at a hash of it, so that no seed's numbers are another's from some index on."""
    return mixed(np.array([int(seed) % 2**64 for seed in seeds], dtype=np.uint64))


def uniform(states, indices):
    """Numbers in [0, 1), hashes of (state, index): uint64 arrays (n,) to float32 (n,). They have 23 bits, so that
    u * x < x in float32 for every x > 0.

    Number `index` of SplitMix64 (Steele et al. 2014), begun at `states_of` a seed. On the host, for all rows at once:
    uint64 wraps around, as it is meant to.
    """
    hashes = mixed(states + (indices + np.uint64(1)) * GOLDEN)
    return (hashes >> np.uint64(41)).astype(np.float32) / np.float32(2**23)


def mixed(x):
    """The output function of SplitMix64: any bit of x changes about half of the bits."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def draw(logits, limits, style):
    """Draw one token a row: (n, vocab) logits to (n,) ids, -1 where a logit is NaN or the highest one is infinite.

    Tokens exactly as likely as the last one that top_k or top_p lets in are let in too. min_p (Nguyen et al. 2024)
    lets in what is at least min_p times as likely as the likeliest token.
    """
    highest, greedy = logits.max(dim=-1)  # NaN counts as the highest
    broken = (highest - highest).isnan()  # inf - inf is NaN; so is 0 * inf, but compilers make 0 of it
    if not style.draws:
        return greedy.masked_fill_(broken, -1)
    temperature, min_p = limits.temperature[:, None], limits.min_p[:, None]
    logits = logits.float() / temperature.clamp(min=1e-6)  # below that it is as good as greedy, and would overflow
    highest = logits.amax(dim=-1, keepdim=True)
    least = highest + min_p.log()  # -inf without a limit
    if style.width:
        least = least.maximum(least_logit(logits, limits.top_k[:, None], limits.top_p[:, None], style.width))
    weights = (logits - highest).exp().masked_fill(logits < least, 0.0)  # probabilities, not yet divided by their sum
    ids = torch.where(limits.temperature == 0, greedy, invert_cdf(weights, limits.uniform[:, None]))
    return ids.masked_fill_(broken, -1)


def least_logit(logits, top_k, top_p, width):
    """The smallest logit let in by top_k, and by top_p of what top_k leaves: (n, vocab) to (n, 1), -inf without limits.

    Source of top_p: Holtzman et al. 2020, section 3.1.
    """
    best = logits.topk(width).values  # (n, width), descending
    limited = (top_k > 0) | (top_p < 1)
    outside = (top_k > 0) & (torch.arange(width, device=logits.device) >= top_k)
    weights = (best - best[:, :1]).exp().masked_fill(outside, 0.0)
    mass = weights.cumsum(dim=-1)  # in order, so that what lies behind top_k changes no rounding
    kept = ~outside & (mass - weights < top_p * mass[:, -1:])  # those before are not yet top_p
    least = best.gather(1, (kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
    return least.masked_fill(~limited, float("-inf"))


def invert_cdf(weights, u):
    """The first token of each row whose cumulative share is above u: (n, vocab) and (n, 1) to (n,).

    The clamps matter to rows with NaN: their ids mean nothing, but they are ids.
    """
    n, vocab = weights.shape
    chunks = torch.nn.functional.pad(weights, (0, -vocab % CHUNK)).view(n, -1, CHUNK)
    ends = chunks.sum(dim=-1).cumsum(dim=-1)
    target = u * ends[:, -1:]  # below the total, by how u is made
    chunk = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)  # (n, 1)
    start = ends.gather(1, (chunk - 1).clamp(min=0)).masked_fill(chunk == 0, 0.0)
    cdf = chunks.gather(1, chunk[..., None].expand(-1, -1, CHUNK))[:, 0].cumsum(dim=-1)
    inside = torch.searchsorted(cdf, target - start, right=True)
    # summed in order, the chunk may end below its sum by a rounding: then its last token with any weight is meant
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())
    return (chunk * CHUNK + inside.minimum(last))[:, 0].clamp(max=vocab - 1)


def logprobs(logits, ids, alternatives):
    """Natural log-probabilities by the model itself, whatever the temperature and limits: of the drawn ids (n,), and
    those of the likeliest tokens with their ids, (n, alternatives) each, or fewer in a smaller vocabulary."""
    logits = logits.float().log_softmax(dim=-1)
    best = logits.topk(min(alternatives, logits.shape[1]))
    return logits.gather(1, ids[:, None])[:, 0], best.values, best.indices
