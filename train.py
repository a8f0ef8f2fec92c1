"""Train a decoder on prepared tokens.

    python train.py configs/quickstart.toml
    python train.py configs/gpt2_124m.toml --attention=gqa --out_dir=out/124m-gqa
    torchrun --nproc_per_node=8 train.py configs/gpt2_124m.toml

The same command again goes on from the newest checkpoint. SIGTERM and Ctrl-C save and exit.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import signal
import zlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from config import UserError, parse, pathname, run
from data.loader import TokenData, folder_of
from data.prepare import prepare_stdlib
from data.tokenizer import from_spec
from device import pick_device, pick_dtype
from engine import generate
from model import GPT, ModelConfig, dense_attention
from runlog import MOVES_NO_LOSS, RunLog, claimed


@dataclass(frozen=True)
class TrainConfig:
    data: Annotated[pathname, "a name below data/, or the path of a prepared folder"] = "stdlib"
    out_dir: Annotated[pathname, "run folder; wandb shows its last part as the run's name"] = "out/run"
    seed: Annotated[int, "of the initial weights, the order of the data and dropout"] = 1
    batch_size: Annotated[int, "sequences per optimizer step, over all devices"] = 32
    micro_batch_size: Annotated[int, "sequences per device and forward pass; 0: the whole share, no accumulation"] = 0
    max_steps: Annotated[int, "optimizer steps"] = 2000
    learning_rate: Annotated[float, "its peak"] = 6e-4
    min_lr: Annotated[float, "the learning rate at the end"] = 6e-5
    warmup_steps: Annotated[int, "steps of linear rise"] = 100
    lr_schedule: Annotated[Literal["cosine", "wsd"], "wsd: stable, then linear decay over the last fifth"] = "cosine"
    weight_decay: Annotated[float, "on matrices and embeddings; vectors have none"] = 0.1
    beta1: Annotated[float, "AdamW's"] = 0.9
    beta2: Annotated[float, "AdamW's"] = 0.95
    grad_clip: Annotated[float, "largest gradient norm; 0: no limit"] = 1.0
    optimizer: Annotated[Literal["adamw"], "fused on every device"] = "adamw"
    eval_interval: Annotated[int, "steps between evaluations; the last step always has one"] = 250
    eval_tokens: Annotated[int, "validation tokens, the same ones every time"] = 262_144
    log_interval: Annotated[int, "steps between progress lines"] = 10
    save_interval: Annotated[int, "steps between checkpoints; the last step always has one"] = 250
    keep_checkpoints: Annotated[int, "newest checkpoints kept, besides the best"] = 2
    resume: Annotated[Literal["auto", "never"], "auto: go on from the newest checkpoint of out_dir"] = "auto"
    init_from: Annotated[pathname, "run folder whose weights to start from; empty: random weights"] = ""
    device: Annotated[Literal["auto", "cuda", "mps", "cpu"], "auto: the best there is"] = "auto"
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], "of matrix products; auto: bfloat16 on GPUs that have it"] = "auto"
    compile: Annotated[Literal["auto", "on", "off"], "torch.compile; auto: on for CUDA"] = "auto"
    attention_impl: Annotated[Literal["auto", "triton", "sdpa", "reference"], "auto: the fastest of this device"] = "auto"
    wandb: Annotated[Literal["disabled", "offline", "online"], "offline writes below out_dir"] = "offline"
    wandb_project: Annotated[str, "project name in wandb"] = "attention"
    wandb_group: Annotated[str, "group in wandb; empty: one for all runs that differ in attention and seed alone"] = ""

    def __post_init__(self):
        one_or_more = ("batch_size", "max_steps", "eval_interval", "eval_tokens", "log_interval", "save_interval", "keep_checkpoints")
        for key, value in dataclasses.asdict(self).items():
            least = int(key in one_or_more)
            most = math.inf if isinstance(value, float) else {"seed": 2**63, "batch_size": 2**24}.get(key, 2**31)
            if isinstance(value, (int, float)) and not least <= value < most:
                raise ValueError(f"{key} takes a number from {least} on, below {most}, got {value}")
        for key in ("out_dir", "data"):
            if not getattr(self, key):
                raise ValueError(f"{key} takes a name, got none")
        if not self.out_dir.isprintable():  # not UTF-8, say, which safetensors and wandb cannot write
            raise ValueError(f"out_dir takes a name that can be printed, got {self.out_dir!r}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr takes at most learning_rate={self.learning_rate}, got {self.min_lr}")
        for key in ("beta1", "beta2"):
            if getattr(self, key) >= 1:
                raise ValueError(f"{key} takes a number in [0, 1), got {getattr(self, key)}")


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started; alone, rank 0 of 1."""

    rank: int
    world: int
    device: torch.device


