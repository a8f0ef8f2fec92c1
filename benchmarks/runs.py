"""The runs that compare.py compares: read from their folders, checked, grouped by variant."""

import itertools
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from config import UserError


@dataclass(frozen=True)
class Run:
    """What one training run left behind."""

    path: str
    facts: dict  # config.json
    rows: list  # metrics.jsonl

    @property
    def name(self):
        return Path(self.facts["train"]["out_dir"]).name.strip(".") or self.facts["run_id"]

    def column(self, key):
        """The finite values of a metric."""
        return [row[key] for row in self.with_finite(key)]

    def with_finite(self, key):
        return [row for row in self.rows if math.isfinite(row.get(key, math.nan))]

    def last_evaluation(self):
        return [row for row in self.rows if "val/loss" in row][-1]

    @property
    def speed(self):
        """Median tokens/s."""
        return statistics.median(self.column("tokens_per_s"))


def is_a(kind, above=None):
    """A check of one value: its type, and whether it is larger. A text above "" is one that is not empty. An int of
    more than 64 bits is none: it may fit no float."""

    def check(value):
        fits = not isinstance(value, int) or abs(value) < 2**63
        return isinstance(value, kind) and fits and (above is None or value > above)

    return check


def are_shards(value):
    return isinstance(value, list) and not any(lacking(shard, {"tokens": is_a(int), "sha256": is_a(str)}) for shard in value)


def lacking(facts, needed):
    """The keys of {key: check} that the facts do not have, or with a value that will not do."""
    return [key for key, check in needed.items() if not check(value_at(facts, key))]


def value_at(facts, key):
    for part in key.split("."):
        facts = facts.get(part) if isinstance(facts, dict) else None
    return facts


# What compare.py looks at in config.json.
NEEDED = {
    **dict.fromkeys(("run_id", "variant", "model.window_pattern"), is_a(str, above="")),
    **dict.fromkeys(("device", "dtype", "git_commit", "train.out_dir", "model.attention"), is_a(str)),
    **dict.fromkeys(("params", "flops_per_token", "kv_bytes_per_token"), is_a(int | float)),
    **dict.fromkeys(("processes", "model.n_layer", "model.n_head", "model.max_seq_len"), is_a(int, above=0)),
    **dict.fromkeys(("train.seed", "train.max_steps", "train.eval_tokens", "model.n_kv_head", "model.window"), is_a(int)),
    **dict.fromkeys(("data", "versions"), is_a(dict)),
    **dict.fromkeys(("data.splits.train.shards", "data.splits.val.shards"), lambda value: value is None or are_shards(value)),
    "data.splits.val.tokens": is_a(int | None),
}


def load(path):
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path} is no folder; compare.py takes the out_dir of runs")
    absent = [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]
    if not absent:
        facts, rows = read_json(folder / "config.json"), read_rows(folder / "metrics.jsonl")
    elif mirrors := {file.resolve() for pattern in ("*.wandb", "*/*.wandb") for file in folder.glob(pattern)}:
        if len(mirrors) > 1:
            raise UserError(f"{path} holds {len(mirrors)} runs of wandb's; give its offline-run-* folders one by one")
        facts, rows = read_wandb(mirrors.pop().parent)
    else:
        there = "give a run's out_dir or its wandb/offline-run-* folder"
        raise UserError(f"{path} is no run: it lacks {' and '.join(absent)}; {there}")
    if missing := lacking(facts, NEEDED):
        raise UserError(f"the settings in {path} have no valid {', '.join(missing)}: another program or version wrote them")
    if not all(is_row(row) for row in rows):
        raise UserError(f"a row of {path} is not numbers by name, step, tokens and time_s among them")
    found = Run(str(path), facts, rows)
    if not found.column("val/loss"):
        raise UserError(f"{path} has no validation loss yet; train until its first evaluation or leave it out")
    if not (found.column("tokens_per_s") and found.speed > 0):
        raise UserError(f"{path} has no tokens_per_s above 0; leave it out")
    return found


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; mend it or leave it out") from None


def is_row(row):
    valid = isinstance(row, dict) and {"step", "tokens", "time_s"} <= row.keys()
    return valid and all(map(is_a(int | float), row.values()))


def read_rows(path):
    """The rows of metrics.jsonl. A half-written last line is what a running or killed process leaves: no row yet."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{path} line {number} is not JSON: {error}; remove the line") from None
    return rows


def read_wandb(folder):
    """Settings and rows of an offline run, by wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    summary = subprocess.run([*command, "--summary", str(folder)], capture_output=True, text=True, check=False)
    records = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if summary.returncode or records.returncode:
        why = (summary.stderr or records.stderr).strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"wandb cannot read {folder} ({why[0]}); give the run's out_dir, or pip install wandb")
    items = [json.loads(line) for line in records.stdout.splitlines()]
    rows = [numbers(item["history"]["item"]) for item in items if item["type"] == "history"]
    return json.loads(summary.stdout).get("config", {}), rows


