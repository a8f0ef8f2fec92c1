"""A training step of GPT-2 124M, compiled, with our attention kernels and with each of torch's, for each attention type.

FlexAttention takes part with windows alone: torch's other backends have none, so that they compute masked blocks.
"""

from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.attention import block_mask
from benchmarks.measure import forget_compiled, leave_out, median_ms, write_results
from device import peak_flops
from kernels import sdpa
from model import GPT, ModelConfig, dense_attention

MICRO_BATCH, T = 32, 1024
BACKENDS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def bench_train(config):
    device = torch.device("cuda")
    peers = [peer for peer in config.peers.split(",") if peer in ("ours", "flex", *BACKENDS)]
    rows = []
    for attention in ("mha", "mqa", "gqa", "swa"):
        shape = ModelConfig(vocab_size=50304, max_seq_len=T, bias=False, attention=attention)
        tokens = torch.randint(shape.vocab_size, (MICRO_BATCH, T + 1), device=device)
        steps, losses = {}, {}
        for peer in peers:
            if peer == "flex" and attention != "swa":
                continue
            step = make_step(shape, peer, tokens)
            try:
                losses[peer] = [step().item() for _ in range(3)]
            except RuntimeError as error:  # how torch says that a backend cannot do this shape
                leave_out(peer, error, attention)
            else:
                steps[peer] = step
        validate(attention, losses)
        flops = GPT(shape).flops_per_token(T)
        for peer, ms in median_ms(steps, config.rounds).items():
            speed = MICRO_BATCH * T / ms * 1000
            row = {"attention": attention, "peer": peer, "step_ms": ms, "tokens_per_s": speed}
            row["mfu"] = speed * flops / peak if (peak := peak_flops(device)) else None
            rows.append(row)
            print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()), flush=True)
        steps.clear()
        forget_compiled()
    write_results(Path(config.out_dir, "train.json"), device, torch.bfloat16, micro_batch=MICRO_BATCH, seq_len=T, rows=rows)


def make_step(shape, peer, tokens):
    """step() does what a step of train.py does on the device, and returns the loss. The learning rate is that of a warm-up's
    beginning: larger first steps of AdamW would blow roundings up until no losses could be compared."""
    model = GPT(shape)
    model.init_weights(1)
    model.to(tokens.device)
    model.compile_for_training()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, betas=(0.9, 0.95), fused=True)
    attend = contestant(peer, shape, tokens.device)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:], attend).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def contestant(peer, shape, device):
    """attend(layer, q, k, v, window), as the model calls it."""
    if peer == "ours":
        return dense_attention("triton", device, torch.bfloat16, shape.head_dim)
    return flex_attend(block_mask(T, shape.window)) if peer == "flex" else sdpa_attend(BACKENDS[peer])


def flex_attend(mask):
    def attend(layer, q, k, v, window):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=mask).transpose(1, 2)

    return attend


def sdpa_attend(backend):
    """Names the backend where the compiler sees it: what it compiled under another one it would otherwise use again."""

    def attend(layer, q, k, v, window):
        with sdpa_kernel(backend):
            return sdpa.attention(q, k, v, window)

    return attend


def validate(attention, losses):
    """The same losses over three updates, whoever computes attention."""
    for values in zip(*losses.values(), strict=True):
        if not max(values) - min(values) < 0.005:
            raise RuntimeError(f"{attention}: the losses differ by contestant: {losses}")
