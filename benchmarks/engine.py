"""Greedy decoding with GPT-2 124M's shape and random weights, beside transformers' cached generate."""

import statistics
import time
from pathlib import Path

import torch

from benchmarks.measure import write_results
from device import pick_device, pick_dtype
from engine import generate
from kernels import reference
from model import GPT, ModelConfig

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