def numbers(item):
    """A row without what wandb adds. It writes numbers that are not finite as words."""
    words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    row = {key: words.get(value, value) if isinstance(value, str) else value for key, value in item.items()}
    ours = [key for key in row if not key.startswith(("_", "samples."))]
    return {key: row[key] for key in ours if isinstance(row[key], int | float)}


# May these runs be compared?


def distinct(runs):
    """(runs, notes): a run that was given twice, perhaps once as wandb's folder or as a copy that went on, counts once."""
    kept, notes = {}, []
    for found in runs:
        twin = kept.setdefault(found.facts["run_id"], found)
        if twin is not found:
            shorter, longer = sorted((found, twin), key=lambda each: each.rows[-1]["step"])
            kept[found.facts["run_id"]] = longer
            steps = [each.rows[-1]["step"] for each in (longer, shorter)]
            why = f": the longer one, of {steps[0]} steps against {steps[1]}" if steps[0] > steps[1] else ""
            notes.append(f"{shorter.path} is the same run as {longer.path} and counts once{why}")
    return list(kept.values()), notes


def objections(runs):
    """Lines that say what makes a comparison of these runs unfair."""
    return [*cut_short(runs), *other_lengths(runs), *data_differences(runs), *same_seeds(runs)]


def cut_short(runs):
    for found in runs:
        last, end = found.last_evaluation(), found.facts["train"]["max_steps"]
        if last["step"] < end:
            yield f"{found.path} is cut short: its last evaluation is of step {last['step']}, its end would be {end}"
        elif not math.isfinite(last["val/loss"]):
            yield f"{found.path} ends with the validation loss {last['val/loss']}"


def other_lengths(runs):
    """A longer run ends lower, whatever its attention."""
    first, *others = runs
    for found in others:
        here, there = (max(each.last_evaluation()["step"], each.facts["train"]["max_steps"]) for each in (found, first))
        if here != there:
            yield f"{found.path} takes {here} steps, {first.path} {there}"


def data_differences(runs):
    """What evaluations depend on besides the model, and the training data, must be those of the first run."""
    first, *others = runs
    for found in others:
        here, there = data_of(found.facts), data_of(first.facts)
        different = [f"{key} is {here[key]}, there {there[key]}" for key in here if here[key] != there[key]]
        if different:
            yield f"{found.path} and {first.path} have different data: {', '.join(different)}"


def data_of(facts):
    found = {"eval_tokens": facts["train"]["eval_tokens"], "max_seq_len": facts["model"]["max_seq_len"]}
    for split, words in (("train", "the training split"), ("val", "the validation split")):
        shards = value_at(facts, f"data.splits.{split}.shards") or []
        tokens = sum(shard["tokens"] for shard in shards)
        digests = "".join(shard["sha256"][:8] for shard in shards)
        found[words] = f"{tokens:,} tokens ({digests or facts['data'].get('source')})"
    return found


def same_seeds(runs):
    """The spread of runs that share a seed is no noise of seeds."""
    seen = {}
    for label, group in by_variant(runs).items():
        for found in group:
            twin = seen.setdefault((label, found.facts["train"]["seed"]), found)
            if twin is not found:
                yield f"{found.path} and {twin.path} are the same variant, {label}, with the same seed"


# Which of them belong together?

ATTENTION = {"attention", "n_kv_head", "window", "window_pattern"}  # what the variant's name says
# Different in every run, without meaning for the result, or compared by content.
NO_PART_OF_LABEL = {"seed", "out_dir", "resume", "wandb", "wandb_project", "wandb_group", "data", "eval_tokens"}
NO_PART_OF_LABEL |= {"log_interval", "eval_interval", "save_interval", "keep_checkpoints"}


def by_variant(runs):
    """{label: runs that differ in the seed alone}. What differs besides attention becomes part of the label."""
    besides = ("dtype", "processes")  # more processes are faster
    settings = [
        {**found.facts["model"], **found.facts["train"], **{key: found.facts[key] for key in besides}} for found in runs
    ]
    keys = [key for key in dict.fromkeys(itertools.chain(*settings)) if key not in ATTENTION | NO_PART_OF_LABEL]
    differing = [key for key in keys if len({plain(each.get(key)) for each in settings}) > 1]
    groups = {}
    for found, each in zip(runs, settings, strict=True):
        label = printable(" ".join([found.facts["variant"], *(f"{key}={plain(each.get(key))}" for key in differing)]))
        groups.setdefault(label, []).append(found)
    return groups


def plain(value):
    """A setting as text. wandb writes 1.0 as 1."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def printable(text):
    """The text with what neither UTF-8 nor a plot can hold, a path's bytes that are no UTF-8, written as in \\udce9."""
    return text.encode(errors="backslashreplace").decode()
