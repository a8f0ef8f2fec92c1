"""Attention in plain PyTorch: the definitions against loops over numbers, the fast paths against the definitions."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import paged_sdpa, reference, sdpa

PAGE = 16
LENGTHS = [1, 63, 64, 65, 111]
WINDOWS = [0, 1, 5, 64, 200]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(T_q, T_k, H, H_kv, D, B=2):
    return random(B, T_q, H, D, seed=1), random(B, T_k, H_kv, D, seed=2), random(B, T_k, H_kv, D, seed=3)


def loops(q, k, v, window):
    """The equation of kernels/reference.py, number by number."""
    (B, T_q, H, D), (T_k, H_kv) = q.shape, k.shape[1:3]
    out = torch.empty_like(q)
    for b in range(B):
        for t in range(T_q):
            for h in range(H):
                t_k, h_kv = t + T_k - T_q, h * H_kv // H
                seen = [s for s in range(T_k) if s <= t_k and (not window or t_k - s < window)]
                scores = [math.exp(sum((q[b, t, h] * k[b, s, h_kv]).tolist()) / math.sqrt(D)) for s in seen]
                out[b, t, h] = sum(score * v[b, s, h_kv] for score, s in zip(scores, seen)) / sum(scores)
    return out


def assert_as_good_as_the_formula(fast, truth, formula):
    """The only tolerance: the error against float64 is at most twice that of the formula in the same dtype."""
    assert torch.linalg.norm(fast.double() - truth) <= 2 * torch.linalg.norm(formula.double() - truth)


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("T_q", [1, 4, 7])
@pytest.mark.parametrize("H_kv", [1, 2, 4])
def test_definition_is_its_equation(window, T_q, H_kv):
    q, k, v = qkv(T_q, 7, 4, H_kv, 5)
    torch.testing.assert_close(reference.attention(q, k, v, window), loops(q, k, v, window))


@pytest.mark.parametrize("attention", [reference.attention, sdpa.attention])
@pytest.mark.parametrize("T", LENGTHS)
def test_a_window_of_one_gives_v(attention, T):
    q, k, v = qkv(T, T, 4, 4, 24)
    assert torch.equal(attention(q, k, v, window=1), v)


@pytest.mark.parametrize("attention", [reference.attention, sdpa.attention])
@pytest.mark.parametrize("T", LENGTHS)
def test_a_window_as_long_as_the_text_is_causal(attention, T):
    q, k, v = qkv(T, T, 4, 2, 24)
    torch.testing.assert_close(attention(q, k, v, window=T), attention(q, k, v, window=0))
    if T > 1:
        assert not torch.allclose(attention(q, k, v, window=T - 1), attention(q, k, v, window=0))


@pytest.mark.parametrize("attention", [reference.attention, sdpa.attention])
@pytest.mark.parametrize("window", WINDOWS)
def test_gqa_is_mha_with_repeated_heads(attention, window):
    q, k, v = qkv(65, 65, 6, 2, 24)
    k_all, v_all = k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2)
    torch.testing.assert_close(attention(q, k, v, window), attention(q, k_all, v_all, window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("T_q, T_k", [(T, T) for T in LENGTHS] + [(1, 65), (30, 111), (64, 65)])
def test_sdpa_is_the_definition(T_q, T_k, window, dtype):
    for H, H_kv, D in ((4, 4, 24), (6, 2, 40)):
        q, k, v = (x.to(dtype) for x in qkv(T_q, T_k, H, H_kv, D))
        truth = reference.attention(q.double(), k.double(), v.double(), window)
        out = sdpa.attention(q, k, v, window)
        assert out.dtype == dtype
        assert_as_good_as_the_formula(out, truth, reference.attention(q, k, v, window))


def test_scale_is_passed_on():
    q, k, v = qkv(9, 9, 2, 1, 8)
    want = reference.attention(q * 3, k, v, scale=0.1)
    for attention in (reference.attention, sdpa.attention):
        torch.testing.assert_close(attention(q, k, v, scale=0.3), want)
    packed = paged(seq_lens=[9, 9], counts=[9, 9], H=2, H_kv=1, D=8)
    for attention in (reference.paged_attention, paged_sdpa.paged_attention):
        torch.testing.assert_close(attention(**{**packed, "q": packed["q"] * 3}, scale=0.1), attention(**packed, scale=0.3))


# Over pages


def paged(seq_lens, counts, H, H_kv, D, dtype=torch.float64, seed=0):
    """Arguments of paged_attention: sequences in shuffled pages, NaN in all slots that hold no token."""
    generator = torch.Generator().manual_seed(seed)
    pages = [math.ceil(length / PAGE) for length in seq_lens]
    num_pages = sum(pages) + 3
    ids = torch.randperm(num_pages, generator=generator).tolist()
    k_pages = torch.full((num_pages, PAGE, H_kv, D), math.nan, dtype=dtype)
    v_pages = k_pages.clone()
    page_table = torch.full((len(seq_lens), max(pages)), ids.pop(), dtype=torch.int32)  # padding: a page of NaN
    for i, length in enumerate(seq_lens):
        for j in range(pages[i]):
            page_table[i, j] = ids.pop()
        slots = torch.tensor([page_table[i, p // PAGE] * PAGE + p % PAGE for p in range(length)])
        k, v = (torch.randn(length, H_kv, D, generator=generator, dtype=torch.float64).to(dtype) for _ in "kv")
        reference.write_pages(k, v, k_pages, v_pages, slots)
    return {
        "q": torch.randn(sum(counts), H, D, generator=generator, dtype=torch.float64).to(dtype),
        "k_pages": k_pages,
        "v_pages": v_pages,
        "page_table": page_table,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32),
    }


def test_write_pages_writes_its_slots_and_no_others():
    k_pages, v_pages = torch.zeros(3, PAGE, 2, 4), torch.zeros(3, PAGE, 2, 4)
    k, v = random(2, 2, 4, dtype=torch.float32), random(2, 2, 4, seed=1, dtype=torch.float32)
    reference.write_pages(k, v, k_pages, v_pages, torch.tensor([2 * PAGE + 5, 7]))
    assert torch.equal(k_pages[2, 5], k[0]) and torch.equal(v_pages[0, 7], v[1])
    assert (k_pages != 0).sum() == k.numel() and (v_pages != 0).sum() == v.numel()


@pytest.mark.parametrize("window", [0, 1, 7, 40])
def test_paged_definition_is_the_dense_one_of_each_sequence(window):
    seq_lens, counts = [PAGE - 1, PAGE, PAGE + 1, 50, 50], [1, PAGE, 3, 20, 1]
    given = paged(seq_lens, counts, H=4, H_kv=2, D=24)
    out = reference.paged_attention(**given, window=window)
    flat_k, flat_v = given["k_pages"].flatten(0, 1), given["v_pages"].flatten(0, 1)
    for i, (length, count, stop) in enumerate(zip(seq_lens, counts, given["cu_seqlens"][1:])):
        slots = [given["page_table"][i, p // PAGE] * PAGE + p % PAGE for p in range(length)]
        want = loops(given["q"][None, stop - count : stop], flat_k[None, slots], flat_v[None, slots], window)
        torch.testing.assert_close(out[stop - count : stop], want[0])


def test_write_pages_leaves_out_slots_below_0():
    pages = torch.zeros(2, 2, PAGE, 1, 4)
    k, v = random(3, 1, 4, dtype=torch.float32), random(3, 1, 4, seed=1, dtype=torch.float32)
    reference.write_pages(k, v, *pages, torch.tensor([-1, 3, -1]))
    assert torch.equal(pages[0, 0, 3], k[1]) and torch.equal(pages[1, 0, 3], v[1])
    assert (pages != 0).sum() == k[1].numel() + v[1].numel()


@pytest.mark.parametrize("attention", [reference.paged_attention, paged_sdpa.paged_attention])
@pytest.mark.parametrize("window", [1, PAGE, PAGE + 1, 40])
@pytest.mark.parametrize("counts", [[1, 1, 1], [7, 1, 20]])
def test_a_page_table_is_a_ring(attention, counts, window):
    """A table that is as narrow as the window allows holds what a table of all pages holds."""
    seq_lens = [200, 111, 20]
    given = paged(seq_lens, counts, H=4, H_kv=2, D=24)
    spans = [range(max(0, n - c - window + 1) // PAGE, -(-n // PAGE)) for n, c in zip(seq_lens, counts, strict=True)]
    ring = torch.full((3, max(len(span) for span in spans)), given["page_table"][2, -1].item(), dtype=torch.int32)
    for i, span in enumerate(spans):
        for number in span:
            ring[i, number % ring.shape[1]] = given["page_table"][i, number]
    assert ring.shape[1] * PAGE < 200
    want = reference.paged_attention(**given, window=window)
    torch.testing.assert_close(attention(**{**given, "page_table": ring}, window=window), want)


@pytest.mark.parametrize("attention", [reference.paged_attention, paged_sdpa.paged_attention])
@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 1, 2]])
def test_an_empty_sequence_gives_zeros_and_harms_no_other(attention, counts):
    given = paged([50, 1, 17], counts, H=4, H_kv=2, D=24)
    want = reference.paged_attention(**given)
    given["seq_lens"][1] = 0
    given["page_table"][1] = 10**6
    out = attention(**given, max_query_len=max(counts), max_seq_len=50)
    row = counts[0]
    assert not out[row].any()
    torch.testing.assert_close(out[:row], want[:row])
    torch.testing.assert_close(out[row + 1 :], want[row + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 1, 7, PAGE, 40])
@pytest.mark.parametrize(
    "seq_lens, counts",
    [
        ([1], [1]),
        ([PAGE - 1, PAGE, PAGE + 1, 1, 111], [1] * 5),
        ([65] * 4, [1] * 4),
        ([PAGE - 1, PAGE, PAGE + 1, 111, 64], [PAGE - 1, PAGE, PAGE + 1, 30, 1]),
        ([30, 5, 111, 2, 70], [1, 5, 1, 2, 1]),
        ([30, 5, 60, 111, 7], [2, 0, 0, 1, 0]),  # sequences that have no turn
    ],
)
def test_paged_sdpa_is_the_definition(seq_lens, counts, window, dtype, monkeypatch):
    for H, H_kv, D in ((4, 4, 24), (6, 2, 40), (4, 1, 24)):
        given = paged(seq_lens, counts, H, H_kv, D, dtype)
        in_double = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
        truth = reference.paged_attention(**in_double, window=window)
        formula = reference.paged_attention(**given, window=window)
        for gather_bytes in (1, 60_000, 2**22):  # one sequence at a time, a few, all
            monkeypatch.setattr(paged_sdpa, "GATHER_BYTES", gather_bytes)
            out = paged_sdpa.paged_attention(**given, window=window)
            assert out.dtype == dtype
            assert_as_good_as_the_formula(out, truth, formula)


def test_groups_stay_below_the_limit_and_cover_the_batch():
    starts, lengths = [0, 1, 2, 3, 13, 14], [10, 30, 20, 10, 90]  # the fourth sequence brings 10 tokens

    def group(first, window, max_tokens):
        return paged_sdpa.end_of_group(first, starts, lengths, window, max_tokens)

    assert group(0, window=0, max_tokens=90) == 3  # 3 x 30
    assert group(0, window=0, max_tokens=89) == 2
    assert group(0, window=5, max_tokens=15) == 3
    assert group(4, window=0, max_tokens=1) == 5  # a sequence that is too long alone still goes


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("H_kv", [1, 4])
@pytest.mark.parametrize("window", [0, 1, 100])
def test_sdpa_makes_no_tensor_larger_than_its_inputs_and_output(window, H_kv):
    """No T x T mask or score matrix: that would be 64 MiB here."""
    q, k, v = (random(1, 8192, H, 16, dtype=torch.float32) for H in (4, H_kv, H_kv))
    with Largest() as largest:
        sdpa.attention(q, k, v, window)
    assert q.nbytes <= largest.bytes <= 2 * q.nbytes
