"""What a run leaves behind for people and tools, below its out_dir.

    config.json    resolved settings, costs per token, device, library versions, git commit
    metrics.jsonl  one JSON object per line, flushed as it is written: the truth
    wandb/         a mirror of the two, when asked for
    samples.txt    what the model wrote at each evaluation
"""

import contextlib
import dataclasses
import json
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

from config import UserError
from device import device_name, peak_flops, peak_memory_gib


class RunLog:
    """Writes the run folder and the lines on the terminal. Only the first process has one."""

    def __init__(self, model, config, data, device, dtype, world, state):
        self.folder = Path(config.out_dir)
        self.config, self.world = config, world
        self.device = device
        self.peak = peak_flops(device)
        self.flops_per_token = model.flops_per_token(model.config.max_seq_len)
        self.tokens_per_step = config.batch_size * model.config.max_seq_len
        self.started = time.perf_counter() - state["time_s"]
        facts = {
            "model": dataclasses.asdict(model.config),
            "train": dataclasses.asdict(config),
            "data": {key: value for key, value in data.meta.items() if key != "tokenizer"},
            "params": model.num_params(),
            "flops_per_token": self.flops_per_token,
            "kv_bytes_per_token": model.kv_bytes_per_token(dtype.itemsize),
            "device": device_name(device),
            "processes": world,
            "dtype": str(dtype).removeprefix("torch."),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(facts, indent=1))
        self.metrics = open_metrics(self.folder / "metrics.jsonl", state["step"])
        self.wandb = start_wandb(config, facts) if config.wandb != "disabled" else None
        print(
            f"{facts['params']:,} parameters, {model.config.attention} ({model.config.n_head} query heads, "
            f"{model.config.n_kv_head} KV heads, window {model.config.window or 'none'}), {facts['device']}, {facts['dtype']}"
        )
        verb = f"resumed at step {state['step']}" if state["step"] else "new run"
        print(f"{self.folder}: {verb}, {config.max_steps} steps of {self.tokens_per_step:,} tokens", flush=True)
        self.clock_step = state["step"]
        self.restart_clock()

    def time_s(self):
        return time.perf_counter() - self.started

    def restart_clock(self):
        """Speed is measured between logs, without the evaluations and checkpoints that follow them."""
        self.clock = time.perf_counter()

    def write(self, step, row):
        row = {"step": step, "tokens": step * self.tokens_per_step, "time_s": round(self.time_s(), 3), **row}
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        if self.wandb:
            self.wandb.log(row, step=step)

    def progress(self, step, loss, grad_norm, lr):
        """Called right after the device was waited for."""
        seconds = (time.perf_counter() - self.clock) / (step - self.clock_step)
        self.clock_step = step
        row = {
            "train/loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": self.tokens_per_step / seconds,
            "peak_mem_gib": peak_memory_gib(self.device),
        }
        if self.peak:
            row["mfu"] = row["tokens_per_s"] * self.flops_per_token / (self.peak * self.world)
        self.write(step, row)
        left = int(seconds * (self.config.max_steps - step))
        mfu = f"mfu {row['mfu']:.1%} | " if self.peak else ""
        print(
            f"step {step}/{self.config.max_steps} | loss {loss:.4f} | {row['tokens_per_s']:,.0f} tokens/s | {mfu}"
            f"{row['peak_mem_gib']:.1f} GiB | {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            flush=True,
        )

    def evaluation(self, step, val_loss, stderr, text):
        self.write(step, {"val/loss": val_loss, "val/stderr": stderr})
        with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n")
        print(f"step {step}/{self.config.max_steps} | validation loss {val_loss:.4f} +- {stderr:.4f}, and it writes:")
        print("\n".join("    " + line for line in text.splitlines()), flush=True)

    def close(self, step):
        self.metrics.close()
        if self.wandb:
            self.wandb.finish()
        done = step == self.config.max_steps
        print(f"{self.folder}: {'done' if done else 'stopped'} at step {step}", end="")
        print(f"; try: python sample.py {self.folder}" if done else "; the same command goes on from there", flush=True)


def open_metrics(path, step):
    """metrics.jsonl for appending, without the rows after `step` that a killed process may have written."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= step]
    aside = path.with_suffix(".unfinished")
    aside.write_text("".join(row + "\n" for row in kept))
    aside.replace(path)
    return open(path, "a")


def start_wandb(config, facts):
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed; pip install wandb, or give --wandb=disabled") from None
    try:
        return wandb.init(
            project=config.wandb_project,
            group=config.wandb_group or None,
            name=Path(config.out_dir).name,
            dir=config.out_dir,
            mode=config.wandb,
            config=facts,
            settings=wandb.Settings(console="off", silent=config.wandb == "offline"),
        )
    except wandb.Error as error:
        raise UserError(f"wandb={config.wandb}: {error}; run `wandb login`, or give --wandb=offline") from None


def versions():
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "wandb", "tiktoken"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit():
    """The commit of this code, with -dirty when files differ from it; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    return ""
