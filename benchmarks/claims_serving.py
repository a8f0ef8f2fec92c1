"""Claims about decoding: the size of the cache, the speed of grouped heads, the memory that pages save."""

import gc
import itertools
import random
import statistics
import time
from collections import deque

import torch

from benchmarks.engine import random_model
from benchmarks.measure import forget_compiled, frozen_objects
from benchmarks.plots import bars, lines
from benchmarks.variants import PAGE_SIZE, PARTS, decode_speed
from engine import Engine, Request
from model import GPT, ModelConfig


def make_model(sizes, device, dtype, **keys):
    shape = {"n_layer": sizes.layers, "n_head": sizes.heads, "n_embd": 64 * sizes.heads, "vocab_size": sizes.vocab_size}
    model = GPT(ModelConfig(**{**shape, "max_seq_len": sizes.max_seq_len, **keys}))
    model.init_weights(1)
    return model.to(device, dtype).eval()


def shape_text(config):
    return f"n_layer {config.n_layer}, n_head {config.n_head}, head_dim {config.head_dim}"


def grouping_shrinks_the_cache(sizes, device, dtype, rounds):
    """What a token adds: two pools of different size are made, so that all else that an engine holds cancels out."""
    measured, expected = {}, {}
    for attention in ("mha", "gqa", "mqa"):
        model = make_model(sizes, device, dtype, attention=attention)
        small, large = (engine_bytes(model, pages, device) for pages in (sizes.requests, 2 * sizes.requests))
        measured[attention] = (large - small) / (sizes.requests * PAGE_SIZE)
        expected[attention] = model.config.n_kv_head / model.config.n_head
    ratios = {attention: size / measured["mha"] for attention, size in measured.items()}
    texts = [f"{name} {measured[name]:,.0f} bytes a token ({ratios[name]:.4f})" for name in measured]
    return {
        "claim": "MQA and GQA shrink the KV cache to n_kv_head / n_head",
        "formula": f"2 n_layer n_kv_head head_dim values a token, here {shape_text(model.config)}; "
        + ", ".join(f"{name}: {share:.4f} of mha" for name, share in expected.items()),
        "measured": ", ".join(texts),
        "because": cache_objection(ratios, expected),
        "data": {"bytes_per_token": measured, "expected_share": expected},
        "draw": lambda axis: bars(axis, measured, "KV cache, bytes a token"),
    }


def cache_objection(ratios, expected):
    wrong = [name for name in ratios if abs(ratios[name] / expected[name] - 1) > 0.01]
    return f"{wrong[0]} takes {ratios[wrong[0]]:.4f}" if wrong else ""


def engine_bytes(model, num_pages, device):
    """Memory that an engine asks the GPU's allocator for (what it gets may be larger), or without one that of its pages."""

    def requested():
        return torch.cuda.memory_stats(device)["requested_bytes.all.current"]

    gc.collect()
    before = requested() if device.type == "cuda" else 0
    engine = Engine(model, num_pages, page_size=PAGE_SIZE)
    if device.type == "cuda":
        return requested() - before
    return sum(pages.untyped_storage().nbytes() for pages in engine.runner.k + engine.runner.v)


