"""FlashAttention against the definition in float64. On the CPU the kernels run in Triton's interpreter.

The tolerance is twice the error of the plain formula computed in the kernel's dtype. Uninitialised memory is filled
with NaN, so an element that no program writes is seen.
"""

import random
import shutil
import subprocess
import sys

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from util import DEVICE, environment, gpu, repository, script

from kernels import reference
from kernels.flash_attention import _backward, _forward, flash_attention
from kernels.flash_tiles import grid_of
from kernels.launch import kernel_layout

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(B, T_q, T_k, H, H_kv, D, dtype=torch.float32, layout="fused", seed=0):
    """q, k, v and the gradient of the output, the first three as a fused projection, other views or alone."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    if layout == "heads_first":
        q, k, v = (torch.randn(B, h, T_k, D, generator=random, device=DEVICE).to(dtype).transpose(1, 2) for h in (H, H_kv, H_kv))
    else:
        qkv = torch.randn(B, T_k, H + 2 * H_kv, D, generator=random, device=DEVICE).to(dtype)
        q, k, v = qkv.split([H, H_kv, H_kv], dim=2)
    q = q[:, T_k - T_q :]
    if layout == "contiguous":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return q, k, v, torch.randn(B, T_q, H, D, generator=random, device=DEVICE).to(dtype)


def gradients(attention, q, k, v, do, window, dtype=None):
    """The output and dq, dk, dv."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, window)
    return o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))


