"""What the attention type buys, for one shape: cache bytes a token, sequences in a given memory, decoded tokens/s."""

import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.engine import check_greedy, random_model
from benchmarks.measure import forget_compiled, frozen_objects, write_results
from benchmarks.plots import bars, lines, pyplot
from device import pick_device, pick_dtype
from engine import Engine, Request, groups_of
from paging import most_pages
from runlog import variant
from runner import page_bytes
from sequence import Sequence

PAGE_SIZE = 16
VARIANTS = (
    {"attention": "mha"},
    {"attention": "gqa"},
    {"attention": "mqa"},
    {"attention": "swa"},
    {"attention": "swa", "window_pattern": "LLLG"},
)


class Sizes(NamedTuple):
    shape: dict  # of the model
    tokens: int  # of each sequence, a multiple of the page size
    cache_bytes: int
    batches: tuple[int, ...]
    steps: int  # timed


# The first is as large as Llama 3.2 1B. On a CPU the table is only as good as its shape is small.
SIZES = {
    "cuda": Sizes(
        {"n_layer": 16, "n_embd": 2048, "n_head": 32, "mlp_hidden": 8192, "vocab_size": 32768, "max_seq_len": 2048},
        tokens=2048,
        cache_bytes=40 * 2**30,
        batches=(1, 16, 64, 256),
        steps=64,
    ),
    "cpu": Sizes(
        {"n_layer": 4, "n_embd": 128, "n_head": 8, "mlp_hidden": 256, "vocab_size": 512, "max_seq_len": 128},
        tokens=128,
        cache_bytes=8 * 2**20,
        batches=(1, 4, 16),
        steps=16,
    ),
}
PARTS = {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}


def bench_variants(config):
    device = pick_device("auto")
    dtype, sizes = pick_dtype("auto", device), SIZES["cuda" if device.type == "cuda" else "cpu"]
    rows = []
    memory = f"{sizes.cache_bytes / 2**20:,.0f} MiB"
    print(f"cache bytes a token; sequences of {sizes.tokens:,} tokens in {memory}; decoded tokens/s of so many at once:")
    print(f"{'':16}{'bytes/token':>12}{'sequences':>11}" + "".join(f"{f'batch {batch}':>12}" for batch in sizes.batches))
    for attention in VARIANTS:
        model = random_model({**sizes.shape, **PARTS, **attention}, device, dtype)
        row = measure_variant(model, sizes, config.rounds)
        numbers = {key: getattr(model.config, key) for key in ("attention", "n_kv_head", "window", "window_pattern")}
        rows.append({"variant": variant(model.config), **numbers, **row})
        speeds = [f"{speed:,.0f}" if speed else "too many" for speed in row["decode_tokens_per_s"].values()]
        cells = [f"{row['kv_bytes_per_token']:12,}{row['largest_batch']:11,}", *(f"{speed:>12}" for speed in speeds)]
        print(f"{rows[-1]['variant']:16}" + "".join(cells), flush=True)
        del model
        forget_compiled()
    path = Path(config.out_dir, "variants" if device.type == "cuda" else f"variants-{device.type}")
    facts = {"shape": sizes.shape | PARTS, "tokens": sizes.tokens, "cache_bytes": sizes.cache_bytes}
    write_results(path.with_suffix(".json"), device, dtype, **facts, page_size=PAGE_SIZE, rows=rows)
    plot_variants(rows, sizes, path.with_suffix(".png"))


def measure_variant(model, sizes, rounds):
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    groups = groups_of(model.config)
    num_pages = sizes.cache_bytes // page_bytes(model.config, groups, PAGE_SIZE, dtype)
    most = max(*sizes.batches, 2 * num_pages // most_pages(groups, PAGE_SIZE, sizes.tokens))
    engine = Engine(model, num_pages, PAGE_SIZE, 8192, max_num_seqs=most, compile=device.type == "cuda")
    largest = fill(engine, sizes.tokens)
    speeds = {}
    for batch in sizes.batches:
        speeds[batch] = None
        if batch <= largest:
            decode_speed(engine, sizes, batch, check=True)  # compiles and captures
            with frozen_objects():
                speeds[batch] = statistics.median(decode_speed(engine, sizes, batch) for _ in range(rounds))
    return {
        "kv_bytes_per_token": model.kv_bytes_per_token(dtype.itemsize),
        "largest_batch": largest,
        "decode_tokens_per_s": speeds,
    }


def fill(engine, tokens):
    """Let sequences of so many tokens take pages until there are too few for one more. Returns how many there are.

    Each must hold exactly what the formula says: its tokens, or of a windowed model those that the next token sees, to
    the page.
    """
    tables, config, sequences = engine.tables, engine.model.config, []
    text = [0] * tokens
    while True:
        sequence = Sequence(Request(text, 1))
        if not tables.admit(sequence):
            break
        sequences.append(sequence)
        while sequence.num_computed < tokens:
            sequence.num_computed += tables.reserve(sequence, min(PAGE_SIZE, tokens - sequence.num_computed))
            tables.slide(sequence)
    seen = [tokens - max(0, tokens + 1 - window) // PAGE_SIZE * PAGE_SIZE if window else tokens for window in config.windows]
    bytes_per_value = engine.runner.k[0].element_size()
    expected = len(sequences) * sum(seen) * config.n_kv_head * config.head_dim * 2 * bytes_per_value
    held = sum(pages[: tables.allocator.num_held].nbytes for pages in engine.runner.k + engine.runner.v)
    if held != expected:
        raise RuntimeError(f"{len(sequences)} sequences of {tokens} tokens hold {held} bytes, not {expected}")
    for sequence in sequences:
        tables.release(sequence)
    return len(sequences)


def decode_speed(engine, sizes, batch, check=False):
    """Tokens/s of `batch` sequences that all decode, at the end of their tokens. The prompts are the same in each turn,
    which finds them in the cache and has only to decode. With check, the last sequence must follow the model."""
    draw, vocab = random.Random(batch), engine.vocab_size
    new = sizes.steps + 16  # the first ones may be drawn while others still compute their prompts
    waits = sizes.tokens * batch // engine.max_tokens_per_step + 2
    prompt = sizes.tokens - new - waits
    prompts = [[draw.randrange(vocab) for _ in range(prompt)] for _ in range(batch)]
    sequences = [engine.add(Request(tokens, new + waits)) for tokens in prompts]
    while not all(sequence.generated for sequence in sequences):
        engine.step()
    start = time.perf_counter()
    drawn = sum(len(engine.step()) for _ in range(sizes.steps))
    speed = drawn / (time.perf_counter() - start)
    while engine.has_work():
        engine.step()
    if check:
        check_greedy(engine.model, prompts[-1], sequences[-1].generated)
    return speed


def plot_variants(rows, sizes, path):
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(16, 4), layout="constrained")
    most = f"sequences of {sizes.tokens} tokens in {sizes.cache_bytes / 2**20:,.0f} MiB"
    bars(axes[0], {row["variant"]: row["kv_bytes_per_token"] / 1024 for row in rows}, "KV cache a token, KiB")
    bars(axes[1], {row["variant"]: row["largest_batch"] for row in rows}, most)
    speeds = {row["variant"]: [point for point in row["decode_tokens_per_s"].items() if point[1]] for row in rows}
    lines(axes[2], speeds, "batch", f"decoded tokens/s at {sizes.tokens} tokens")
    axes[2].legend()
    figure.savefig(path, dpi=120)
