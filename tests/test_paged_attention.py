"""The paged kernels against the definition in float64. On the CPU they run in Triton's interpreter.

The tolerance is twice the error of the plain formula computed in the kernel's dtype. Uninitialised memory and every slot
that holds no visible token are filled with NaN, page ids are shuffled.
"""

import random

import pytest
import torch
from util import DEVICE, gpu, script

from kernels import paged_attention as kernels
from kernels import paged_sdpa, reference
from kernels.paged_attention import _paged, _write, paged_attention, write_pages
from kernels.paged_tiles import Tiles, choose_splits

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem(seq_lens, counts, H, H_kv, D, page_size=16, window=0, dtype=torch.float32, seed=0, ring=False):
    """Arguments of paged_attention. A slot holds NaN unless some query of its sequence sees it; columns of the page table
    that hold no such slot name a page of NaN. With `ring`, the table is as narrow as the window lets it be."""
    generator = torch.Generator().manual_seed(seed)
    first = [max(0, n - count - window + 1) if window else 0 for n, count in zip(seq_lens, counts, strict=True)]
    # pages that are seen
    numbers = [range(a // page_size, -(-n // page_size)) for a, n in zip(first, seq_lens, strict=True)]
    max_pages = max(1, max(len(r) if ring else r.stop for r in numbers))
    num_pages = sum(map(len, numbers)) + 2
    ids = torch.randperm(num_pages, generator=generator).tolist()
    page_table = torch.full((len(seq_lens), max_pages), ids.pop(), dtype=torch.int32)
    k_pages = torch.full((num_pages, page_size, H_kv, D), torch.nan, dtype=dtype)
    v_pages = k_pages.clone()
    for i, (a, n) in enumerate(zip(first, seq_lens, strict=True)):
        for number in numbers[i]:
            page_table[i, number % max_pages] = ids.pop()
        positions = torch.arange(a, n)
        slots = page_table[i, positions // page_size % max_pages] * page_size + positions % page_size
        k, v = torch.randn(2, n - a, H_kv, D, generator=generator).to(dtype)
        reference.write_pages(k, v, k_pages, v_pages, slots)
    qkv = torch.randn(sum(counts), H + 2 * H_kv, D, generator=generator).to(dtype)  # q is a view of a fused projection
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0)
    tensors = (k_pages, v_pages, page_table, torch.tensor(seq_lens), cu_seqlens)
    tensors = [x.to(DEVICE) if x.is_floating_point() else x.to(DEVICE, torch.int32) for x in tensors]
    bounds = {"max_query_len": max(counts), "max_seq_len": max(seq_lens)}
    return (qkv.to(DEVICE)[:, :H], *tensors, window), bounds


def check(*problems):
    """The error is at most twice the plain formula's, over all problems together: over the few numbers of one small problem
    either can be exact by luck."""
    squares = [0.0, 0.0]
    for inputs, bounds in problems:
        truth = reference.paged_attention(
            *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)
        )
        o = paged_attention(*inputs, **bounds)
        assert o.dtype == inputs[0].dtype and o.shape == truth.shape
        squares[0] += (o.double() - truth).square().sum().item()
        squares[1] += (reference.paged_attention(*inputs).double() - truth).square().sum().item()
    ours, plain = (x**0.5 for x in squares)
    assert ours <= 2 * plain, f"error {ours:.3e}, the plain formula's {plain:.3e}"


HEADS = [(2, 2, 16), (4, 2, 24), (6, 2, 40), (5, 1, 64), (1, 1, 136)]  # H, H_kv, D
LENGTHS = [
    [1, 63, 64, 65, 111],
    [15, 16, 17, 0, 300],
]
CHUNKS = [  # lengths, query tokens of each
    ([63, 64, 65], [63, 64, 65]),
    ([111, 0, 150, 17, 1], [40, 1, 1, 17, 1]),  # a chunk of a prompt, padding, decoding, prompts
    ([300, 30, 80], [2, 0, 33]),  # a sequence that has no turn
]


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_decode_matches_the_definition(dtype, window, page_size):
    check(
        *(
            problem(n, [1] * len(n), *HEADS[i + j], page_size, window, dtype)
            for i, n in enumerate(LENGTHS)
            for j in (0, 2)
        )
    )


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_prefill_matches_the_definition(dtype, window, page_size):
    check(*(problem(*chunk, *heads, page_size, window, dtype) for chunk, heads in zip(CHUNKS, HEADS[1:], strict=False)))


@pytest.mark.parametrize("page_size", [1, 24, 48])
@pytest.mark.parametrize("counts", [[1, 1], [30, 1]])
def test_any_page_size(counts, page_size):
    check(*(problem([150, 49], counts, 4, 2, 16, page_size, window) for window in (0, 33)))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("counts", [[1] * 4, [37, 1, 5, 1]])
@pytest.mark.parametrize("window", [1, 16, 17, 70])
def test_ring_of_pages(window, counts, page_size):
    """Sequences longer than their table is wide: what a column held before is gone."""
    inputs, bounds = given = problem([1000, 333, 128, 64], counts, 2, 1, 16, page_size, window, ring=True)
    assert inputs[3].shape[1] * page_size < 1000
    check(given)
    torch.testing.assert_close(
        paged_sdpa.paged_attention(*inputs, **bounds), reference.paged_attention(*inputs, **bounds)
    )


@pytest.mark.parametrize("counts", [[1, 1, 1], [5, 1, 20]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_window_of_one_gives_back_v(dtype, counts):
    seq_lens = [65, 16, 20]
    inputs, bounds = problem(seq_lens, counts, 3, 3, 24, window=1, dtype=dtype)
    _, _, v_pages, page_table, *_ = inputs
    last = [(i, n - count + j) for i, (n, count) in enumerate(zip(seq_lens, counts, strict=True)) for j in range(count)]
    v = torch.stack([v_pages[page_table[i, p // 16], p % 16] for i, p in last])
    assert torch.equal(paged_attention(*inputs, **bounds), v)


@pytest.mark.parametrize("count", [1, 33])
def test_a_window_of_all_keys_is_no_window(count):
    inputs, bounds = problem([150], [count], 4, 2, 16)
    torch.testing.assert_close(paged_attention(*inputs[:-1], 150, **bounds), paged_attention(*inputs, **bounds))


def test_decode_is_prefill_of_one_token():
    inputs, bounds = problem([1, 64, 200, 0], [1] * 4, 6, 2, 32, window=90)
    as_prefill = paged_attention(*inputs, **{**bounds, "max_query_len": 2})
    torch.testing.assert_close(paged_attention(*inputs, **bounds), as_prefill)


@pytest.mark.parametrize("count", [1, 2])
def test_empty_sequences_give_zeros_and_read_nothing(count):
    inputs, bounds = problem([0, 0], [count, 1], 2, 1, 16)
    inputs[3].fill_(2**30)  # an address far outside
    assert torch.equal(paged_attention(*inputs, **bounds), torch.zeros_like(inputs[0]))


@pytest.mark.parametrize("splits", [1, 2, 3, 30])
def test_every_number_of_splits(splits, monkeypatch):
    monkeypatch.setattr(kernels, "choose_splits", lambda *_: (splits, 1))
    check(*(problem([1, 64, 65, 0, 300], [1] * 5, 4, 2, 16, page, window) for page, window in ((16, 0), (64, 100))))
    assert not kernels.counters(torch.zeros(0, device=DEVICE).device).any()  # ready for the next launch


@pytest.mark.parametrize("max_seq_len", [1, 300, 100_000])
def test_a_wrong_bound_costs_time_but_not_rightness(max_seq_len):
    inputs, _ = problem([1, 300, 70], [1] * 3, 2, 1, 16)
    check((inputs, {"max_query_len": 1, "max_seq_len": max_seq_len}))


def test_splits_fill_the_chip_and_stay_long_enough():
    tiles = Tiles(16, 64, 4, 5, 16)

    def splits(units, max_keys):
        return choose_splits(units, 4, max_keys, tiles, 132)[0]

    assert splits(8, 32_768) == 16  # a long sequence alone
    assert splits(1, 32_768) == 132  # a program for each multiprocessor
    assert splits(12, 1024) == 8  # 128 keys each
    assert splits(12, 100) == 1
    assert splits(2**15, 10**6) == 1  # more pairs than counters
    assert splits(2**13, 2**17) == 32  # no program walks for ever
    for batch in range(2, 257):
        assert batch * 8 * splits(batch * 8, 8192) >= min(batch * 8 * 16, 132 * 16)


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(sign, count, monkeypatch):
    """A thousand above or below it: no exponential may overflow, nor all of a row vanish."""
    monkeypatch.setattr(kernels, "choose_splits", lambda *_: (3, 1))
    problems = []
    for seed in range(6):
        (q, k_pages, *rest), bounds = problem([300, 40], [count] * 2, 2, 1, 16, seed=seed)
        problems.append(((sign * 400 * q.abs(), k_pages.abs(), *rest), bounds))
    check(*problems)


@pytest.mark.parametrize("count", [1, 40])
def test_two_runs_give_the_same_bits(count, monkeypatch):
    monkeypatch.setattr(kernels, "choose_splits", lambda *_: (3, 1))
    inputs, bounds = problem([300, 111], [count] * 2, 4, 1, 16)
    assert torch.equal(paged_attention(*inputs, **bounds), paged_attention(*inputs, **bounds))


@pytest.mark.parametrize("count", [1, 20])
def test_many_heads_share_keys(count):
    check(*(problem([40, 70], [count] * 2, H, 1, 16) for H in (17, 128)))


@pytest.mark.parametrize("count", [1, 20])
def test_views_of_any_layout(count):
    (q, *inputs), bounds = problem([40, 70], [count] * 2, 4, 2, 24)
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    misaligned = torch.cat([q[..., :3], q], dim=2)[..., 3:]
    backwards = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide_table = torch.cat([inputs[2]] * 2, dim=1)[:, : inputs[2].shape[1]]
    expected = paged_attention(q, *inputs, **bounds)
    for x in (heads_first, misaligned, backwards):
        assert torch.equal(paged_attention(x, *inputs, **bounds), expected)
    inputs[2] = wide_table
    assert torch.equal(paged_attention(q, *inputs, **bounds), expected)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("H_kv, D", [(1, 16), (3, 24), (12, 64)])
def test_write_pages(H_kv, D, integers):
    """As the definition writes them, from views of a fused projection; a slot below 0 is left out."""
    qkv = torch.randn(6, 3 * H_kv, D, device=DEVICE)
    _, k, v = qkv.split(H_kv, dim=1)
    slots = torch.tensor([37, -1, 0, 31, 16, -1], dtype=integers, device=DEVICE)
    ours, truth = (tuple(torch.zeros(2, 3, 16, H_kv, D, device=DEVICE)) for _ in range(2))
    write_pages(k, v, *ours, slots)
    reference.write_pages(k, v, *truth, slots)
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert (ours[0] != 0).sum() == 4 * H_kv * D


def test_write_pages_takes_other_views():
    k, v = torch.randn(2, 2, 5, 16, device=DEVICE).transpose(1, 2)  # heads first
    k = torch.cat([k[..., :1], k], dim=2)[..., 1:]  # not at 16 bytes
    k_pages, v_pages = torch.zeros(2, 1, 16, 2, 16, device=DEVICE)
    write_pages(k, v, k_pages, v_pages, torch.arange(5, device=DEVICE))
    assert torch.equal(k_pages[0, :5], k) and torch.equal(v_pages[0, :5], v)


def test_compiles_into_one_graph():
    inputs, bounds = problem([40, 70], [1, 1], 4, 2, 16)
    torch.use_deterministic_algorithms(False)
    k, v = torch.randn(2, 2, 2, 16, device=DEVICE)
    slots = torch.tensor([3, -1], device=DEVICE)

    def step(q, k_pages, v_pages, *rest):
        write_pages(k, v, k_pages, v_pages, slots)
        return paged_attention(q * 2, k_pages, v_pages, *rest, **bounds)

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    mine, theirs = ([x.clone() if torch.is_tensor(x) else x for x in inputs] for _ in range(2))
    assert torch.equal(compiled(*mine), step(*theirs))
    assert torch.equal(mine[1].nan_to_num(), theirs[1].nan_to_num()) and torch.equal(mine[1].view(-1, 2, 16)[3], k[0])


def test_opcheck():
    torch.use_deterministic_algorithms(False)
    inputs, bounds = problem([20, 7], [1, 1], 4, 2, 16)
    inputs[1].nan_to_num_(), inputs[2].nan_to_num_()  # NaN is not equal to itself
    torch.library.opcheck(_paged, (*inputs, 0.25, *bounds.values()))
    k, v = torch.randn(2, 2, 2, 16, device=DEVICE)
    torch.library.opcheck(_write, (k, v, inputs[1], inputs[2], torch.tensor([3, -1], device=DEVICE)))


GIVEN = {
    "q": torch.zeros(2, 4, 32),
    "k_pages": torch.zeros(3, 16, 2, 32),
    "v_pages": torch.zeros(3, 16, 2, 32),
    "page_table": torch.zeros(2, 2, dtype=torch.int32),
    "seq_lens": torch.zeros(2, dtype=torch.int32),
    "cu_seqlens": torch.zeros(3, dtype=torch.int32),
    "max_query_len": 1,
    "max_seq_len": 5,
}


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q.shape", {"q": torch.zeros(2, 32)}),
        ("q.shape[0]", {"q": torch.zeros(3, 4, 32)}),
        ("q.shape[1]", {"q": torch.zeros(2, 3, 32)}),
        ("q.shape[1]", {"q": torch.zeros(2, 258, 32)}),
        ("q.shape[2]", {"q": torch.zeros(2, 4, 20)}),
        ("q.dtype", {"q": torch.zeros(2, 4, 32, dtype=torch.float64)}),
        ("v_pages", {"v_pages": torch.zeros(3, 16, 2, 32, device="meta")}),
        ("k_pages.shape", {"k_pages": torch.zeros(3, 16, 2, 64)}),
        ("k_pages.shape", {"k_pages": torch.zeros(3, 0, 2, 32)}),
        ("k_pages", {"k_pages": torch.zeros(3, 2, 16, 32).transpose(1, 2)}),
        ("v_pages.shape", {"v_pages": torch.zeros(3, 16, 1, 32)}),
        ("v_pages", {"v_pages": torch.zeros(3, 16, 2, 32, dtype=torch.float16)}),
        ("page_table", {"page_table": torch.zeros(2, 2)}),
        ("page_table", {"page_table": torch.zeros(2, dtype=torch.int32)}),
        ("page_table", {"page_table": torch.zeros(2, 2, dtype=torch.int32).t()}),
        ("seq_lens", {"seq_lens": torch.zeros(3, dtype=torch.int32)}),
        ("seq_lens", {"seq_lens": torch.zeros(2, dtype=torch.int32, device="meta")}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(3, dtype=torch.int64)}),
        ("window", {"window": -1}),
        ("scale", {"scale": 0.0}),
        ("max_query_len", {"max_query_len": 0}),
        ("max_seq_len", {"max_seq_len": -1}),
    ],
)
def test_wrong_arguments_are_named(argument, change):
    arguments = {n: x.to(DEVICE) if torch.is_tensor(x) and not x.is_meta else x for n, x in (GIVEN | change).items()}
    with pytest.raises(ValueError) as error:
        paged_attention(**arguments)
    assert str(error.value).startswith(f"paged_attention: {argument} is ") and "; it takes " in str(error.value)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("k.shape", {"k": torch.zeros(2, 3, 32)}),
        ("v", {"v": torch.zeros(2, 1, 32)}),
        ("v", {"v": torch.zeros(2, 2, 32, dtype=torch.float16)}),
        ("slot_mapping", {"slot_mapping": torch.zeros(2)}),
        ("slot_mapping", {"slot_mapping": torch.zeros(3, dtype=torch.int64)}),
        ("k_pages", {"k_pages": torch.zeros(3, 16, 2, 32, dtype=torch.float16)}),
        ("slot_mapping", {"slot_mapping": torch.zeros(4, dtype=torch.int64)[::2]}),
    ],
)
def test_wrong_arguments_of_write_pages_are_named(argument, change):
    given = {"k": torch.zeros(2, 2, 32), "v": torch.zeros(2, 2, 32), "slot_mapping": torch.zeros(2, dtype=torch.int64)}
    given |= {name: GIVEN[name] for name in ("k_pages", "v_pages")}
    with pytest.raises(ValueError) as error:
        write_pages(**{n: x.to(DEVICE) for n, x in (given | change).items()})
    assert str(error.value).startswith(f"write_pages: {argument} is ") and "; it takes " in str(error.value)


@pytest.mark.parametrize("architecture", ["ampere", "hopper"])
def test_compiles_ahead_of_time(architecture, tmp_path):
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script("tests/ahead_of_time.py", "paged", architecture, env=env, timeout=300)


@gpu
@pytest.mark.parametrize("seed", range(50))
def test_random_cases(seed):
    """500 draws over everything: for each seed one set of kernels, so that not all time goes into compiling."""
    draw = random.Random(seed)
    D = draw.choice([16, 32, 64, 64, 80, 96, 128, 128, 256, 8 * draw.randint(2, 32)])
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    window = draw.choice([0, 0, 2, 17, 64, 65, draw.randint(2, 700)])
    group, H_kv = draw.choice([1, 1, 2, 3, 4, 8, 32]), draw.choice([1, 2])
    page_size = draw.choice([16, 16, 32, 64, 128, 256, 48])
    problems = []
    for case in range(10):
        num_seqs = draw.choice([1, 2, 5, 20])
        seq_lens = [draw.choice([0, 1, 15, 16, 17, 63, 64, 65, draw.randint(1, 2000)]) for _ in range(num_seqs)]
        counts = [draw.choice([1, 1, min(n, draw.randint(1, 200)) or 1]) if case % 2 else 1 for n in seq_lens]
        ring = window > 0 and draw.random() < 0.5
        problems.append(problem(seq_lens, counts, H_kv * group, H_kv, D, page_size, window, dtype, case, ring))
    check(*problems)


@gpu
@pytest.mark.parametrize("H_kv", [1, 8, 32])
@pytest.mark.parametrize("window", [0, 1000])
def test_the_same_bits_a_hundred_times(H_kv, window):
    """Whoever of the splits comes last, the sum is taken in one order."""
    torch.use_deterministic_algorithms(False)
    given = problem([8000, 5000, 1, 3000], [1] * 4, 32, H_kv, 128, 64, window, torch.bfloat16)
    check(given)
    inputs, bounds = given
    first = paged_attention(*inputs, **bounds)
    runs = [paged_attention(*inputs, **bounds) for _ in range(100)]
    assert all(torch.equal(first, run) for run in runs)


@gpu
def test_captured_in_a_cuda_graph():
    """One graph serves other lengths, pages, slots and queries than those that it was captured with."""
    torch.use_deterministic_algorithms(False)
    bounds = {"max_query_len": 1, "max_seq_len": 4096}
    cases = [
        problem(n, [1] * 4, 12, 4, 64, 16, dtype=torch.bfloat16, seed=i)[0]
        for i, n in enumerate(([1, 1, 1, 1], [700, 3, 0, 64]))
    ]
    shapes = [max(a.shape[0] for a in pair) for pair in zip(*(c[:6] for c in cases), strict=True)]
    static = [
        torch.zeros(n, *x.shape[1:], dtype=x.dtype, device="cuda") for n, x in zip(shapes, cases[0], strict=False)
    ]
    static[3] = torch.zeros(4, 64, dtype=torch.int32, device="cuda")
    k, v = torch.randn(2, 4, 4, 64, device="cuda", dtype=torch.bfloat16)
    slots = torch.full((4,), -1, device="cuda")

    def step():
        write_pages(k, v, static[1], static[2], slots)
        return paged_attention(*static, **bounds)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for inputs in cases:
        for to, x in zip(static, inputs, strict=False):
            (to[:, : x.shape[1]] if x.dim() == 2 else to[: x.shape[0]]).copy_(x)
        last = (inputs[4] - 1).clamp(min=0)
        page = inputs[3].gather(1, (last // 16)[:, None].long())[:, 0]
        slots.copy_(torch.where(inputs[4] > 0, page * 16 + last % 16, -1))
        graph.replay()
        torch.testing.assert_close(out, paged_attention(*static, **bounds), rtol=0, atol=0)
        expected = reference.paged_attention(*(x.float() if x.is_floating_point() else x for x in static))
        torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


@gpu
def test_pools_beyond_32_bits():
    torch.use_deterministic_algorithms(False)
    pages = torch.zeros(2, 140_000, 16, 16, 64, device="cuda", dtype=torch.bfloat16)  # 2.3e9 elements each
    (q, k, v, table, *rest), bounds = problem([100, 40], [1, 1], 32, 16, 64, dtype=torch.bfloat16)
    shift = pages.shape[1] - len(k)
    pages[0, shift:], pages[1, shift:] = k, v
    for bounds["max_query_len"] in (1, 2):  # decoding and prefilling
        near = paged_attention(q, k, v, table, *rest, **bounds)
        assert torch.equal(paged_attention(q, *pages, table + shift, *rest, **bounds), near)
    tokens = torch.randn(1, 16, 64, device="cuda", dtype=torch.bfloat16)
    write_pages(tokens, tokens, *pages, torch.tensor([pages.shape[1] * 16 - 1], device="cuda"))
    assert torch.equal(pages[:, -1, -1], tokens.expand(2, -1, -1))
