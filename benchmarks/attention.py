"""The training kernels against every peer that is there, forward and backward, over the shapes that people train."""

from collections import namedtuple
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measure import captured, leave_out, median_ms, write_results
from benchmarks.plots import NAMES, pyplot
from kernels import reference
from model import mean_visible_keys

Shape = namedtuple("Shape", "B H H_kv T D window")
SHAPES = [
    Shape(32, 12, 12, 1024, 64, 0),  # GPT-2 124M in training
    Shape(32, 12, 4, 1024, 64, 0),
    Shape(32, 12, 1, 1024, 64, 0),
    Shape(32, 12, 12, 1024, 64, 256),
    Shape(4, 32, 32, 4096, 64, 0),
    Shape(8, 16, 16, 2048, 128, 0),
    Shape(2, 16, 16, 8192, 128, 0),
    Shape(1, 16, 16, 16384, 128, 0),
    Shape(1, 16, 16, 16384, 128, 1024),
]
SWEEP = [Shape(32768 // T, 16, 16, T, 64, 0) for T in (512, 1024, 2048, 4096, 8192, 16384, 32768)]
CALLS = 4  # in one graph
WINDOWED = [Shape(1, 16, 16, T, 64, 1024) for T in (4096, 8192, 16384, 32768, 65536)]


def bench_attention(config):
    rows, peers = [], [name for name in config.peers.split(",") if name in contestants(SHAPES[0])]
    print(f"{'B, H, H_kv, T, D, window':32}" + "".join(f"{name:>24}" for name in peers))
    for shape in SHAPES + (SWEEP + WINDOWED if config.sweep else []):
        with torch.cuda.stream(torch.cuda.Stream()):
            times = time_attention(shape, config)
        rows += [{**shape._asdict(), "peer": peer, **time} for peer, time in times.items()]
        cells = [times.get(peer) for peer in peers]
        text = [f"{c['forward_ms']:.3f} / {c['backward_ms']:.3f}" if c else "" for c in cells]
        print(f"{', '.join(map(str, shape)):32}" + "".join(f"{cell:>24}" for cell in text), flush=True)
    folder = Path(config.out_dir)
    write_results(folder / "attention.json", torch.device("cuda"), torch.bfloat16, rows=rows)
    if config.sweep:
        plot_attention(rows, folder / "attention.png")


def shape_of(row):
    return Shape(*(row[key] for key in Shape._fields))


def attention_flops(shape):
    """Of the forward pass; backward counts 2.5 times as many. Two products, two operations each, per visible pair."""
    return 4 * shape.B * shape.H * shape.D * shape.T * mean_visible_keys(shape.T, shape.window)


def time_attention(shape, config):
    """{peer: forward and backward times and rates} for the peers that can do this shape. Each call is captured in a CUDA
    graph: the shorter ones take the GPU less time than a launch from Python takes the host."""
    torch.manual_seed(0)
    B, H, H_kv, T, D = shape[:5]
    qkv = torch.randn(B, T, H + 2 * H_kv, D, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.detach().requires_grad_() for x in qkv.split([H, H_kv, H_kv], dim=2))  # views, as a projection gives them
    do = torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)
    calls = {}
    for peer in config.peers.split(","):
        attend = contestants(shape).get(peer)
        if attend:
            try:
                o = attend(q, k, v)
                made = (o, *torch.autograd.grad(o, (q, k, v), do, retain_graph=True))
            except RuntimeError as error:  # how torch says that a backend cannot do this
                leave_out(peer, error, ", ".join(map(str, shape)))
                continue
            validate(peer, shape, made, q, k, v, do)
            calls[peer, "forward"] = captured(lambda attend=attend: without_grad(attend, q, k, v), CALLS)
            calls[peer, "backward"] = captured(lambda o=o: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), CALLS)
    times = {name: ms / CALLS for name, ms in median_ms(calls, config.rounds, repeats=1).items()}
    flops = attention_flops(shape)
    return {
        peer: {
            "forward_ms": times[peer, "forward"],
            "backward_ms": times[peer, "backward"],
            "forward_tflops": flops / times[peer, "forward"] / 1e9,
            "backward_tflops": 2.5 * flops / times[peer, "backward"] / 1e9,
        }
        for peer, direction in times
        if direction == "forward"
    }


