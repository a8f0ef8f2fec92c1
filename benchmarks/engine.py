"""Whole runs of the engine, random weights: on a GPU loads that people serve, on a CPU GPT-2 beside transformers."""

import itertools
import random
import statistics
import time
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import forget_compiled, frozen_objects, write_results
from benchmarks.plots import pyplot
from device import pick_device, pick_dtype
from engine import Engine, Request, Stats, generate
from kernels import reference
from model import GPT, ModelConfig

PROMPT, NEW = 128, 64  # tokens of a sequence in bench_beside_transformers

GPT2 = {"vocab_size": 50304}  # padded, as configs/gpt2_124m.toml trains it: an odd number makes the head slow on GPUs
GPT2_IDS = 50257  # those that its tokenizer knows
QWEN3 = {  # Qwen3-0.6B
    "n_layer": 28,
    "n_embd": 1024,
    "n_head": 16,
    "n_kv_head": 8,
    "head_dim": 128,
    "attention": "gqa",
    "mlp": "swiglu",
    "mlp_hidden": 3072,
    "qk_norm": True,
    "pos": "rope",
    "rope_theta": 1e6,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "bias": False,
    "vocab_size": 151936,
    "max_seq_len": 4096,
}


TOP_50 = {"temperature": 1.0, "top_k": 50}


class Load(NamedTuple):
    """Requests that come all at once: prompt and new tokens of each, from least to most."""

    name: str
    shape: dict  # of the model
    vocab_size: int  # ids from here on only pad that of the shape
    requests: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    drawing: dict
    max_tokens_per_step: int = 8192


LOADS = (
    Load("GPT-2 124M, 1 stream", GPT2, GPT2_IDS, 1, (128, 128), (256, 256), TOP_50),
    Load("GPT-2 124M, 64 streams", GPT2, GPT2_IDS, 64, (128, 128), (256, 256), TOP_50),
    Load("GPT-2 124M, 256 requests", GPT2, GPT2_IDS, 256, (100, 512), (256, 256), TOP_50),
    Load("Qwen3-0.6B, 1 stream", QWEN3, QWEN3["vocab_size"], 1, (100, 100), (1024, 1024), {"temperature": 0.6}),
    Load("Qwen3-0.6B, 256 requests", QWEN3, QWEN3["vocab_size"], 256, (100, 1024), (100, 1024), {"temperature": 0.6}),
)


def bench_engine(config):
    device = pick_device("auto")
    if device.type == "cuda":
        bench_loads(config, device)
    else:
        bench_beside_transformers(config, device)


def show(row):
    cells = (f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print("  ".join(cells), flush=True)


# On a GPU


def bench_loads(config, device):
    rows, traces = [], {}
    for shape in (GPT2, QWEN3):
        model = random_model(shape, device, torch.bfloat16)
        loads = [load for load in LOADS if load.shape is shape]
        validate_loads(model, loads[0].vocab_size)
        for load in loads:
            row, traces[load.name] = measure_load(model, load, config.rounds)
            rows.append(row)
            show(row)
        del model
        forget_compiled()
    write_results(Path(config.out_dir, f"engine-{device.type}.json"), device, torch.bfloat16, rows=rows)
    plot_memory(traces[LOADS[-1].name], Path(config.out_dir, "engine.png"))


def random_model(shape, device, dtype):
    with torch.device(device):
        model = GPT(ModelConfig(**shape)).to(dtype).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.02)
    return model