def gqa_decodes_nearly_as_fast(sizes, device, dtype, rounds):
    """From one sequence to many: a step's weights stay the same, and the cache that it reads grows. Whole steps of the
    engine, so the host's work is in them; the three engines take turns.

    Nearly: at least 80% of MQA's speed at every number of sequences.
    """
    size, engines = sizes.decoding, {}
    for attention in ("mha", "gqa", "mqa"):
        model = random_model({**size.shape, **PARTS, "attention": attention}, device, dtype)
        num_pages = max(size.batches) * (size.tokens // PAGE_SIZE + 1)
        engines[attention] = Engine(model, num_pages, PAGE_SIZE, 8192, compile=device.type == "cuda")
    speeds = {attention: {} for attention in engines}
    for batch in size.batches:
        for engine in engines.values():
            decode_speed(engine, size, batch, check=True)  # captures
        with frozen_objects():
            turns = [[decode_speed(engine, size, batch) for engine in engines.values()] for _ in range(rounds)]
        for attention, column in zip(engines, zip(*turns)):
            speeds[attention][batch] = statistics.median(column)
    shares = {batch: speeds["gqa"][batch] / speeds["mqa"][batch] for batch in size.batches}
    read = {name: bytes_of_steps(engine.model, size, dtype) for name, engine in engines.items()}
    by_bytes = {batch: read["mqa"][batch] / read["gqa"][batch] for batch in size.batches}
    config = engines["gqa"].model.config
    engines.clear()
    forget_compiled()
    series = {name: list(points.items()) for name, points in speeds.items()}
    texts = [f"{', '.join(f'{name} {speeds[name][batch]:,.0f}' for name in speeds)} at batch {batch}" for batch in size.batches]
    return {
        "claim": "GQA decodes nearly as fast as MQA",
        "formula": "a step reads all weights once, and 2 n_layer n_kv_head head_dim values a token of each sequence, "
        f"here {shape_text(config)}",
        "measured": f"tokens/s with {size.tokens} tokens a sequence: {'; '.join(texts)}. GQA at "
        f"{percentages(shares)} of MQA, where the bytes that a step reads would make it {percentages(by_bytes)}",
        "because": decoding_objection(shares),
        "data": {
            "tokens_per_s": speeds,
            "bytes_of_a_step": read,
            "shape": size.shape,
            "tokens": size.tokens,
        },
        "draw": lambda axis: lines(axis, series, "sequences at once", "decoded tokens/s"),
    }


def bytes_of_steps(model, size, dtype):
    """{sequences: weights and cache that a decoding step reads}"""
    weights = sum(parameter.nbytes for parameter in model.parameters())  # the embedding, too: it is the head
    return {batch: weights + batch * size.tokens * model.kv_bytes_per_token(dtype.itemsize) for batch in size.batches}


def percentages(shares):
    return ", ".join(f"{share:.0%}" for share in shares.values())


def decoding_objection(shares):
    """shares: {sequences: of MQA's speed}"""
    slow = [batch for batch in shares if shares[batch] < 0.8]
    rest = [str(batch) for batch in shares if batch not in slow]
    but = f", though with {', '.join(rest)} at 80% or more" if rest else ""
    return f"with {slow[0]} sequences it decodes at {shares[slow[0]]:.1%} of MQA's speed{but}" if slow else ""


def random_requests(lengths, seed):
    """Greedy requests of (prompt, new) tokens. Prompts are random, so that no two share a beginning."""
    draw = random.Random(seed)
    return [Request([draw.randrange(256) for _ in range(prompt)], new) for prompt, new in lengths]


def contiguous_caches_waste(sizes, device, dtype, rounds):
    """The same engine, once admitting as many sequences as contiguous caches of max_seq_len tokens would fit.

    Waste is what is reserved and holds no token, over all steps. It follows from the lengths, which are not those of real
    traffic but drawn from the distributions in `mixes`: with others the verdict may be another.

    Holds when it lies in 60 to 80% on both mixes of lengths, that of pages under 4%, and pages run more sequences and
    generate more tokens a second in the same memory.
    """
    waste, shallow = {}, make_model(sizes, device, dtype, n_layer=1)  # depth changes no share
    for name, lengths in mixes(sizes).items():
        waste[name] = wasted(shallow, random_requests(lengths, seed=3), sizes.at_once)
    slots = sizes.at_once // 2
    engine = Engine(make_model(sizes, device, dtype), slots * sizes.max_seq_len // PAGE_SIZE, page_size=PAGE_SIZE)
    lengths = mixes(sizes)["chat"]
    seeds = itertools.count()  # new prompts every time: none is found in the cache
    served = {at_once: [] for at_once in (slots, len(lengths))}
    for at_once in served:
        serve(engine, random_requests(lengths, next(seeds)), at_once)  # captures
    with frozen_objects():
        for _ in range(min(rounds, 3)):  # each serves all requests twice, and they differ by little
            for at_once, turns in served.items():
                turns.append(serve(engine, random_requests(lengths, next(seeds)), at_once))
    (slow, few), (fast, many) = ([statistics.median(column) for column in zip(*turns)] for turns in served.values())
    texts = [f"{name}: contiguous {a:.0%}, pages {b:.1%}" for name, (a, b) in waste.items()]
    return {
        "claim": "Contiguous caches waste 60-80% on mixed lengths, pages under 4%; pages allow larger batches and throughput",
        "formula": f"waste = 1 - cached / reserved; reserved is max_seq_len = {sizes.max_seq_len} tokens a sequence, or its "
        f"pages of {PAGE_SIZE}",
        "measured": f"wasted, {'; '.join(texts)} (the lengths are drawn, chat's from a lognormal "
        f"distribution, uniform's from a uniform one: none is of real traffic). In the memory of {slots} full sequences, "
        f"admitting {slots} and admitting as many as have pages: {few:.0f} and {many:.0f} sequences at once, "
        f"{slow:,.0f} and {fast:,.0f} tokens/s",
        "because": waste_objection(waste, (few, many), (slow, fast)),
        "data": {"waste": waste, "sequences_at_once": (few, many), "tokens_per_s": (slow, fast)},
        "draw": lambda axis: draw_waste(axis, waste),
    }


def waste_objection(waste, sequences, speeds):
    """waste: {name: (contiguous, pages)}; the others: (contiguous, pages)"""
    mixed = [f"{waste[name][0]:.1%} on {name} ones" for name in ("chat", "uniform") if not 0.6 <= waste[name][0] <= 0.8]
    reasons = [f"what contiguous caches waste depends on the lengths: {', '.join(mixed)}"] if mixed else []
    worst = max(waste, key=lambda name: waste[name][1])
    if waste[worst][1] >= 0.04:
        reasons.append(f"pages waste {waste[worst][1]:.1%} on {worst}")
    if sequences[1] <= sequences[0]:
        reasons.append("pages run no more sequences")
    if speeds[1] <= speeds[0]:
        reasons.append("pages are no faster")
    return "; ".join(reasons)


def mixes(sizes):
    """{name: [(prompt, new) tokens, ...]}: short answers to short questions, anything up to half and half, and all full.
    The distributions are assumed, not fitted to real traffic."""
    draw, half = random.Random(0), sizes.max_seq_len // 2

    def short(median):
        return min(half, max(1, round(draw.lognormvariate(0, 0.8) * median)))

    chat = [(short(half / 6), short(half / 3)) for _ in range(sizes.requests)]
    uniform = [(draw.randint(1, half), draw.randint(1, half)) for _ in range(sizes.requests)]
    return {"chat": chat, "uniform": uniform, "full": [(half, half)] * sizes.at_once}


def wasted(model, requests, at_once):
    """(contiguous, pages): shares of the reserved memory that hold no token, with room for everybody."""
    engine = Engine(model, at_once * (model.config.max_seq_len // PAGE_SIZE + 1), page_size=PAGE_SIZE)
    serve(engine, requests, at_once)
    return engine.stats.unused_share_of_reserving, engine.stats.unused_share


def serve(engine, requests, at_once):
    """Run all requests, never more than `at_once` of them in the engine: (tokens/s, mean tokens a step)."""
    waiting, inside, drawn = deque(requests), 0, []
    start = time.perf_counter()
    while waiting or inside:
        while waiting and inside < at_once:
            engine.add(waiting.popleft())
            inside += 1
        news = engine.step()
        drawn.append(len(news))  # one token of each sequence
        inside -= sum(bool(sequence.finished) for sequence, _ in news)
    seconds = time.perf_counter() - start
    return sum(drawn) / seconds, statistics.fmean(drawn)


def draw_waste(axis, waste):
    for offset, label, part in ((-0.2, "contiguous", 0), (0.2, f"pages of {PAGE_SIZE}", 1)):
        xs = [x + offset for x in range(len(waste))]
        axis.bar(xs, [100 * pair[part] for pair in waste.values()], 0.4, label=label)
    axis.set_xticks(range(len(waste)), list(waste))
    axis.set_ylabel("% of reserved memory without a token")
