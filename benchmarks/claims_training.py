"""Claims about computing attention: what it costs, what windows and grouped heads change, what FlashAttention avoids."""

import math
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import captured, copying, forget_compiled, median_ms
from benchmarks.plots import bars, lines
from kernels import reference, sdpa
from model import GPT, ModelConfig

REPEATS = 8  # calls in a CUDA graph: the shortest takes less time than a launch


def attention_of(device):
    """The kernel that training uses on this device."""
    if device.type != "cuda":
        return sdpa.attention
    from kernels.flash_attention import flash_attention

    return flash_attention


def qkv_of(length, heads, head_dim, device, dtype):
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(3, 1, length, heads, head_dim, generator=generator, device=device, dtype=dtype).unbind()


@torch.no_grad()
def milliseconds(calls, rounds, device):
    """{name: milliseconds a call}, on a GPU without the host's launches."""
    if device.type == "cuda":
        torch.cuda.synchronize()  # what the calls read was made on another stream
        with torch.cuda.stream(torch.cuda.Stream()):
            graphs = {name: captured(call, REPEATS) for name, call in calls.items()}
            return {name: ms / REPEATS for name, ms in median_ms(graphs, rounds, repeats=1).items()}
    return milliseconds_as_called(calls, rounds, device)


def milliseconds_as_called(calls, rounds, device):
    """The same for calls that a CUDA graph cannot hold, and that are long enough to hide their launches."""
    if device.type == "cuda":
        return median_ms(calls, rounds, repeats=2)
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    turns = [{name: 1e3 * timer.timeit(1).median for name, timer in timers.items()} for _ in range(1 + rounds)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in calls}  # the first turn warms up


def attention_layer(attention, x, w_qkv, w_out):
    """A layer's attention with its projections: x (B, T, d) to (B, T, d), heads of 64 channels."""
    q, k, v = F.linear(x, w_qkv).unflatten(-1, (-1, 64)).chunk(3, dim=2)
    return F.linear(attention(q, k, v).flatten(2), w_out)


def layer_inputs(batch, length, width, device, dtype):
    """x, w_qkv and w_out, so large that q, k and v are about 1."""
    shapes = (batch, length, width), (3 * width, width), (width, width)
    return [torch.randn(shape, device=device, dtype=dtype) / width**0.25 for shape in shapes]


def by_impl(attention):
    return lambda layer, q, k, v, window: attention(q, k, v, window)


