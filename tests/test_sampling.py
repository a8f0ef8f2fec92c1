"""Drawing against plain arithmetic: shares, limits, rows that do not see each other."""

import math

import numpy as np
import pytest
import torch

from engine import Request
from sampling import GOLDEN, Limits, draw, invert_cdf, logprobs, mixed, states_of, style_of, uniform

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0, 2.0, -math.inf, 1.5])


def drawn(logits, requests, uniforms):
    temperature, top_p, min_p = (
        torch.tensor([getattr(r, k) for r in requests]) for k in ("temperature", "top_p", "min_p")
    )
    top_k = torch.tensor([r.top_k for r in requests], dtype=torch.int32)
    limits = Limits(temperature.float(), top_k, top_p.float(), min_p.float(), torch.tensor(uniforms))
    return draw(logits, limits, style_of(requests, logits.shape[1]))


def shares(n=4000, **style):
    """How often each token is drawn when u runs over the unit interval in equal steps."""
    tokens = drawn(LOGITS.expand(n, -1), [Request([0], 1, **style)] * n, [(i + 0.5) / n for i in range(n)])
    return torch.bincount(tokens, minlength=len(LOGITS)) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.7, 1.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_k, top_p, min_p):
    weights = [math.exp(logit / temperature) for logit in LOGITS.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    kept, mass = [], 0.0
    for i in order:  # the fewest that reach top_p of what top_k leaves
        if mass < top_p * sum(weights[j] for j in order) and weights[i] >= min_p * max(weights):
            kept.append(i)
        mass += weights[i]
    want = [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(weights))]
    got = shares(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=2 / 4000)


STYLES = [
    {},
    {"top_k": 2},
    {"top_p": 0.5},
    {"top_k": 3, "top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 0.0},
    {"temperature": 0.0, "top_k": 5, "min_p": 0.9},
    {"temperature": 9.0},
]


def test_rows_of_a_batch_keep_their_own_limits():
    requests = [Request([0], 1, **{"temperature": 1.0, **style}) for style in STYLES]
    for u in torch.linspace(0, 0.999, 50).tolist():
        together = drawn(LOGITS.expand(len(requests), -1), requests, [u] * len(requests)).tolist()
        assert together == [drawn(LOGITS[None], [request], [u]).item() for request in requests]


@pytest.mark.parametrize("vocab", [511, 512, 513, 3000])
def test_a_large_vocabulary_is_searched_to_its_ends(vocab):
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(0)) * 3
    numbers = numbers_of([0], range(64))[0].tolist()
    numbers[:2] = 0.0, 1 - 2**-23
    requests = [Request([0], 1, temperature=1.0)] * 64
    got = drawn(logits, requests, numbers)
    cdf = logits.double().softmax(dim=-1).cumsum(dim=-1)
    before = torch.cat([torch.zeros(64, 1), cdf], dim=1).gather(1, got[:, None])[:, 0]
    after, u = cdf.gather(1, got[:, None])[:, 0], torch.tensor(numbers)
    assert (before - 1e-6 <= u).all() and (u <= after + 1e-6).all()
    assert got.max() < vocab and got.unique().numel() > 30
    limited = [Request([0], 1, temperature=1.0, **STYLES[i % len(STYLES)]) for i in (0, 1, 2, 3, 4)]
    assert drawn(logits[:5], limited, numbers[:5]).tolist() == [
        drawn(logits[i : i + 1], limited[i : i + 1], numbers[i : i + 1]).item() for i in range(5)
    ]


def test_rounding_never_draws_a_token_without_weight():
    """At the highest u, in rows whose sum comes out larger than their last cumulative one."""
    weights = torch.rand(20_000, 1000, generator=torch.Generator().manual_seed(0)) ** 8
    weights[:, 700:] = 0
    ids = invert_cdf(weights, torch.full((20_000, 1), 1 - 2**-23))
    assert (weights.gather(1, ids[:, None]) > 0).all()


