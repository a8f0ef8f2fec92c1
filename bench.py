"""Every speed figure of the project: python bench.py NAME [--key=value ...]

attention: the training kernels against every peer that is there, forward and backward. Needs an NVIDIA GPU.
           Writes results/attention.json and results/attention.png.
engine:    greedy decoding with GPT-2 124M's shape and random weights, against transformers' cached generate where that
           is installed. Runs on any device. Writes results/engine-DEVICE.json.

Everything is validated before it is timed. Times are medians over rounds in which all contestants take turns, so that a
change of the clock meets all of them. The last line printed is JSON.
"""

import json
import statistics
import time
from collections import namedtuple
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F

from config import UserError, parse, run
from device import device_name, pick_device, pick_dtype
from engine import generate
from kernels import reference
from model import GPT, ModelConfig
from runlog import git_commit, versions


@dataclass(frozen=True)
class BenchConfig:
    """What can be chosen about a measurement."""

    out_dir: Annotated[str, "where the results go"] = "results"
    peers: Annotated[str, "which contestants, a list with commas"] = "ours,fa2,cudnn,flex,fa3"
    rounds: Annotated[int, "times that each contestant takes its turn"] = 9
    sweep: Annotated[bool, "time growing lengths, too"] = True


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
WINDOWED = [Shape(1, 16, 16, T, 64, 1024) for T in (4096, 8192, 16384, 32768, 65536)]


def main(argv):
    words, config = parse(argv, BenchConfig, usage=__doc__)
    measurements = {"attention": bench_attention, "engine": bench_engine}
    if len(words) != 1 or words[0] not in measurements:
        raise UserError(f"bench.py takes the name of one measurement, {' or '.join(measurements)}, got {' '.join(words) or 'none'}")
    measurements[words[0]](config)


def write_results(path, device, dtype, **measured):
    """The results with what they were measured on, as a file and as the last line."""
    facts = {"device": device_name(device), "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    facts |= {"versions": versions(), "git_commit": git_commit(), **measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts))


def bench_attention(config):
    if not torch.cuda.is_available():
        raise UserError("bench.py attention times GPU kernels and finds no NVIDIA GPU; run it on a machine that has one")
    rows = []
    print(f"{'B, H, H_kv, T, D, window':32}" + "".join(f"{name:>24}" for name in config.peers.split(",")))
    for shape in SHAPES + (SWEEP + WINDOWED if config.sweep else []):
        times = time_attention(shape, config)
        rows += [{**shape._asdict(), "peer": peer, **time} for peer, time in times.items()]
        cells = [times.get(peer) for peer in config.peers.split(",")]
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
    W = shape.window if 0 < shape.window < shape.T else shape.T
    pairs = W * (W + 1) // 2 + (shape.T - W) * W
    return 4 * shape.B * shape.H * shape.D * pairs


def time_attention(shape, config):
    """{peer: forward and backward times and rates} for the peers that can do this shape."""
    torch.manual_seed(0)
    B, H, H_kv, T, D = shape[:5]
    qkv = torch.randn(B, T, H + 2 * H_kv, D, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.detach().requires_grad_() for x in qkv.split([H, H_kv, H_kv], dim=2))  # views, as a projection gives them
    do = torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)
    calls = {}
    for peer in config.peers.split(","):
        attend = contestants(shape).get(peer)
        if attend:
            o = attend(q, k, v)
            validate(peer, shape, (o, *torch.autograd.grad(o, (q, k, v), do, retain_graph=True)), q, k, v, do)
            calls[peer, "forward"] = lambda attend=attend: without_grad(attend, q, k, v)
            calls[peer, "backward"] = lambda o=o: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
    times = median_ms(calls, config.rounds)
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
    """Output, dq, dk and dv of the last KV head of the last sequence against the definition in float32."""
    group = shape.H // shape.H_kv
    q, do, o, dq = (x[-1:, :, -group:].detach().float() for x in (q, do, ours[0], ours[1]))
    k, v, dk, dv = (x[-1:, :, -1:].detach().float() for x in (k, v, ours[2], ours[3]))
    if shape.T <= 8192:  # the definition has a T x T matrix in memory, several times over
        leaves = [x.requires_grad_() for x in (q, k, v)]
        expected = reference.attention(*leaves, shape.window)
        truth = (expected, *torch.autograd.grad(expected, leaves, do))
        for name, x, y in zip(("o", "dq", "dk", "dv"), (o, dq, dk, dv), truth, strict=True):
            error = ((x - y).norm() / y.norm()).item()
            if not error < 0.01:  # bf16 rounds to 0.004; a wrong mask or head is off by far more
                raise RuntimeError(f"{peer} at {shape}: relative error of {name} is {error:.3g}, not below 0.01")