def main(argv):
    words, model_config, config = parse(argv, ModelConfig, TrainConfig, usage=__doc__)
    if words:
        raise UserError(f"train.py takes *.toml files and --key=value flags, got {words[0]!r}")
    try:
        rank, world, index = (int(os.environ.get(*pair)) for pair in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK are numbers that torchrun sets: {error}; unset them") from None
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} is none of WORLD_SIZE={world} processes; start with torchrun, or unset both")
    process = Process(rank, world, pick_device(config.device, index))
    with claimed(config.out_dir) if rank == 0 else contextlib.nullcontext():
        if world == 1:
            train(model_config, config, process)
        else:
            train_together(model_config, config, process)


def train_together(model_config, config, process):
    """The same in each of the processes that torchrun started."""
    on_cuda = process.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(process.device)
    try:
        dist.init_process_group("nccl" if on_cuda else "gloo")
    except ValueError as error:
        raise UserError(f"WORLD_SIZE={process.world} without what else torchrun sets: {error}; start with torchrun") from None
    try:
        train(model_config, config, process)
        dist.barrier()  # nobody leaves while another still saves
    finally:
        gc.collect()  # DDP's reference cycles keep the group alive, whose threads must end before the interpreter does
        dist.destroy_process_group()


def train(model_config, config, process):
    device, world = process.device, process.world
    on_cuda = device.type == "cuda"
    micro_batch = micro_batch_size(config, world)
    data = open_data(config, model_config, process)
    tokenizer = from_spec(data.tokenizer_spec)  # here, because its tables may have to be fetched
    if tokenizer.vocab_size != data.vocab_size:
        known = f"{data.vocab_size} tokens in vocab_size, {tokenizer.vocab_size} in its tokenizer"
        raise UserError(f"meta.json of data={config.data} contradicts itself: {known}; prepare the data again")
    prompt = data.val_rows(1)[0, : min(16, 1 + model_config.max_seq_len // 2)].tolist()  # what samples continue
    dtype = pick_dtype(config.dtype, device)
    try:
        attend = dense_attention(config.attention_impl, device, dtype, model_config.head_dim)
    except ValueError as error:
        raise UserError(error) from None
    if on_cuda:
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay float32

    model = GPT(with_vocabulary(model_config, data))
    model.init_weights(config.seed)
    model.to(device)
    optimizer = make_optimizer(model, config)
    state = resume(model, optimizer, config, data)
    if state["step"] >= config.max_steps:  # before RunLog: the folder goes on to say what the run was measured on
        if process.rank == 0:
            print(f"{config.out_dir}: done at step {state['step']} already; give more max_steps to go on")
        return
    if config.compile == "on" or (config.compile == "auto" and on_cuda):
        model.compile_for_training()
    net = DistributedDataParallel(model, device_ids=[device.index] if on_cuda else None) if world > 1 else model

    def losses(rows):
        """(B, T + 1) token ids to (B, T) losses."""
        rows = torch.from_numpy(rows)
        if on_cuda:  # from pinned memory the copy does not wait for the device
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return net(rows[:, :-1], rows[:, 1:], attend)

    guard = FiniteGuard(optimizer, process)
    log = RunLog(model, config, data, device, dtype, world, state) if process.rank == 0 else None
    stop = catch_signals()
    step = state["step"]
    while step < config.max_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        if model.config.dropout:  # masks are a function of (seed, step, rank), so a resumed run draws the same ones
            torch.manual_seed(zlib.crc32(f"{config.seed} {step} {process.rank}".encode()))
        loss = torch.zeros((), device=device)
        for rows, is_last in micro_batches(data, step, config.batch_size, micro_batch, process):
            # DDP decides in the forward pass whether the backward pass will reduce: both stand under no_sync
            with contextlib.nullcontext() if is_last or world == 1 else net.no_sync():
                part = losses(rows).mean() * (micro_batch * world / config.batch_size)
                part.backward()
            loss += part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        loss = guard.watch(step, loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        # The host waits for the device only at these steps; a signal is obeyed at once, or with several processes at
        # the next such step, so that all of them leave together.
        last = step == config.max_steps
        log_due, eval_due, save_due = (
            last or step % interval == 0 for interval in (config.log_interval, config.eval_interval, config.save_interval)
        )
        if not (log_due or eval_due or save_due or (stop and world == 1)):
            continue
        stopping = guard.inspect(bool(stop))
        if log:
            log.progress(step, loss.item(), grad_norm.item(), learning_rate(step - 1, config))
        val_loss = None
        if eval_due:  # when stopping, too: nobody would make up for it
            net.eval()
            val_loss, stderr = evaluate(losses, data, config.eval_tokens, micro_batch, process)
            if log:
                log.evaluation(step, val_loss, stderr, sample_text(model, tokenizer, prompt, config.seed))
            net.train()
        if log:
            if save_due or stopping:
                state = {"step": step, "time_s": log.time_s(), "val_loss": val_loss, "tokenizer": data.tokenizer_spec}
                state["train"] = lasting_settings(config, data)
                checkpoint.save(config.out_dir, model, optimizer, state, config.keep_checkpoints)
            log.restart_clock()
        if stopping:
            break
    if log:
        log.close(step)


def micro_batch_size(config, world):
    """Sequences per device and forward pass, once it is sure that the batch divides."""
    micro = config.micro_batch_size or config.batch_size // world
    if micro == 0 or config.batch_size % (micro * world):
        raise UserError(
            f"batch_size={config.batch_size} must be a multiple of micro_batch_size={config.micro_batch_size or micro} "
            f"times the number of processes, {world}"
        )
    return micro


def open_data(config, model_config, process):
    """The prepared tokens; the standard library's are prepared here when they are missing."""
    folder = folder_of(config.data)
    if config.data == "stdlib" and not folder.exists() and process.rank == 0:
        prepare_stdlib(folder)
    if process.world > 1:
        dist.barrier()
    return TokenData(folder, model_config.max_seq_len, config.seed)


def with_vocabulary(model_config, data):
    if model_config.vocab_size == 0:
        return dataclasses.replace(model_config, vocab_size=data.vocab_size)
    if model_config.vocab_size < data.vocab_size:
        raise UserError(
            f"vocab_size={model_config.vocab_size} is smaller than the tokenizer's {data.vocab_size}; "
            f"take that, more, or 0 for the tokenizer's"
        )
    return model_config


def make_optimizer(model, config):
    """AdamW with weight decay on matrices only. Fused, because `FiniteGuard` needs its found_inf."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def lasting_settings(config, data):
    """The train settings that a run keeps to its end, and what identifies its data: the content, wherever it lies."""
    free = MOVES_NO_LOSS | {"max_steps", "eval_interval"}  # people extend runs, and look at them more often
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
    digest = hashlib.sha256(json.dumps(data.meta["splits"], sort_keys=True).encode()).hexdigest()
    return {**settings, "data": f"sha256 {digest[:12]}"}


def resume(model, optimizer, config, data):
    """Fill model and optimizer from the newest checkpoint, or the model from init_from. Returns the state to go on from."""
    folder = checkpoint.newest(config.out_dir)
    if folder and config.resume == "never":
        raise UserError(f"{config.out_dir} holds checkpoints and resume=never; give another out_dir or remove that folder")
    new = {"step": 0, "time_s": 0.0}
    if not folder and not config.init_from:
        return new
    source = folder or checkpoint.newest(config.init_from)
    if not source:
        raise UserError(f"init_from={config.init_from} holds no complete checkpoint; give the out_dir of a run")
    saved = checkpoint.read_state(source)
    there = {**saved["model"], "tokenizer": saved["tokenizer"]}
    here = {**dataclasses.asdict(model.config), "tokenizer": data.tokenizer_spec}
    if folder:  # the same run goes on; from other weights, a new one may train in its own way
        if not isinstance(saved.get("train"), dict):
            raise UserError(
                f"{source} does not say how it was trained: its state.json lacks train; "
                f"give another out_dir, and --init_from={config.out_dir} to start from its weights"
            )
        there |= saved["train"]
        here |= lasting_settings(config, data)
    else:
        here.pop("dropout")  # no part of the weights
    changed = [f"{key}: {there.get(key)} there, {value} here" for key, value in here.items() if there.get(key) != value]
    if changed:
        other = "out_dir" if folder else "init_from"
        raise UserError(f"{source} was trained with other settings; give another {other}, or mend: {'; '.join(changed)}")
    checkpoint.load_weights(source, model)
    if not folder:
        return new
    checkpoint.load_optimizer(folder, model, optimizer)
    return saved


def learning_rate(step, config):
    """Linear rise, then half a cosine (Loshchilov and Hutter 2017) or stable-then-linear (Hu et al. 2024, section 4)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = min(1.0, (config.max_steps - step) / max(1, config.max_steps // 5))
    return config.min_lr + share * (config.learning_rate - config.min_lr)


def micro_batches(data, step, batch_size, micro_batch, process):
    """This process's share of the step's batch, piece by piece: (array (micro_batch, T + 1), is it the last)."""
    stride = micro_batch * process.world
    for start in range(process.rank * micro_batch, batch_size, stride):
        yield data.train_batch(step, batch_size, slice(start, start + micro_batch)), start + stride >= batch_size


class FiniteGuard:
    """Stops before the first update whose loss or gradient norm is not finite, without waiting for the device.

    From that step on the flag stays up, and the fused optimizer skips every update while it is: the weights remain
    those of the last good step until the host looks, which it does when it reads the loss anyway.
    """

    def __init__(self, optimizer, process):
        self.process = process
        self.broken = optimizer.found_inf = torch.zeros((), device=process.device)
        self.first = torch.zeros((), device=process.device)  # the step where it went up
        self.guilty = torch.zeros(process.world, device=process.device)  # ranks whose own loss was not finite then

    def watch(self, step, loss, grad_norm):
        """Note this step's health. Takes the rank's own loss, returns the mean over all ranks."""
        mean = loss.clone()
        if self.process.world > 1:
            dist.all_reduce(mean)
            mean /= self.process.world
        newly = ~(mean + grad_norm).isfinite() & (self.broken == 0)
        self.guilty[self.process.rank] += newly & ~loss.isfinite()
        self.first += newly * (step + 1)
        self.broken += newly
        return mean

    def inspect(self, stop):
        """Wait for the device and raise UserError if the flag is up. Returns whether any rank was told to stop."""
        report = torch.cat([self.guilty, self.guilty.new_tensor([stop])])
        if self.process.world > 1:
            dist.all_reduce(report)
        if self.broken.item():
            ranks = report[:-1].nonzero().flatten().tolist()
            where = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else f"the gradient norm (rank {self.process.rank})"
            raise UserError(
                f"{where} is not finite at step {int(self.first.item())}; training stopped before that update and saved "
                f"nothing more; look at the data of that step, or take a lower learning_rate in another out_dir, where "
                f"init_from goes on from the newest checkpoint's weights"
            )
        return report[-1].item() > 0


@torch.no_grad()
def evaluate(losses, data, eval_tokens, micro_batch, process):
    """Mean loss on the fixed validation tokens and its standard error over sequences.

    Sums are divided once at the end, so neither batch size nor number of processes moves the result.
    """
    rows = data.num_val_rows(eval_tokens)
    sums = torch.zeros(2, dtype=torch.float64)  # of the sequences' mean losses and of their squares
    for start in range(process.rank * micro_batch, rows, micro_batch * process.world):
        batch = data.val_rows(eval_tokens, slice(start, min(start + micro_batch, rows)))
        whole = np.resize(batch, (micro_batch, batch.shape[1]))  # the last one repeats rows: another size is compiled anew
        means = losses(whole).mean(dim=1)[: len(batch)].cpu().double()
        sums += torch.stack([means.sum(), means.square().sum()])
    if process.world > 1:
        sums = sums.to(process.device)
        dist.all_reduce(sums)
    mean, square = (sums / rows).tolist()
    return mean, math.sqrt(max(0.0, square - mean**2) / max(1, rows - 1))


def sample_text(model, tokenizer, prompt, seed):
    """The prompt, token ids, and what the model writes behind it: a loss that one can read."""
    tokens = min(200, model.config.max_seq_len - len(prompt))
    if tokens == 0:
        return tokenizer.decode(prompt)
    stop = () if tokenizer.eot is None else (tokenizer.eot,)
    keys = {"vocab_size": tokenizer.vocab_size, "stop_tokens": stop, "seed": seed, "temperature": 0.8}
    try:
        with torch.compiler.set_stance("force_eager"):  # what is compiled is so for the shapes of training
            (ids,) = generate(model, [prompt], tokens, **keys)
    except (UserError, torch.OutOfMemoryError) as error:  # no reason to end a run
        return f"(no sample: {str(error).partition(chr(10))[0]})"
    return tokenizer.decode(prompt + ids)


def catch_signals():
    """A list that gets the name of SIGTERM or SIGINT when one comes; a second one kills as usual."""
    caught = []

    def note(number, frame):
        caught.append(signal.Signals(number).name)
        with contextlib.suppress(OSError):  # not print, which this signal may have interrupted
            os.write(2, f"{caught[0]}: this run saves and stops; a second one stops it without saving\n".encode())
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return caught


if __name__ == "__main__":
    run(main)