def test_temperature_0_is_greedy_and_the_extremes_hold():
    for style in ({}, {"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.5}):
        assert shares(temperature=0.0, **style)[1] == 1
    assert shares(temperature=1e-30)[1] == 1
    logits = torch.cat([LOGITS, LOGITS * 1e20, LOGITS])[None]  # huge ones, and ends that top_k cuts off
    for temperature in (1e-30, 1.0, 1e30):
        for u in (0.0, 1 - 2**-23):
            assert drawn(logits, [Request([0], 1, temperature=temperature, top_k=3)], [u]).item() in (9, 11, 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("style", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_row_that_is_not_finite_draws_no_token_and_its_neighbours_theirs(style, temperature, dtype):
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    requests, numbers = [Request([0], 1, temperature=temperature, **style)] * 6, [0.0, 0.5, 0.9, 1 - 2**-23, 0.1, 0.6]
    logits[5, 3] = logits[0, 9] = -math.inf  # a token that cannot come is nothing wrong
    want = drawn(logits, requests, numbers)
    logits[1], logits[2], logits[3, 699], logits[4, 5] = math.nan, -math.inf, math.nan, math.inf
    want[1:5] = -1
    assert drawn(logits, requests, numbers).tolist() == want.tolist()


def test_only_as_much_is_sorted_as_somebody_needs():
    def style(*keys):
        return style_of([Request([0], 1, **one) for one in keys], vocab_size=5000)

    assert style({"top_k": 5}, {"top_p": 0.5}) == (False, 0, None)  # all greedy
    assert style({"temperature": 1.0, "min_p": 0.1}, {"top_k": 7}) == (True, 0, None)
    assert style({"temperature": 1.0, "top_k": 50, "top_p": 0.9}) == (True, 64, None)
    assert style({"temperature": 1.0, "top_k": 65}, {}) == (True, 1024, None)
    for keys in ({"top_k": 1025}, {"top_p": 0.9}):
        assert style({"temperature": 1.0, **keys}) == (True, 5000, None)
    assert style({"logprobs": 0}, {}) == (False, 0, 0)
    assert style({}, {"logprobs": 0}, {"logprobs": 2}) == (False, 0, 20)


def test_the_highest_uniform_never_reaches_the_total():
    highest = torch.tensor(1 - 2**-23)
    totals = torch.cat([torch.linspace(0.9, 2.1, 100_001), torch.tensor([1.0, 1 + 2**-23, 1 - 2**-24, 2 - 2**-23])])
    assert (highest * totals < totals).all()


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_index():
    numbers = numbers_of(range(-100, 100), range(200))
    assert numbers.min() >= 0 and numbers.max() < 1 and (numbers.double() * 2**23 % 1 == 0).all()
    counts = torch.histc(numbers, bins=64, min=0, max=1)
    expected = numbers.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 103.4  # chi-square, 63 degrees of freedom: 0.1%
    assert abs(torch.corrcoef(numbers[:, :2].T)[0, 1]) < 0.25 and abs(torch.corrcoef(numbers[:2])[0, 1]) < 0.25
    assert numbers.unique().numel() > 0.99 * numbers.numel()


def test_no_seed_continues_the_numbers_of_another():
    """SplitMix64 adds the same number at each index: without a hash of the seed, a seed higher by that is one ahead."""
    for seed in (0, 1, 7, -3):
        ahead, behind = numbers_of([seed], range(1, 201)), numbers_of([seed + int(GOLDEN)], range(200))
        assert (ahead == behind).sum() < 3


def test_the_hashes_are_those_of_splitmix64():
    """Its first five outputs from the state 1234567."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states, indices = np.full(5, 1234567, dtype=np.uint64), np.arange(5, dtype=np.uint64)
    assert mixed(states + (indices + np.uint64(1)) * GOLDEN).tolist() == outputs
    assert uniform(states, indices).tolist() == [(output >> 41) / 2**23 for output in outputs]


def test_a_seed_of_numpy_gives_the_numbers_of_its_value():
    for seed in (3, -3):
        assert (states_of([np.int64(seed), np.int8(seed)]) == states_of([seed, seed])).all()


def numbers_of(seeds, indices):
    """(number of seeds, number of indices)"""
    indices = np.array(indices, dtype=np.uint64)
    return torch.from_numpy(np.stack([uniform(state, indices) for state in states_of(seeds)]))


def test_log_probabilities_are_those_of_the_model():
    logits = LOGITS.expand(2, -1)
    chosen, best, ids = logprobs(logits, torch.tensor([3, 2]), 20)
    want = LOGITS.double().softmax(dim=0).log()
    torch.testing.assert_close(chosen.double(), want[[3, 2]])
    assert ids[0, :4].tolist() == [1, 3, 5, 7] and best.shape == (2, 8)
    torch.testing.assert_close(best[1, :4].double(), want[[1, 3, 5, 7]])
