"""Claims about decoding: the size of the cache, the speed of grouped heads, the memory that pages save."""

import gc
import random
import statistics
import time
from dataclasses import dataclass, field

import torch

from benchmarks.plots import bars
from engine import Engine, Request
from model import GPT, ModelConfig

PAGE_SIZE = 16


def make_model(sizes, device, dtype, **keys):
    shape = {"n_layer": sizes.layers, "n_head": sizes.heads, "n_embd": 64 * sizes.heads, "vocab_size": sizes.vocab_size}
    model = GPT(ModelConfig(**{**shape, "max_seq_len": sizes.max_seq_len, **keys}))
    model.init_weights(1)
    return model.to(device, dtype).eval()


def grouping_shrinks_the_cache(sizes, device, dtype, rounds):
    """What a token adds: two pools of different size are made, so that all else that an engine holds cancels out."""
    measured, expected = {}, {}
    for attention in ("mha", "gqa", "mqa"):
        model = make_model(sizes, device, dtype, attention=attention)
        small, large = (engine_bytes(model, pages, device) for pages in (sizes.requests, 2 * sizes.requests))
        measured[attention] = (large - small) / (sizes.requests * PAGE_SIZE)
        expected[attention] = model.config.n_kv_head / model.config.n_head
    ratios = {attention: size / measured["mha"] for attention, size in measured.items()}
    wrong = [attention for attention in ratios if abs(ratios[attention] / expected[attention] - 1) > 0.01]
    texts = [f"{name} {measured[name]:,.0f} bytes a token ({ratios[name]:.4f})" for name in measured]
    return {
        "claim": "MQA and GQA shrink the KV cache to n_kv_head / n_head",
        "formula": "2 n_layer n_kv_head head_dim bytes a token; "
        + ", ".join(f"{name}: {share:.4f} of mha" for name, share in expected.items()),
        "measured": ", ".join(texts),
        "because": f"{wrong[0]} takes {ratios[wrong[0]]:.4f}" if wrong else "",
        "data": {"bytes_per_token": measured, "expected_share": expected},
        "draw": lambda axis: bars(axis, measured, "KV cache, bytes a token"),
    }


def engine_bytes(model, num_pages, device):
    """Memory that an engine adds to its model's."""
    gc.collect()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    engine = Engine(model, num_pages, page_size=PAGE_SIZE)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) - before
    return sum(tensors_in(engine, {id(model)}).values())


def tensors_in(thing, seen):
    """{storage: bytes} of all tensors that can be reached from an object."""
    if id(thing) in seen:
        return {}
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    inside = list(thing.values()) if isinstance(thing, dict) else list(thing) if isinstance(thing, list | tuple) else []
    found = {}
    for part in [*inside, *getattr(thing, "__dict__", {}).values()]:
        found |= tensors_in(part, seen)
    return found