def measure_load(model, load, rounds):
    """(row of the results, [(tokens, slots held, slots if each sequence had max_seq_len), ...] over the steps)."""
    engine = Engine(model, None, 16, load.max_tokens_per_step, load.vocab_size, memory_fraction=0.7, compile=True)
    serve(engine, requests_of(load, seed=0))  # compiles and captures all that the load needs
    turns = []
    with frozen_objects():
        for turn in range(1, rounds + 1):
            engine.stats = Stats()
            requests = requests_of(load, seed=turn)  # new prompts: those of the last turn are still in the cache
            turns.append((*serve(engine, requests), engine.stats))
    seconds, trace, stats = sorted(turns, key=itemgetter(0))[len(turns) // 2]  # all figures are those of the median turn
    new = sum(request.max_new_tokens for request in requests)  # the same in all turns, as far as lengths go
    return {
        "load": load.name,
        "new_tokens": new,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "seconds": seconds,
        "tokens_per_s": new / seconds,
        "prefill_tokens_per_s": stats.prefill_tokens / stats.prefill_s,
        "decode_tokens_per_s": stats.decode_tokens / stats.decode_s,
        "peak_pages": stats.peak_pages,
        "unused_share": stats.unused_share,
        "unused_share_of_reserving": stats.unused_share_of_reserving,
        "preemptions": stats.preemptions,
        "graphs": len(engine.runner.graphs),
    }, trace


def requests_of(load, seed):
    """The load's requests: the same lengths whatever the seed, other tokens."""
    lengths, tokens = random.Random(0), random.Random(seed)
    sizes = [(lengths.randint(*load.prompt), lengths.randint(*load.new)) for _ in range(load.requests)]
    texts = [[tokens.randrange(load.vocab_size) for _ in range(prompt)] for prompt, _ in sizes]
    return [
        Request(text, new, seed=seed * load.requests + i, **load.drawing)
        for i, (text, (_, new)) in enumerate(zip(texts, sizes))
    ]


def serve(engine, requests):
    """Run the requests to their ends. Returns the seconds and what `measure_load` returns as its trace."""
    stats, counts = engine.stats, [(0, 0, 0)]
    start = time.perf_counter()
    sequences = [engine.add(request) for request in requests]
    while engine.has_work():
        engine.step()
        counts.append((stats.filled_slots, stats.held_slots, stats.reserved_slots))
    seconds = time.perf_counter() - start
    if any(len(sequence.generated) != sequence.request.max_new_tokens for sequence in sequences):
        raise RuntimeError("a sequence ended before its last token")
    return seconds, [tuple(b - a for a, b in zip(*pair)) for pair in itertools.pairwise(counts)]


def validate_loads(model, vocab_size=0):
    """Graphs, overlap and compiled Blocks on prompts of several lengths, beside the definition. No id from vocab_size
    on may be drawn; 0: the model's."""
    vocab_size = vocab_size or model.config.vocab_size
    prompts = [
        torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 17, 64, 200)
    ]
    engine = Engine(model, 200, 16, 100, vocab_size, compile=True)
    sequences = [engine.add(Request(prompt, 12)) for prompt in prompts]
    while engine.has_work():
        engine.step()
    for prompt, sequence in zip(prompts, sequences):
        check_greedy(model, prompt, sequence.generated, vocab_size)


@torch.inference_mode()
def check_greedy(model, prompt, generated, vocab_size=None):
    """Each decoded token must be the likeliest by the definition, or as likely but for rounding: a text that looks at
    wrong keys falls behind by more than a standard deviation of the logits."""
    tokens = torch.tensor([prompt + generated], device=next(model.parameters()).device)
    features = model.features(tokens, lambda layer, q, k, v, window: reference.attention(q, k, v, window))
    logits = model.logits(features)[0, len(prompt) - 1 : -1, :vocab_size].float()
    behind = (logits.amax(dim=-1) - logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]).max().item()
    if not behind < (0.001 if features.dtype == torch.float32 else 0.2) * logits.std().item():
        raise RuntimeError(f"decoding does not follow the model: a token is {behind:.3g} behind the likeliest")


def plot_memory(trace, path):
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for column, label, style in ((2, "max_seq_len reserved for each sequence", "-"), (0, "tokens", "-"), (1, "pages held", "--")):
        axis.plot([row[column] / 1000 for row in trace], style, label=label)
    axis.set(xlabel="step", ylabel="KV cache, thousand tokens", title=LOADS[-1].name)
    axis.legend()
    figure.savefig(path, dpi=120)


# On a CPU


def bench_beside_transformers(config, device):
    dtype = pick_dtype("auto", device)
    model = GPT(ModelConfig(vocab_size=GPT2_IDS))
    model.init_weights(1)
    model.to(device, dtype).eval()
    contestants = {"ours": lambda prompts, new: generate(model, prompts, new)}
    theirs = transformers_gpt2(device, dtype)
    if theirs:
        contestants["transformers"] = theirs
    check_greedy(model, [1, 2, 3], *generate(model, [[1, 2, 3]], 8))
    rows = []
    for batch in (1, 16):
        prompts = torch.randint(GPT2_IDS, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
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
            show(row)
    path = Path(config.out_dir, f"engine-{device.type}.json")
    write_results(path, device, dtype, shape="GPT-2 124M", prompt=PROMPT, new_tokens=1 + NEW, rows=rows)


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