def median_ms(calls, rounds, repeats=4):
    """{name: milliseconds a call}. A turn is several calls in a row: the first hides the launch of the others."""
    turns = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            turns[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) / repeats for a, b in pairs) for name, pairs in turns.items()}


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
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b, h, q_pos, k_pos):
        distance = q_pos - k_pos
        return (distance >= 0) & (distance < shape.window) if shape.window else distance >= 0

    @cache
    def block_mask():
        return create_block_mask(seen, None, None, shape.T, shape.T)

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled_flex()(q, k, v, block_mask=block_mask(), enable_gqa=shape.H != shape.H_kv).transpose(1, 2)

    return attend


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one compilation a shape
    return torch.compile(flex_attention, dynamic=False)


def plot_attention(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    panels = ((SWEEP, "forward_tflops"), (SWEEP, "backward_tflops"), (WINDOWED, "forward_ms"))
    for axis, (shapes, key) in zip(axes, panels, strict=True):
        for peer in dict.fromkeys(row["peer"] for row in rows):
            points = [(row["T"], row[key]) for row in rows if row["peer"] == peer and shape_of(row) in shapes]
            axis.plot(*zip(*points, strict=True), marker="o", label=peer) if points else None
        shape = shapes[0]
        axis.set(xscale="log", xlabel="T", ylabel=key, title=f"H {shape.H}, D {shape.D}, window {shape.window or 'none'}")
        axis.set_xticks([shape.T for shape in shapes], [shape.T for shape in shapes])
        axis.legend()
    axes[2].set_yscale("log")
    figure.savefig(path, dpi=120)


PROMPT, NEW = 128, 64  # tokens of a sequence in bench_engine


def bench_engine(config):
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    model = GPT(ModelConfig(vocab_size=50257))
    model.init_weights(1)
    model.to(device, dtype).eval()
    contestants = {"ours": lambda prompts, new: generate(model, prompts, new)}
    theirs = transformers_gpt2(device, dtype)
    if theirs:
        contestants["transformers"] = theirs
    validate_engine(model, device)
    rows = []
    for batch in (1, 16):
        prompts = torch.randint(50257, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
        seconds = {(name, new): [] for name in contestants for new in (1, 1 + NEW)}
        for _ in range(config.rounds):
            for (name, new), turns in seconds.items():
                start = time.perf_counter()
                contestants[name](prompts, new)
                turns.append(time.perf_counter() - start)
        for name in contestants:
            first, whole = (statistics.median(seconds[name, new]) for new in (1, 1 + NEW))
            row = {"batch": batch, "engine": name, "decode_tokens_per_s": batch * NEW / (whole - first)}
            row["whole_tokens_per_s"] = batch * (1 + NEW) / whole
            rows.append(row)
            print("  ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    path = Path(config.out_dir, f"engine-{device.type}.json")
    write_results(path, device, dtype, shape="GPT-2 124M", prompt=PROMPT, new_tokens=1 + NEW, rows=rows)


@torch.inference_mode()
def validate_engine(model, device):
    """Each decoded token must be the likeliest by the definition, or as likely but for rounding."""
    (ids,) = generate(model, [[1, 2, 3]], 8)
    tokens = torch.tensor([[1, 2, 3, *ids]], device=device)
    features = model.features(tokens, lambda layer, q, k, v, window: reference.attention(q, k, v, window))
    logits = model.logits(features)[0, 2:-1].float()
    behind = (logits.amax(dim=-1) - logits.gather(1, tokens[0, 3:, None])[:, 0]).max().item()
    if not behind < 0.05 * logits.std().item():
        raise RuntimeError(f"decoding does not follow the model: a token is {behind:.3g} behind the likeliest")


def transformers_gpt2(device, dtype):
    """generate(prompts, number of new tokens) by transformers with random weights, or None without it."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, logging
    except ImportError:
        return None
    logging.set_verbosity_error()
    model = GPT2LMHeadModel(GPT2Config()).to(device, dtype).eval()

    def call(prompts, new):
        ids = torch.tensor(prompts, device=device)
        keys = {"attention_mask": torch.ones_like(ids), "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
        return model.generate(ids, do_sample=False, **keys).tolist()

    return call


if __name__ == "__main__":
    run(main)