def without_grad(attend, q, k, v):
    with torch.no_grad():
        return attend(q, k, v)


def validate(peer, shape, ours, q, k, v, do):
    """Output, dq, dk and dv of the last KV head of the last sequence against the definition in float32: of the last 1024
    tokens, whose gradients depend on those queries alone, because the definition has all scores in memory."""
    group, last = shape.H // shape.H_kv, slice(-min(shape.T, 1024), None)
    q, do, o, dq = (x[-1:, last, -group:].detach().float() for x in (q, do, ours[0], ours[1]))
    k, v, dk, dv = (x[-1:, :, -1:].detach().float() for x in (k, v, ours[2], ours[3]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = reference.attention(*leaves, shape.window)
    truth = (expected, *torch.autograd.grad(expected, leaves, do))
    for name, x, y in zip(("o", "dq", "dk", "dv"), (o, dq, dk, dv), truth, strict=True):
        x, y = x[:, last], y[:, last]
        error = ((x - y).norm() / y.norm()).item()
        if not error < 0.01:  # bf16 rounds to 0.004; a wrong mask or head is off by far more
            raise RuntimeError(f"{peer} at {shape}: relative error of {name} is {error:.3g}, not below 0.01")


def contestants(shape):
    """{name: attend(q, k, v)} over (B, T, H, D), of those that are installed and can do this shape."""
    from kernels.flash_attention import flash_attention

    able = {"ours": lambda q, k, v: flash_attention(q, k, v, shape.window), "flex": flex(shape)}
    if not shape.window:
        able["fa2"], able["cudnn"] = sdpa("FLASH_ATTENTION"), sdpa("CUDNN_ATTENTION")
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return able
    left = shape.window - 1 if shape.window else -1  # it counts the keys before the token
    able["fa3"] = lambda q, k, v: flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    return able


def sdpa(backend):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return attend


def flex(shape):
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = block_mask(shape.T, shape.window)
        return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=shape.H != shape.H_kv).transpose(1, 2)

    return attend


@cache
def block_mask(T, window):
    """What FlexAttention needs to leave out hidden blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b, h, q_pos, k_pos):
        distance = q_pos - k_pos
        return (distance >= 0) & (distance < window) if window else distance >= 0

    return create_block_mask(seen, None, None, T, T)


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one compilation a shape
    return torch.compile(flex_attention, dynamic=False)


def plot_attention(rows, path):
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    panels = (
        (SWEEP, "forward_tflops", "forward, TFLOP/s"),
        (SWEEP, "backward_tflops", "backward, TFLOP/s"),
        (WINDOWED, "forward_ms", "forward, ms"),
    )
    for axis, (shapes, key, label) in zip(axes, panels, strict=True):
        for peer in dict.fromkeys(row["peer"] for row in rows):
            points = [(row["T"], row[key]) for row in rows if row["peer"] == peer and shape_of(row) in shapes]
            axis.plot(*zip(*points, strict=True), marker="o", label=NAMES[peer]) if points else None
        shape = shapes[0]
        axis.set(xscale="log", xlabel="T", ylabel=label, title=f"H {shape.H}, D {shape.D}, window {shape.window or 'none'}")
        axis.set_xticks([shape.T for shape in shapes], [shape.T for shape in shapes])
        axis.minorticks_off()
        axis.legend()
    for axis in axes[:2]:
        axis.set_ylim(0)
    axes[2].set_yscale("log")  # linear in T is a straight line here as well
    figure.savefig(path, dpi=120)