def attention_costs_n2d_and_nd2(sizes, device, dtype, rounds):
    """Operations of the definition as torch counts them, and times against the best a, b and c. Holds within 10%.

    The n d beside the two terms is what every token of every layer is read and written for.

    Short sequences come many at a time, so that every call computes the same number of tokens.
    """
    shapes = [(n, d) for n in sizes.lengths for d in sizes.widths]
    together = {n: max(sizes.lengths) // n for n in sizes.lengths}
    calls, miscounted = {}, []
    for n, d in shapes:
        with FlopCounterMode(display=False) as counter:  # the definition computes hidden pairs, too
            attention_layer(reference.attention, *layer_inputs(1, n, d, torch.device("meta"), torch.float32))
        if counter.get_total_flops() != 4 * n * n * d + 8 * n * d * d:
            miscounted.append((n, d))
        inputs = layer_inputs(together[n], n, d, device, dtype)
        calls[n, d] = partial(attention_layer, attention_of(device), *inputs)
    times = {(n, d): ms / together[n] for (n, d), ms in milliseconds(calls, rounds, device).items()}
    terms = torch.tensor([[n * n * d, n * d * d, n * d] for n, d in shapes], dtype=torch.float64)
    terms /= torch.tensor([times[shape] for shape in shapes], dtype=torch.float64)[:, None]
    scale = terms.amax(0)
    fit = torch.linalg.lstsq(terms / scale, torch.ones(len(shapes), 1, dtype=torch.float64)).solution[:, 0] / scale
    off = dict(zip(shapes, (terms @ fit - 1).tolist(), strict=True))
    a, b, c = fit.tolist()
    series = {f"d {d}": [(n, times[n, d]) for n in sizes.lengths] for d in sizes.widths}
    return {
        "claim": "Attention's cost grows with n^2 d + n d^2",
        "formula": "operations of a layer = 4 n^2 d (scores, weighted sum; causality needs half) + 8 n d^2 (projections); "
        "reading and writing n d values adds its own time",
        "measured": f"the definition counts exactly so at {len(shapes) - len(miscounted)} of {len(shapes)} shapes; time fits "
        f"{a:.2g} n^2 d + {b:.2g} n d^2 + {c:.2g} n d ms to within {max(map(abs, off.values())):.1%}",
        "because": cost_objection(miscounted, off, (a, b)),
        "data": {"times_ms": [[n, d, times[n, d]] for n, d in shapes], "a": a, "b": b, "c": c},
        "draw": lambda axis: lines(axis, series, "n", "ms a layer, forward"),
    }


def cost_objection(miscounted, off, fit):
    """off: {(n, d): relative error of the fitted time}"""
    worst = max(off, key=lambda shape: abs(off[shape]))
    if miscounted:
        return f"the counted operations differ at n, d = {miscounted[0]}"
    if min(fit) < 0:
        return f"of operations it is true, of time not: the best a and b are {fit[0]:.2g} and {fit[1]:.2g}"
    if abs(off[worst]) > 0.1:
        return f"of operations it is true, of time not: the best fit is {off[worst]:+.1%} off at n, d = {worst}"
    return ""


def gqa_trains_as_fast(sizes, device, dtype, rounds):
    """Forward and backward pass, in turns. As fast: GQA at least 95% of MQA's speed."""
    tokens = torch.randint(256, (sizes.batch, sizes.max_seq_len + 1), device=device)
    shape = {"n_layer": sizes.layers, "n_head": sizes.heads, "n_embd": 64 * sizes.heads, "bias": False}
    shape |= {"max_seq_len": sizes.max_seq_len, "vocab_size": sizes.vocab_size}
    calls = {}
    for attention in ("mha", "gqa", "mqa"):
        model = GPT(ModelConfig(**shape, attention=attention))
        model.init_weights(1)
        model.to(device)
        if device.type == "cuda":
            model.compile_for_training()
        calls[attention] = partial(forward_backward, model, tokens, by_impl(attention_of(device)), dtype)
    times = milliseconds_as_called(calls, rounds, device)
    calls.clear()
    forget_compiled()
    speeds = {attention: tokens[:, 1:].numel() / ms * 1e3 for attention, ms in times.items()}
    ratio = speeds["gqa"] / speeds["mqa"]
    return {
        "claim": "GQA trains as fast as MQA",
        "formula": "the same scores; K and V projections grow from 1 to n_kv_head heads, a few percent of all operations",
        "measured": f"{', '.join(f'{name} {speed:,.0f}' for name, speed in speeds.items())} tokens/s forward and backward, "
        f"without an optimizer: GQA at {ratio:.0%} of MQA",
        "because": training_objection(ratio),
        "data": {"tokens_per_s": speeds},
        "draw": lambda axis: bars(axis, speeds, "tokens/s forward and backward"),
    }


def training_objection(ratio):
    return "" if ratio >= 0.95 else f"it trains at {ratio:.1%} of MQA's speed"


@torch.enable_grad()
def forward_backward(net, tokens, attend, dtype):
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        loss = net(tokens[:, :-1], tokens[:, 1:], attend).mean()
    loss.backward()
    net.zero_grad()


def windows_make_cost_linear(sizes, device, dtype, rounds):
    """The exponent of n between the two longest sequences. Linear: 0.9 to 1.1."""
    attention = attention_of(device)
    calls = {}
    for n in sizes.windowed_lengths:
        q, k, v = qkv_of(n, sizes.heads, 64, device, dtype)
        for window in (sizes.window, 0):
            calls[window, n] = partial(attention, q, k, v, window)
    times = milliseconds(calls, rounds, device)
    *_, before, last = sizes.windowed_lengths
    slopes = {w: math.log(times[w, last] / times[w, before]) / math.log(last / before) for w in (sizes.window, 0)}
    names = {sizes.window: f"window {sizes.window}", 0: "no window"}
    series = {names[w]: [(n, times[w, n]) for n in sizes.windowed_lengths] for w in names}
    return {
        "claim": "A sliding window makes attention's cost linear in n",
        "formula": "visible pairs: n w - w (w - 1) / 2 with a window w, n (n + 1) / 2 without",
        "measured": f"time grows with n^{slopes[sizes.window]:.2f} with a window, with n^{slopes[0]:.2f} without",
        "because": linear_objection(slopes[sizes.window]),
        "data": {"times_ms": [[w, n, ms] for (w, n), ms in times.items()]},
        "draw": lambda axis: lines(axis, series, "n", "ms, forward"),
    }


def linear_objection(exponent):
    return "" if 0.9 <= exponent <= 1.1 else f"the exponent is {exponent:.3f}"


def information_travels_by_layers(sizes, device, dtype, rounds):
    """How far back the last token's features have a gradient, in float64, where no small number is rounded away."""
    window, depths = 5, (1, 2, 3, 4)
    seen = {layers: receptive_field(layers, window) for layers in depths}
    return {
        "claim": "Information travels window - 1 tokens a layer",
        "formula": "receptive field = n_layer (window - 1) + 1 tokens, the token itself included",
        "measured": f"window {window}: {', '.join(f'depth {n} sees {tokens} tokens' for n, tokens in seen.items())}",
        "because": travel_objection(seen, window),
        "data": {"window": window, "tokens_by_layers": seen},
        "draw": lambda axis: bars(
            axis, {f"depth {n}": tokens for n, tokens in seen.items()}, f"tokens, window {window}"
        ),
    }


def travel_objection(seen, window):
    """seen: {layers: tokens}"""
    wrong = [layers for layers in seen if seen[layers] != layers * (window - 1) + 1]
    return f"depth {wrong[0]} sees {seen[wrong[0]]} tokens" if wrong else ""


@torch.enable_grad()
def receptive_field(layers, window):
    length = layers * (window - 1) + 8
    shape = {"n_layer": layers, "n_head": 2, "n_embd": 32, "max_seq_len": length, "vocab_size": 64}
    model = GPT(ModelConfig(**shape, attention="swa", window=window)).double()
    model.init_weights(1)
    embedded = []

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    model.tok_emb.register_forward_hook(keep)
    features = model.features(torch.arange(length)[None], by_impl(reference.attention))
    features[0, -1, 0].backward()
    return length - embedded[0].grad[0].abs().amax(-1).nonzero()[0].item()


def flash_never_holds_n_by_n(sizes, device, dtype, rounds):
    """Memory held by the allocator, without a GPU that of the largest tensor. Bytes moved to and from memory are about what a
    copy would move in the same time, or fewer; what caches on the chip pass on is not counted.

    A kernel computes with the scores in float32 and with their exponentials in the dtype of v. Holds when twice the
    tokens take at most 2.2 times the memory, and fewer bytes were moved than these two would take.
    """
    attention, H, D = attention_of(device), sizes.heads, 64
    held, formula_held, calls = {}, {}, {}
    for n in sizes.lengths:
        q, k, v = qkv_of(n, H, D, device, dtype)
        calls[n] = partial(attention, q, k, v)
        held[n] = bytes_made(calls[n], device)
        if n <= 16384:  # at twice as many tokens the definition would hold four times as much, 78 GB
            formula_held[n] = bytes_made(partial(reference.attention, q, k, v), device)
    copy, copied = copying(device)
    times = milliseconds({**calls, "copy": copy}, rounds, device)
    n = max(sizes.lengths)
    pairs = H * n * (n + 1) // 2
    moved, scores = copied * times[n] / times["copy"], pairs * (4 + dtype.itemsize)
    ours = "FlashAttention" if device.type == "cuda" else "torch's SDPA"
    series = {ours: list(held.items()), "the formula": list(formula_held.items())}
    series["one n x n of each head"] = [(n, H * n * n * dtype.itemsize) for n in sizes.lengths]
    return {
        "claim": "FlashAttention moves fewer bytes than it computes with and never holds n x n",
        "formula": "must move q, k, v, o to or from memory: 4 n d values; computes with n (n + 1) / 2 scores a head and their "
        "exponentials, which the plain formula writes and reads",
        "measured": f"n {n}, {H} heads: {times[n]:.3g} ms, in which a copy moves {moved / 1e9:.3g} GB, for "
        f"{scores / 1e9:.3g} GB of scores and exponentials: {4 * D * pairs / moved:.3g} operations a byte or more; "
        f"{held[n] / 2**20:.3g} MiB held, where one n x n of each head is {H * n * n * dtype.itemsize / 2**20:,.5g} MiB",
        "because": flash_objection(held, moved, scores),
        "data": {
            "held_bytes": held,
            "formula_held_bytes": formula_held,
            "ms": {name: times[name] for name in (n, "copy")},
            "copied_bytes": copied,
            "moved_at_a_copys_bandwidth": moved,
            "scores_bytes": scores,
        },
        "draw": lambda axis: lines(axis, series, "n", "bytes held besides q, k, v"),
    }


def flash_objection(held, moved, scores):
    """held: {n: bytes}, the longest n last; moved and scores: bytes at that n"""
    *_, before, n = held
    if held[n] / held[before] > 1.1 * n / before:
        return f"memory grows by {held[n] / held[before]:.2f} from {before} to {n} tokens"
    if moved >= scores:
        could = f"in the time it took at n {n}, {moved / 1e9:.3g} GB could have been moved"
        return f"nothing is shown: {could}, more than the {scores / 1e9:.3g} GB of scores and exponentials"
    return ""


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation gives back."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@torch.no_grad()
def bytes_made(call, device):
    """Most memory in use during a call besides its arguments; without a GPU's allocator, its largest tensor."""
    if device.type == "cuda":
        call()  # whatever the first call alone needs
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with LargestTensor() as largest:
        call()
    return largest.nbytes