def formula(q, k, v, do, window):
    """o, dq, dk, dv by the equations at the top of the kernels' file, whole matrices at a time."""
    T_q, T_k, group, scale = q.shape[1], k.shape[1], q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k_pos = torch.arange(T_k, device=q.device)
    hidden = ~reference.visible(k_pos[T_k - T_q :], k_pos, window)
    q, do = (x.unflatten(2, (-1, group)) for x in (q, do))
    p = (torch.einsum("bqhgd,bkhd->bhgqk", q, k) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    o = torch.einsum("bhgqk,bkhd->bqhgd", p, v)
    delta = (o * do).sum(-1).permute(0, 2, 3, 1).unsqueeze(-1)
    ds = p * (torch.einsum("bqhgd,bkhd->bhgqk", do, v) - delta) * scale
    dq = torch.einsum("bhgqk,bkhd->bqhgd", ds, k).flatten(2, 3)
    dk, dv = torch.einsum("bhgqk,bqhgd->bkhd", ds, q), torch.einsum("bhgqk,bqhgd->bkhd", p, do)
    return o.flatten(2, 3), dq, dk, dv


def check(*problems):
    """The error of o, dq, dk and dv is at most twice the plain formula's, over all problems together: over the few
    numbers of one small problem either can be exact by luck.

    In float32 the plain formula takes delta from o and do, as the kernels do and every FlashAttention. Autograd takes
    it from p and dp, whose roundings cancel where a query sees one or two keys; float32 alone is fine enough to tell.
    """
    squares = {name: [0.0, 0.0] for name in ("o", "dq", "dk", "dv")}
    for q, k, v, do, window in problems:
        truth = gradients(reference.attention, q, k, v, do, window, torch.float64)
        ours = gradients(flash_attention, q, k, v, do, window)
        plain = formula(q, k, v, do, window) if q.dtype == torch.float32 else gradients(reference.attention, q, k, v, do, window)
        for name, x, y, z in zip(squares, ours, plain, truth, strict=True):
            assert x.dtype == q.dtype and x.shape == z.shape, name
            squares[name][0] += (x.double() - z).square().sum().item()
            squares[name][1] += (y.double() - z).square().sum().item()
    for name, (ours, plain) in squares.items():
        assert ours**0.5 <= 2 * plain**0.5, f"{name}: error {ours**0.5:.3e}, the plain formula's {plain**0.5:.3e}"


SHAPES = [  # B, T_q, T_k, H, H_kv, D, window
    (2, 63, 63, 2, 2, 16, 0),
    (1, 64, 64, 4, 2, 24, 0),
    (1, 65, 65, 2, 1, 72, 20),
    (2, 111, 111, 3, 1, 40, 0),
    (1, 200, 200, 2, 2, 64, 70),
    (1, 37, 150, 4, 2, 16, 0),
    (1, 1, 130, 2, 1, 32, 33),
    (1, 128, 192, 2, 1, 16, 0),
    (1, 70, 70, 1, 1, 136, 64),
    (1, 40, 70, 2, 1, 248, 0),
    (1, 64, 100, 2, 1, 64, 0),
    (3, 20, 20, 8, 4, 16, 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(shape, dtype):
    *sizes, window = shape
    check(*((*inputs(*sizes, dtype, seed=seed), window) for seed in range(2)))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes the tiles of its own")
@pytest.mark.parametrize("shape", [(1, 128, 192, 2, 2, 128, 0), (1, 100, 130, 2, 1, 72, 40), (1, 70, 70, 2, 1, 64, 0), (1, 70, 100, 2, 2, 248, 50)], ids=str)
def test_the_tiles_and_tensor_descriptors_of_hopper(shape, monkeypatch):
    monkeypatch.setattr("kernels.flash_tiles.on_hopper", lambda x: True)
    *sizes, window = shape
    check((*inputs(*sizes, torch.float16), window))


def test_a_grid_has_a_program_for_each_tile_of_each_head():
    for heads in (*range(1, 100), 65536, 3 * 65536):
        for together in (1, 5, 16, 200):
            side_by_side, tiles, rest = grid_of(7, heads, together)
            assert side_by_side * rest == heads and tiles == 7 and rest <= 65535
            assert side_by_side <= together or heads > 65535


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_window_of_one_gives_back_v(dtype, T):
    q, k, v, do = inputs(1, T, T, 2, 2, 32, dtype)
    o, dq, dk, dv = gradients(flash_attention, q, k, v, do, window=1)
    assert torch.equal(o, v) and torch.equal(dv, do)
    # p is constant, so dq and dk are 0: what is left is the float32 rounding of do . v - do . o, two sums over D
    rounding = 2**-22 * do.float().norm() * v.float().norm()
    assert dq.float().norm() <= rounding * k.abs().max() and dk.float().norm() <= rounding * q.abs().max()


def test_a_window_of_all_keys_is_no_window():
    q, k, v, do = inputs(1, 70, 70, 2, 1, 16)
    for a, b in zip(gradients(flash_attention, q, k, v, do, 70), gradients(flash_attention, q, k, v, do, 0), strict=True):
        assert torch.equal(a, b)


def test_grouped_heads_equal_repeated_heads():
    q, k, v, do = inputs(1, 70, 70, 4, 2, 16)
    o, dq, dk, dv = gradients(flash_attention, q, k, v, do, 0)
    k2, v2 = (x.repeat_interleave(2, dim=2) for x in (k, v))
    o2, dq2, dk2, dv2 = gradients(flash_attention, q, k2, v2, do, 0)
    assert torch.equal(o, o2) and torch.equal(dq, dq2)
    torch.testing.assert_close(dk, dk2.unflatten(2, (2, 2)).sum(3))
    torch.testing.assert_close(dv, dv2.unflatten(2, (2, 2)).sum(3))


def test_queries_are_the_last_positions():
    q, k, v, _ = inputs(1, 150, 150, 2, 1, 16)
    tail = flash_attention(q[:, 90:], k, v, 40)
    torch.testing.assert_close(tail, flash_attention(q, k, v, 40)[:, 90:])


@pytest.mark.parametrize("layout", ["fused", "heads_first"])
def test_views_are_read_in_place(layout):
    q, k, v, do = inputs(2, 70, 70, 4, 2, 16, layout=layout)
    assert all(kernel_layout(x) is x and not x.is_contiguous() for x in (q, k))
    ours = gradients(flash_attention, q, k, v, do, 20)
    copied = gradients(flash_attention, q.contiguous(), k.contiguous(), v.contiguous(), do, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, copied, strict=True))


def test_other_views_are_copied():
    q, k, v, do = inputs(1, 70, 70, 2, 2, 32)
    wide = torch.zeros(1, 70, 2, 40, device=DEVICE)
    wide[..., 3:35] = v
    misaligned, backwards, expanded = wide[..., 3:35], k.flip(3).transpose(2, 3).contiguous().transpose(2, 3), do[:, :, :1].expand(-1, -1, 2, -1)
    check((q, backwards, misaligned, expanded, 0))


def test_tiles_outside_the_window_are_not_read():
    q, k, v, do = inputs(1, 20, 600, 2, 1, 16, layout="contiguous")
    k[:, :400], v[:, :400] = torch.nan, torch.nan  # a window of 10 begins at key 571
    o, dq, dk, dv = gradients(flash_attention, q, k, v, do, 10)
    assert o.isfinite().all() and dq.isfinite().all()
    assert not dk[:, :571].any() and not dv[:, :571].any()


def test_tiles_above_the_diagonal_are_not_read():
    q, k, v, do = inputs(1, 256, 256, 2, 1, 16, layout="contiguous")
    later = k.clone(), v.clone()
    for x in later:
        x[:, 128:] = torch.nan
    o, dq, _, _ = gradients(flash_attention, q, *later, do, 0)
    assert o[:, :128].isfinite().all() and dq[:, :128].isfinite().all()
    q[:, :128], do[:, :128] = torch.nan, torch.nan
    _, _, dk, dv = gradients(flash_attention, q, k, v, do, 0)
    assert dk[:, 128:].isfinite().all() and dv[:, 128:].isfinite().all()


def test_two_runs_give_the_same_bits():
    q, k, v, do = inputs(2, 150, 150, 4, 1, 16)
    runs = [gradients(flash_attention, q, k, v, do, 0) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_scale():
    q, k, v, _ = inputs(1, 70, 70, 2, 1, 16)
    torch.testing.assert_close(flash_attention(q, k, v, scale=0.7), reference.attention(q, k, v, scale=0.7))


def test_compiles_into_one_graph():
    q, k, v, do = inputs(1, 70, 70, 2, 1, 16)
    torch.use_deterministic_algorithms(False)

    def attend(q, k, v, window):
        return flash_attention(q * 2, k, v, window)

    compiled = torch.compile(attend, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for a, b in zip(gradients(compiled, q, k, v, do, 9), gradients(attend, q, k, v, do, 9), strict=True):
        assert torch.equal(a, b)


def test_opcheck():
    q, k, v, do = inputs(1, 20, 20, 2, 1, 16)
    torch.use_deterministic_algorithms(False)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(_forward, (*leaves, 0, 0.25))
    o, lse = _forward(q, k, v, 0, 0.25)
    torch.library.opcheck(_backward, (do, q, k, v, o, lse, 0, 0.25))


def test_activation_checkpointing():
    q, k, v, do = inputs(1, 70, 70, 2, 1, 16)

    def recomputed(q, k, v, window):
        return torch.utils.checkpoint.checkpoint(flash_attention, q, k, v, window, use_reentrant=False)

    for a, b in zip(gradients(recomputed, q, k, v, do, 9), gradients(flash_attention, q, k, v, do, 9), strict=True):
        assert torch.equal(a, b)


class Projected(torch.nn.Module):
    """Attention behind a fused projection to 2 query heads and 1 KV head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.qkv = torch.nn.Linear(32, 4 * 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (4, 16)).split([2, 1, 1], dim=2)
        return flash_attention(q, k, v).sum()


def one_of_two_processes(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(Projected())
    model(torch.load(folder / "x.pt")[rank : rank + 1]).backward()
    torch.save(model.module.qkv.weight.grad, folder / f"{rank}.pt")
    torch.distributed.barrier()  # gloo's threads may crash a process whose peer has gone
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="two processes would need two GPUs")
def test_two_processes_have_the_mean_gradient(tmp_path):
    x, model = torch.randn(2, 70, 32), Projected()
    torch.save(x, tmp_path / "x.pt")
    torch.multiprocessing.spawn(one_of_two_processes, (tmp_path,), nprocs=2)
    model(x).backward()
    for rank in range(2):
        torch.testing.assert_close(2 * torch.load(tmp_path / f"{rank}.pt"), model.qkv.weight.grad)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q.shape", {"q": torch.zeros(1, 8, 32)}),
        ("q.shape", {"q": torch.zeros(())}),
        ("q.shape", {"q": torch.zeros(1, 8, 2, 0)}),
        ("q.shape[3]", {name: torch.zeros(1, 8, 2, 20) for name in "qkv"}),
        ("q.shape[3]", {name: torch.zeros(1, 8, 2, 264) for name in "qkv"}),
        ("k.shape", {"k": torch.zeros(2, 8, 2, 32)}),
        ("k.shape[1]", {name: torch.zeros(1, 7, 2, 32) for name in "kv"}),
        ("k.shape[2]", {name: torch.zeros(1, 8, 3, 32) for name in "kv"}),
        ("v.shape", {"v": torch.zeros(1, 9, 2, 32)}),
        ("v.shape", {"v": torch.zeros(1, 0, 2, 32)}),
        ("q.dtype", {name: torch.zeros(1, 8, 2, 32, dtype=torch.float64) for name in "qkv"}),
        ("v.dtype", {"v": torch.zeros(1, 8, 2, 32, dtype=torch.float16)}),
        ("k.device", {"k": torch.zeros(1, 8, 2, 32, device="meta")}),
        ("window", {"window": -1}),
        ("window", {"window": 0.5}),
        ("scale", {"scale": 0.0}),
        ("scale", {"scale": float("nan")}),
        ("scale", {"scale": 1e-46}),
        ("scale", {"scale": 1e300}),
    ],
)
def test_wrong_arguments_are_named(argument, change):
    arguments = {name: torch.zeros(1, 8, 2, 32) for name in "qkv"} | change
    with pytest.raises(ValueError, match="flash_attention: " + argument.replace("[", r"\[").replace("]", r"\]") + " is .+; it takes "):
        flash_attention(**{n: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for n, x in arguments.items()})


@pytest.mark.parametrize("architecture", ["ampere", "hopper"])
def test_compiles_ahead_of_time(architecture, tmp_path):
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script("tests/ahead_of_time.py", "flash", architecture, env=env, timeout=300)


@gpu
@pytest.mark.parametrize("seed", range(50))
def test_random_cases(seed):
    """500 draws over everything: for each seed one set of kernels, so that not all time goes into compiling."""
    draw = random.Random(seed)
    D = draw.choice([16, 32, 64, 64, 64, 80, 96, 128, 128, 256, 8 * draw.randint(2, 32)])
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    window = draw.choice([0, 0, 2, 17, 64, 65, draw.randint(2, 700)])
    group = draw.choice([1, 1, 2, 3, 4])
    problems = []
    for case in range(10):
        T_k = draw.choice([1, 2, 63, 64, 65, 127, 128, 129, 200, 256, 333, 512, draw.randint(1, 700)])
        T_q = draw.choice([T_k, T_k, draw.randint(1, T_k)])
        H_kv = draw.choice([1, 2, 3])
        sizes = (draw.choice([1, 2, 3]), T_q, T_k, H_kv * group, H_kv, D)
        layout = draw.choice(["fused", "heads_first", "contiguous"])
        problems.append((*inputs(*sizes, dtype, layout, seed=case), window))
    check(*problems)


@gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("window", [0, 1000])
def test_deterministic_and_right_at_length(D, window):
    q, k, v, do = inputs(2, 3000, 3000, 6, 2, D, torch.bfloat16)
    check((q, k, v, do, window))
    runs = [gradients(flash_attention, q, k, v, do, window) for _ in range(3)]
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*runs, strict=True))


@gpu
def test_a_compiled_projection_takes_its_gradient_as_it_is():
    """No copy puts dq, dk and dv side by side."""
    x = torch.randn(2, 64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(6 * 16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    @torch.compile(fullgraph=True)
    def attend(x, weight):
        return flash_attention(*(x @ weight.T).unflatten(-1, (6, 16)).split([4, 1, 1], dim=2))

    _, codes = run_and_get_code(lambda: attend(x, weight).backward(torch.ones(2, 64, 4, 16, device="cuda", dtype=torch.bfloat16)))
    assert len(codes) == 2 and "flash_backward" in codes[1] and "cat" not in codes[1]


@gpu
def test_memory_is_linear_in_length():
    torch.use_deterministic_algorithms(False)
    T, H, H_kv, D = 65_536, 8, 2, 64
    q, k, v, do = inputs(1, T, T, H, H_kv, D, torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(flash_attention(*leaves), leaves, do)
    outputs = 2 * (2 * q.numel() + k.numel() + v.numel())  # bytes of o, dq, dk, dv
    lse_and_stats = 4 * 3 * H * T
    assert torch.cuda.max_memory_allocated() - before <= outputs + lse_and_stats + 2**20


@gpu
def test_the_end_of_a_long_text():
    """With a gradient for the last queries only, those with all keys make all of dk and dv."""
    q, k, v, do = inputs(1, 131_072, 131_072, 2, 1, 64, torch.bfloat16)
    last = slice(-40, None)
    do[:, : last.start] = 0
    o, dq, dk, dv = gradients(flash_attention, q, k, v, do, 0)
    tail = q[:, last], k, v, do[:, last]
    truth = gradients(reference.attention, *tail, 0, torch.float64)
    plain = gradients(reference.attention, *tail, 0)
    for name, x, y, z in zip(("o", "dq", "dk", "dv"), (o[:, last], dq[:, last], dk, dv), plain, truth, strict=True):
        assert (x.double() - z).norm() <= 2 * (y.double() - z).norm(), name


@gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not there")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "tests/sanitized.py"]
    result = subprocess.run(command, check=False, cwd=repository, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]


@gpu
def test_offsets_beyond_32_bits():
    torch.use_deterministic_algorithms(False)
    T, D = 131_072, 64
    wide = torch.empty(1, T, 272, D, device="cuda", dtype=torch.bfloat16)  # 2.3e9 elements
    q, k, v, do = inputs(1, T, T, 1, 1, D, torch.bfloat16)
    q_far, k_far, v_far = (wide[:, :, -i : wide.shape[2] - i + 1].copy_(x) for i, x in ((1, q), (2, k), (3, v)))
    near, far = (gradients(flash_attention, *x, do, 500) for x in ((q, k, v), (q_far, k_far, v_far)))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
