"""What a run leaves behind for people and tools, below its out_dir.

    config.json    resolved settings, costs per token, device, library versions, git commit
    metrics.jsonl  one JSON object per line, flushed as it is written: the truth
    samples.txt    what the model wrote at each evaluation
    wandb/         a mirror of the three, unless wandb=disabled
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from config import UserError, write_whole
from device import device_name, peak_flops, peak_memory_gib


@contextlib.contextmanager
def claimed(out_dir):
    """The run folder for this process alone: two runs would write each other's files."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"out_dir={out_dir} is in use by another process; wait for it, or give another --out_dir") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.rmdir()  # when nothing came of it


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
            "run_id": run_id(self.folder / "config.json", state["step"]),
            "variant": variant(model.config),
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
        if state["step"] == 0:
            set_aside(self.folder)
        write_whole(self.folder / "config.json", json.dumps(facts, indent=1))
        self.metrics, rows = open_metrics(self.folder / "metrics.jsonl", state["step"])
        samples = samples_until(self.folder / "samples.txt", state["step"])
        self.wandb = WandbMirror(config, facts, rows, samples) if config.wandb != "disabled" else None
        windows = [window for window in model.config.windows if window]
        window = f"{windows[0]} in {len(windows)} of {model.config.n_layer} layers" if windows else "none"
        print(
            f"{facts['params']:,} parameters, {model.config.attention} (query heads: {model.config.n_head}, "
            f"KV heads: {model.config.n_kv_head}, window: {window}), {facts['device']}, {facts['dtype']}"
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
            self.wandb.log(row)

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
            f"peak {row['peak_mem_gib']:.1f} GiB | {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            flush=True,
        )

    def evaluation(self, step, val_loss, stderr, text):
        self.write(step, {"val/loss": val_loss, "val/stderr": stderr})
        with open(self.folder / "samples.txt", "a", encoding="utf-8", newline="") as file:
            file.write(sample_entry(step, text))
        if self.wandb:
            self.wandb.sample(step, text)
        sign = "±".encode(sys.stdout.encoding, "ignore").decode(sys.stdout.encoding) or "+-"
        print(f"step {step}/{self.config.max_steps} | validation loss {val_loss:.4f} {sign} {stderr:.4f}, and it writes:")
        print("\n".join("    " + line for line in text.splitlines()), flush=True)

    def close(self, step):
        self.metrics.close()
        if self.wandb:
            self.wandb.close()
        done = step == self.config.max_steps
        print(f"{self.folder}: {'done' if done else 'stopped'} at step {step}", end="")
        sampling = f"try: python sample.py {shlex.quote(str(self.folder))}"
        print(f"; {sampling if done else 'the same command goes on from there'}", flush=True)


def set_aside(folder):
    """A new run takes no file's place: it may be the log of one whose checkpoints are gone, or somebody else's. Of a run
    that got no further than its settings nothing is kept."""
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and not metrics.stat().st_size:
        return
    for path in (folder / "config.json", metrics, folder / "samples.txt"):
        if path.exists():
            names = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            path.rename(kept)
            print(f"{path} is kept as {kept.name}")