def gqa_decodes_nearly_as_fast(sizes, device, dtype, rounds):
    """Many long sequences at once, where reading the cache counts most. Nearly: at least 80% of MQA's speed."""
    speeds, batch, length = {}, sizes.decode_batch, sizes.decode_prompt + sizes.decode_new
    for attention in ("mha", "gqa", "mqa"):
        model = make_model(sizes, device, dtype, attention=attention, max_seq_len=length, pos="rope")
        engine = Engine(model, batch * (length // PAGE_SIZE + 2), page_size=PAGE_SIZE)
        lengths = [(sizes.decode_prompt, sizes.decode_new)] * batch
        for seed in (1, 2):  # the first time warms up
            speeds[attention] = decode_speed(engine, random_requests(lengths, seed))
    ratio = speeds["gqa"] / speeds["mqa"]
    return {
        "claim": "GQA decodes nearly as fast as MQA",
        "formula": "a decoded token reads all weights once a step and the sequence's K and V: n_kv_head / n_head of MHA's",
        "measured": f"{batch} sequences of {sizes.decode_prompt} tokens: "
        + f"{', '.join(f'{name} {speed:,.0f}' for name, speed in speeds.items())} tokens/s: GQA at {ratio:.0%} of MQA",
        "because": f"it decodes at {ratio:.0%} of MQA's speed" if ratio < 0.8 else "",
        "data": {"tokens_per_s": speeds},
        "draw": lambda axis: bars(axis, speeds, "decoded tokens/s"),
    }


def random_requests(lengths, seed):
    """Greedy requests of (prompt, new) tokens. Prompts are random, so that no two share a beginning."""
    draw = random.Random(seed)
    return [Request([draw.randrange(256) for _ in range(prompt)], new) for prompt, new in lengths]


def decode_speed(engine, requests):
    """Tokens a second, from the step in which the last sequence has its first token to the end of the first one."""
    sequences = [engine.add(request) for request in requests]
    started = set()
    while len(started) < len(sequences):
        started |= {id(sequence) for sequence, new in engine.step() if new}
    start, tokens = time.perf_counter(), 0
    while not any(sequence.finished for sequence in sequences):
        tokens += sum(len(new) for _, new in engine.step())
    seconds = time.perf_counter() - start
    while engine.has_work():
        engine.step()
    return tokens / seconds


def contiguous_caches_waste(sizes, device, dtype, rounds):
    """The same engine, once admitting as many sequences as contiguous caches of max_seq_len tokens would fit.

    Waste is what is reserved and holds no token. Holds when it lies in 60 to 80% on both mixes of lengths, that of
    pages under 4%, and pages run more sequences and generate more tokens a second in the same memory.
    """
    model, waste = make_model(sizes, device, dtype), {}
    for name, lengths in mixes(sizes).items():
        waste[name] = wasted(model, random_requests(lengths, seed=3), sizes.at_once)
    slots = sizes.at_once // 2
    engine = Engine(model, slots * sizes.max_seq_len // PAGE_SIZE, page_size=PAGE_SIZE)
    lengths = mixes(sizes)["chat"]
    serve(engine, random_requests(lengths, seed=4), len(lengths))  # warms up
    contiguous = serve(engine, random_requests(lengths, seed=5), slots)
    paged = serve(engine, random_requests(lengths, seed=6), len(lengths))
    batches, speeds = (contiguous.batch, paged.batch), (contiguous.speed, paged.speed)
    mixed = [waste[name][0] for name in ("chat", "uniform")]
    because = []
    if not all(0.6 <= share <= 0.8 for share in mixed):
        because.append(
            f"the waste is 1 - mean length / max_seq_len and so the workload's: {mixed[0]:.0%} and {mixed[1]:.0%}"
        )
    if max(pages for _, pages in waste.values()) >= 0.04:
        worst = max(waste, key=lambda name: waste[name][1])
        because.append(f"pages waste half a page a sequence, {waste[worst][1]:.1%} on {worst}")
    if batches[1] <= batches[0] or speeds[1] <= speeds[0]:
        because.append("pages were not faster")
    texts = [f"{name}: contiguous {a:.0%}, pages {b:.1%}" for name, (a, b) in waste.items()]
    return {
        "claim": "Contiguous caches waste 60-80% on mixed lengths, pages under 4%; pages allow larger batches and throughput",
        "formula": f"waste = 1 - cached / reserved; reserved is max_seq_len = {sizes.max_seq_len} a sequence, or its pages of {PAGE_SIZE}",
        "measured": f"wasted, {'; '.join(texts)}. In the memory of {slots} full sequences: {batches[0]:.0f} and {batches[1]:.0f} "
        f"sequences at once, {speeds[0]:,.0f} and {speeds[1]:,.0f} tokens/s",
        "because": "; ".join(because),
        "data": {"waste": waste, "sequences_at_once": batches, "tokens_per_s": speeds},
        "draw": lambda axis: draw_waste(axis, waste),
    }


def mixes(sizes):
    """{name: [(prompt, new) tokens, ...]}: short answers to short questions, anything up to half and half, and all full."""
    draw, half = random.Random(0), sizes.max_seq_len // 2

    def short(median):
        return min(half, max(1, round(draw.lognormvariate(0, 0.8) * median)))

    chat = [(short(half / 6), short(half / 3)) for _ in range(sizes.requests)]
    uniform = [(draw.randint(1, half), draw.randint(1, half)) for _ in range(sizes.requests)]
    return {"chat": chat, "uniform": uniform, "full": [(half, half)] * sizes.at_once}


def wasted(model, requests, at_once):
    """(contiguous, pages): shares of the reserved memory that hold no token, with room for everybody."""
    length = model.config.max_seq_len
    engine = Engine(model, at_once * (length // PAGE_SIZE + 1), page_size=PAGE_SIZE)
    served = serve(engine, requests, at_once)
    reserved = [running * length for running in served.running]
    pages = 1 - max(served.cached) / (engine.stats.peak_pages * PAGE_SIZE)
    return 1 - sum(served.cached) / sum(reserved), pages


@dataclass
class Served:
    seconds: float = 0.0
    tokens: int = 0
    running: list = field(default_factory=list)  # sequences with a token, after each step
    cached: list = field(default_factory=list)  # tokens of theirs in the cache then

    @property
    def speed(self):
        return self.tokens / self.seconds

    @property
    def batch(self):
        return statistics.fmean(self.running)


def serve(engine, requests, at_once):
    """Run all requests, never more than `at_once` of them in the engine."""
    served, waiting, lengths, inside = Served(), list(reversed(requests)), {}, 0
    start = time.perf_counter()
    while waiting or engine.has_work():
        while waiting and inside < at_once:
            engine.add(waiting.pop())
            inside += 1
        news = engine.step()
        for sequence, new in news:
            lengths[sequence] = lengths.get(sequence, len(sequence.request.prompt) - 1) + len(
                new
            )  # the last is not cached
            served.tokens += len(new)
        served.running.append(len(lengths))
        served.cached.append(sum(lengths.values()))
        for sequence in [sequence for sequence in lengths if sequence.finished]:
            del lengths[sequence]
            inside -= 1
    served.seconds = time.perf_counter() - start
    return served


def draw_waste(axis, waste):
    for offset, label, part in ((-0.2, "contiguous", 0), (0.2, f"pages of {PAGE_SIZE}", 1)):
        xs = [x + offset for x in range(len(waste))]
        axis.bar(xs, [100 * pair[part] for pair in waste.values()], 0.4, label=label)
    axis.set_xticks(range(len(waste)), list(waste))
    axis.set_ylabel("% of reserved memory without a token")