def open_metrics(path, step):
    """metrics.jsonl for appending, and its rows up to `step`; later ones, by a process that was killed, are cut off."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        if not line.endswith(b"}"):  # the process was killed while writing it
            continue
        try:
            row = json.loads(line)
            if row["step"] <= step:
                rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"line {number} of {path} is damaged ({type(error).__name__}: {error}); mend or remove it") from None
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return open(path, "a"), rows


def sample_entry(step, text):
    return f"--- step {step}\n{text}\n"


def samples_until(path, step):
    """[(step, text), ...] of samples.txt up to `step`, and the file cut off there."""
    content = path.read_bytes().decode(errors="replace") if path.exists() else ""
    parts = re.split(r"^--- step (\d+)\n", content, flags=re.MULTILINE)[1:]
    samples = [(int(number), text[:-1]) for number, text in zip(parts[::2], parts[1::2])]
    samples = [sample for sample in samples if sample[0] <= step]
    write_whole(path, "".join(sample_entry(*sample) for sample in samples))
    return samples


class WandbMirror:
    """The rows of metrics.jsonl in wandb, each of them once.

    wandb drops a row below the last step it has seen, loses the last ones of a killed process, and makes a second
    folder with overlapping steps when an offline run resumes. So a resumed run first replays what metrics.jsonl holds:
    offline into a new folder, which then replaces the old ones; online from the first step that the server lacks.
    """

    def __init__(self, config, facts, rows, samples):
        old_folders = list(Path(config.out_dir, "wandb").glob(f"offline-run-*-{facts['run_id']}"))
        self.run = start_wandb(config, facts)
        self.tokens_per_step = config.batch_size * facts["model"]["max_seq_len"]
        self.speeds = []
        self.samples = []
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")
        self.run.define_metric("val/loss", step_metric="tokens", summary="min")
        self.run.define_metric("peak_mem_gib", step_metric="tokens", summary="max")
        for row in rows:
            self.log(row)
        if samples:
            self.samples = samples[:-1]
            self.sample(*samples[-1])
        for folder in old_folders:
            shutil.rmtree(folder)

    def log(self, row):
        if "tokens_per_s" in row:
            self.speeds.append(row["tokens_per_s"])
        if row["step"] >= self.run.step:
            self.run.log(row, step=row["step"])

    def sample(self, step, text):
        """The table of all samples so far: wandb shows the newest table of a name."""
        import wandb

        self.samples.append((step, text))
        rows = [[step, step * self.tokens_per_step, text] for step, text in self.samples]
        self.run.log({"samples": wandb.Table(["step", "tokens", "text"], rows)}, step=max(step, self.run.step))

    def close(self):
        if self.speeds:
            self.run.summary["tokens_per_s_median"] = statistics.median(self.speeds)
        self.run.finish()


def start_wandb(config, facts):
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline means offline
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(config.out_dir, "wandb").absolute()))  # tables that wait for a sync
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed; pip install wandb, or give --wandb=disabled") from None
    try:
        return wandb.init(
            project=config.wandb_project,
            group=config.wandb_group or experiment(facts),
            job_type="train",
            name=Path(config.out_dir).name,
            id=facts["run_id"],
            resume="allow" if config.wandb == "online" else None,
            dir=config.out_dir,
            mode=config.wandb,
            config=facts,
            settings=wandb.Settings(console="off", silent=config.wandb == "offline"),
        )
    except wandb.Error as error:
        raise UserError(f"wandb={config.wandb}: {error}; run `wandb login`, or give --wandb=offline") from None


def run_id(config_file, step):
    """What tells this run from all others: drawn when it is new, kept when it goes on."""
    if step and config_file.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return json.loads(config_file.read_text())["run_id"]
    return secrets.token_hex(4)


def variant(model_config):
    """A short name for the attention of a model, the same for the same numbers: mha, gqa-3, swa-w256-LLLG."""
    name = model_config.attention
    if name == "gqa" or (name == "swa" and model_config.n_kv_head < model_config.n_head):
        name += f"-{model_config.n_kv_head}"
    if name.startswith("swa"):
        name += f"-w{model_config.window}"
    if model_config.window_pattern != "L":
        name += f"-{model_config.window_pattern}"
    return name


MOVES_NO_LOSS = {"out_dir", "resume", "wandb", "wandb_project", "wandb_group", "log_interval", "save_interval", "keep_checkpoints"}
MOVES_NO_LOSS |= {"device", "compile", "attention_impl", "micro_batch_size"}  # beyond rounding
# Settings in which the runs of one experiment may differ: what it compares, the noise, and what moves no loss.
FREE = MOVES_NO_LOSS | {"attention", "n_kv_head", "window", "window_pattern", "seed", "data"}  # the data count by their content


def experiment(facts):
    """A name that runs share exactly when all the rest of their settings and their data agree."""
    settings = {key: value for key, value in {**facts["model"], **facts["train"]}.items() if key not in FREE}
    digest = hashlib.sha256(json.dumps([settings, facts["data"].get("splits")], sort_keys=True).encode()).hexdigest()
    return f"{Path(facts['train']['data']).name}-{digest[:6]}"


def versions():
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "wandb", "tiktoken", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def git_commit():
    """The commit of this code, never a tag's name, with -dirty when files differ from it; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    return ""
