"""Runs side by side: a table, what its differences are worth, and a plot.

    python compare.py out/124m-*
    python compare.py out/124m-* --out=results/variants --target_loss=1.5 --readme=README.md
    python compare.py results/variants/runs/*

Takes run folders (config.json and metrics.jsonl) and wandb's offline folders. Prints the table as markdown, and writes
into --out: table.json, table.md, curves.png, curves.svg, and in runs/ what was read of each run, so that the same
table can be made again without the run folders.

Runs of one variant with different seeds become one column with means, and a band in the plot. A difference between two
variants' final losses counts only outside its 95% band, by Student's t from the spread of the seeds' final losses, pooled
over all variants that have several. Without a second seed of any variant nothing is known about noise, and no difference
counts; with a single pair the band is wide. Earlier evaluations would add next to nothing: a run that is above its twin
late in training stays there.

The standard error beside a final loss is over the sequences of the evaluation set. All runs share these, so it is no
band for differences.

Losses and speeds are compared only between runs of as many steps, on the same data, to the end, with the same
evaluation set; --force shows others, too, and says what is wrong with them. A time is tokens by the run's median speed:
compiling, which takes longer in the first of several runs, and evaluations are not in it.
"""

import itertools
import json
import math
import shlex
import statistics
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from typing import Annotated

from benchmarks import markdown, plots
from benchmarks.runs import by_variant, distinct, is_a, lacking, load, objections, printable, read_json, value_at
from config import UserError, parse, pathname, run, write_whole


@dataclass(frozen=True)
class CompareConfig:
    out: Annotated[pathname, "folder for table, plot and what was read of the runs"] = "results/compare"
    target_loss: Annotated[float, "how long until this validation loss; 0: the lowest that all runs reach"] = 0.0
    decode: Annotated[pathname, "what bench.py variants wrote, on a CPU results/variants-cpu.json; the default may be missing"] = (
        "results/variants.json"
    )
    readme: Annotated[pathname, "file to put the table into, between its two marks; empty: none"] = ""
    force: Annotated[bool, "compare what cannot be compared, too"] = False

    def __post_init__(self):
        if not 0 <= self.target_loss < math.inf:
            raise ValueError(f"target_loss takes a number of 0 or more, got {self.target_loss}")
        if not self.out:
            raise ValueError("out takes a name, got none")


def main(argv):
    words, config = parse(argv, CompareConfig, usage=__doc__)
    if not words:
        raise UserError("compare.py takes run folders, as in compare.py out/124m-*")
    runs, notes = distinct([load(word) for word in words])
    wrong = objections(runs)
    if wrong and not config.force:
        raise UserError(f"{'; '.join(wrong)}; mend that, leave a run out, or add --force")
    variants = by_variant(runs)
    decode = read_decode(config.decode, required=config.decode != CompareConfig.decode)
    results = compare(variants, config.target_loss, decode)
    results["notes"] = notes + wrong + ["speeds are of different devices"] * (len(results["devices"]) > 1)
    results["command"] = shlex.join(["python", "compare.py", *argv])
    print(section(results, pad=True))
    out = Path(config.out)
    write(out, results, runs)
    try:
        plot(variants, results, out / "curves")
        print(f"\n{out}: table.json, table.md, curves.png, curves.svg, runs/")
    except ImportError as error:
        print(f"\n{out}: table.json, table.md, runs/; no plot ({error}; pip install matplotlib)")
    if config.readme:
        markdown.put_into(Path(config.readme), "compare.py", section(results))


# The comparison.


def compare(variants, target_loss, decode):
    """Everything that is printed, as plain values."""
    runs = [found for group in variants.values() for found in group]
    target_loss = target_loss or max(min(found.column("val/loss")) for found in runs)
    rows = [row_of(label, group, target_loss, decode) for label, group in variants.items()]
    first = runs[0].facts
    versions = [found.facts["versions"] for found in runs]
    return {
        "rows": rows,
        "target_loss": target_loss,
        "verdicts": verdicts(rows),
        "devices": sorted({found.facts["device"] for found in runs}),
        "dtypes": sorted({found.facts["dtype"] for found in runs}),
        "versions": [each for i, each in enumerate(versions) if each not in versions[:i]],
        "git_commits": sorted({found.facts["git_commit"] for found in runs}),
        "decode": {key: value for key, value in decode.items() if key != "rows"} if decode else None,
        "data": first["data"].get("source"),
        "tokens": sorted({found.rows[-1]["tokens"] for found in runs}),
        "eval_tokens": min(first["train"]["eval_tokens"], value_at(first, "data.splits.val.tokens") or math.inf),
    }


def row_of(label, group, target_loss, decode):
    """The row of a variant; what differs by run is a mean over its seeds."""
    facts = group[0].facts
    finals = [found.last_evaluation() for found in group]
    reached = [tokens_until(found, target_loss) for found in group]
    speeds = [found.speed for found in group]
    losses = [row["val/loss"] for row in finals]
    return {
        "variant": label,
        "seeds": len(group),
        **{key: facts["model"][key] for key in ("n_kv_head", "window", "window_pattern")},
        "params": facts["params"],
        "final_loss": statistics.fmean(losses),
        "final_stderr": statistics.fmean(row.get("val/stderr", math.nan) for row in finals),
        "seed_deviation": statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else None,
        "best_loss": statistics.fmean(min(found.column("val/loss")) for found in group),
        "tokens_per_s": statistics.fmean(speeds),
        "mfu": mean_of(statistics.median, group, "mfu"),
        "peak_mem_gib": mean_of(max, group, "peak_mem_gib"),
        "flops_per_token": facts["flops_per_token"],
        "kv_bytes_per_token": facts["kv_bytes_per_token"],
        "kv_bytes_needed": facts["kv_bytes_per_token"] * share_of_context(facts["model"]),
        "target_tokens": statistics.fmean(reached) if all(reached) else None,
        "target_time_s": statistics.fmean(map(truediv, reached, speeds)) if all(reached) else None,
        "decode_tokens_per_s": decode_speeds(decode, facts["model"]),
    }


# What is taken from the file of bench.py variants, and from each of its rows.
DECODE = {
    **dict.fromkeys(("shape.n_layer", "shape.n_embd", "shape.n_head", "shape.max_seq_len", "tokens"), is_a(int, above=0)),
    **dict.fromkeys(("device", "dtype", "git_commit"), is_a(str)),
    "versions": is_a(dict),
    "rows": is_a(list),
}
DECODE_ROW = {
    **dict.fromkeys(("attention", "window_pattern"), is_a(str)),
    **dict.fromkeys(("n_kv_head", "window"), is_a(int)),
    "decode_tokens_per_s": is_a(dict),
}


def read_decode(path, required):
    """What bench.py variants wrote, or None."""
    if not Path(path).is_file():
        if required:
            raise UserError(f"no file {path}; bench.py variants writes results/variants.json, on a CPU results/variants-cpu.json")
        return None
    found = read_json(Path(path))
    if lacking(found, DECODE) or not all(is_decode_row(row) for row in found["rows"]):
        raise UserError(f"{path} holds no decoding speeds; python bench.py variants writes them")
    return found


def is_decode_row(row):
    def is_speed(batch, speed):
        return batch.isdecimal() and is_a(int | float | None)(speed)

    return not lacking(row, DECODE_ROW) and all(is_speed(*item) for item in row["decode_tokens_per_s"].items())


def decode_speeds(decode, model):
    """{batch: tokens/s} of the row of bench.py variants with this attention. Its model may be of another size, so what
    must agree are the share of KV heads (but for MQA, whose name says it all) and that of the context in the window."""
    for row in decode["rows"] if decode else []:
        same = all(row[key] == model[key] for key in ("attention", "window_pattern"))
        there = row["n_kv_head"] / decode["shape"]["n_head"], row["window"] / decode["shape"]["max_seq_len"]
        here = model["n_kv_head"] / model["n_head"], model["window"] / model["max_seq_len"]
        if same and (there == here or row["attention"] == "mqa"):
            return {batch: speed for batch, speed in row["decode_tokens_per_s"].items() if speed}
    return {}


def mean_of(middle, group, key):
    values = [middle(found.column(key)) for found in group if found.column(key)]
    return statistics.fmean(values) if values else None


def share_of_context(model):
    """Keys that some later query can still see at the end of a full context, as a share of all, mean over layers."""
    length, pattern = model["max_seq_len"], model["window_pattern"]
    windows = [model["window"] if pattern[layer % len(pattern)] == "L" else 0 for layer in range(model["n_layer"])]
    return statistics.fmean(min(window or length, length) / length for window in windows)


def tokens_until(found, loss):
    """Tokens until the validation loss came down to `loss`, on a straight line between two evaluations, or None."""
    earlier = None
    for row in found.with_finite("val/loss"):
        if row["val/loss"] <= loss:
            if earlier is None:
                return row["tokens"]
            share = (earlier["val/loss"] - loss) / (earlier["val/loss"] - row["val/loss"])
            return earlier["tokens"] + share * (row["tokens"] - earlier["tokens"])
        earlier = row
    return None


# Student's t: 95% of draws lie within so many standard errors, by degrees of freedom; 2.2 or less above.
STUDENT_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}


def verdicts(rows):
    """One line on each variant against the first, or against MHA where there is one."""
    base = next((row for row in rows if row["variant"].split()[0] == "mha"), rows[0])
    others = [row for row in rows if row is not base and math.isfinite(row["final_loss"] - base["final_loss"])]
    repeated = [row for row in rows if row["seed_deviation"] is not None]
    freedom = sum(row["seeds"] - 1 for row in repeated)
    lines = []
    if freedom and others:
        deviation = math.sqrt(sum((row["seeds"] - 1) * row["seed_deviation"] ** 2 for row in repeated) / freedom)
        names = ", ".join(f"{row['seeds']} seeds of {row['variant']}" for row in repeated)
        lines.append(
            f"Noise: final losses of the same variant have a standard deviation of {deviation:.4f} ({names}). A difference counts "
            f"if it lies outside the 95% band (Student's t, {freedom} degree{'s' if freedom > 1 else ''} of freedom). The band is "
            "for one comparison: the more of them, the likelier that one shows a difference where there is none."
        )
    elif others:
        lines.append("Noise: unknown, so no difference counts; train a variant again with another --seed.")
    for row in others:
        difference = row["final_loss"] - base["final_loss"]
        line = f"{row['variant']} - {base['variant']}: {difference:+.4f}"
        if freedom:
            band = STUDENT_95.get(freedom, 2.2) * deviation * math.sqrt(1 / row["seeds"] + 1 / base["seeds"])
            word = "no difference beyond noise" if abs(difference) <= band else "higher" if difference > 0 else "lower"
            line += f", band ± {band:.4f}: {word}"
        lines.append(f"{line}.")
    return lines


# Showing it.


def section(results, pad=False):
    """What is printed, and stands in the README: the table, its verdicts, and what they were measured on."""
    trained = " to ".join(count(n) for n in sorted({results["tokens"][0], results["tokens"][-1]}))
    on = f"Measured on {measured_on(*(results[key] for key in ('devices', 'dtypes', 'versions', 'git_commits')))}; "
    on += f"{trained} tokens of {results['data']} a run, loss on {count(results['eval_tokens'])} others; "
    on += f"times are tokens at median speed, without compiling and evaluations; `{results['command']}`"
    lines = [*table(results, pad), ""] + [f"- {line}" for line in results["verdicts"]]
    if any(row["decode_tokens_per_s"] for row in results["rows"]):
        decode = results["decode"]
        where = measured_on(*([decode[key]] for key in ("device", "dtype", "versions", "git_commit")))
        lines.append(
            f"- Decoding speeds are not of these runs but of the same attention in a model of {shape_text(decode['shape'])}, with "
            f"sequences close to {decode['tokens']:,} tokens: `python bench.py variants` on {where}."
        )
    lines += [f"- Note: {note}." for note in results["notes"]]
    return printable("\n".join([*lines, "", on]))


def measured_on(devices, dtypes, versions, commits):
    """In words; all of them where runs differ."""
    software = (", ".join(f"{name} {each[name]}" for name in ("torch", "triton") if name in each) for each in versions)
    known = ", ".join(commit[:10] + commit[40:] for commit in commits if commit)
    return ", ".join([*devices, *dtypes, *filter(None, dict.fromkeys(software)), f"commit {known or 'unknown'}"])


def shape_text(shape):
    return f"{shape['n_layer']} layers of {shape['n_embd']:,} channels and {shape['n_head']} heads"


def table(results, pad):
    """Lines of markdown. Each variant is a column: as a line it would not fit into a terminal."""
    rows = results["rows"]
    decoding = [row["decode_tokens_per_s"] for row in rows if row["decode_tokens_per_s"]]
    batch = max(set.intersection(*map(set, decoding)) if decoding else (), key=int, default="")
    figures = {
        "seeds": [str(row["seeds"]) for row in rows],
        "seed deviation": cells(rows, "seed_deviation", "{:.4f}"),
        "KV heads": [str(row["n_kv_head"]) for row in rows],
        "window": [window_text(row) for row in rows],
        "parameters": [count(row["params"]) for row in rows],
        "final loss ± standard error": [f"{row['final_loss']:.4f} ± {row['final_stderr']:.4f}" for row in rows],
        "best loss": cells(rows, "best_loss", "{:.4f}"),
        "tokens/s": cells(rows, "tokens_per_s", "{:,.0f}"),
        "MFU": cells(rows, "mfu", "{:.1%}"),
        "peak memory": cells(rows, "peak_mem_gib", "{:.1f} GiB"),
        "FLOPs/token": [count(row["flops_per_token"]) for row in rows],
        "KV bytes/token": cells(rows, "kv_bytes_per_token", "{:,.0f}"),
        "KV bytes/token at full context": cells(rows, "kv_bytes_needed", "{:,.0f}"),
        f"training time to {results['target_loss']:.4g}": [seconds(row["target_time_s"]) for row in rows],
        f"tokens to {results['target_loss']:.4g}": [count(row["target_tokens"]) for row in rows],
        f"decode tokens/s, batch {batch}, see below": [
            f"{row['decode_tokens_per_s'][batch]:,.0f}" if batch in row["decode_tokens_per_s"] else "" for row in rows
        ],
    }
    shown = {name: texts for name, texts in figures.items() if any(texts)}
    columns = {row["variant"]: list(texts) for row, texts in zip(rows, zip(*shown.values()), strict=True)}
    return markdown.table({"variant": list(shown)} | columns, pad)


def cells(rows, key, form):
    return ["" if row[key] is None else form.format(row[key]) for row in rows]


def window_text(row):
    if not row["window"]:
        return "none"
    return str(row["window"]) + (f", {row['window_pattern']}" if row["window_pattern"] != "L" else "")


def count(number):
    """A number in few digits: 124.4M."""
    if number is None:
        return ""
    unit, word = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= pair[0]), (1, ""))
    return f"{number / unit:.1f}{word}" if word else f"{number:.0f}"


def seconds(number):
    if number is None:
        return ""
    return f"{number:.3g} s" if number < 999.5 else f"{number:,.0f} s"


def write(out, results, runs):
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "table.json", json.dumps(results, indent=1) + "\n")
    write_whole(out / "table.md", section(results) + "\n")
    names = set()
    for found in runs:
        name = next(name for n in itertools.count(1) if (name := found.name + (f"-{n}" if n > 1 else "")) not in names)
        names.add(name)
        folder = out / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps(found.facts, indent=1))
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in found.rows))
    if others := sorted(path.name for path in (out / "runs").iterdir() if path.name not in names):
        print(f"\n{out / 'runs'} also holds runs that are not in this table: {', '.join(others)}")
        print("(from earlier comparisons; remove them if you do not want them)")


def common_losses(group):
    """{step: validation losses of all seeds}, at the steps at which each of them was evaluated."""
    by_step = [{row["step"]: row["val/loss"] for row in found.with_finite("val/loss")} for found in group]
    return {step: [losses[step] for losses in by_step] for step in by_step[0] if all(step in each for each in by_step)}


def plot(variants, results, path):
    """The curves, as PNG and as SVG. The same results give the same files."""
    plt = plots.pyplot()
    plt.rcParams.update({"svg.hashsalt": "compare.py", "axes.grid": True, "grid.alpha": 0.3})
    figure, ((tokens, time), (cache, decode)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    speeds = {}
    early = []  # losses after a third of the run: what is higher would flatten all that counts
    for i, ((label, group), row) in enumerate(zip(variants.items(), results["rows"], strict=True)):
        colour = f"C{i}"
        losses = common_losses(group)
        means = [statistics.fmean(each) for each in losses.values()]
        early += means[len(means) // 3 : -1][:1]
        per_step = group[0].rows[-1]["tokens"] / max(1, group[0].rows[-1]["step"])  # it may hold nothing but step 0
        for axis, per_unit in ((tokens, per_step / 1e6), (time, per_step / row["tokens_per_s"] / 60)):
            xs = [step * per_unit for step in losses]
            axis.plot(xs, means, label=label, color=colour, marker=".")
            axis.fill_between(xs, *([middle(each) for each in losses.values()] for middle in (min, max)), color=colour, alpha=0.2)
        finals = [found.last_evaluation()["val/loss"] for found in group]
        cache.plot([row["kv_bytes_needed"]] * len(finals), finals, label=label, color=colour, marker="o")
        speeds[label] = sorted((int(batch), speed) for batch, speed in row["decode_tokens_per_s"].items())
    for axis, unit in ((tokens, "million tokens"), (time, "minutes of training")):
        axis.set(xlabel=unit, ylabel="validation loss", ylim=(None, max(early, default=None)))
        axis.legend()
    cache.set(xlabel="KV bytes/token at full context", ylabel="final validation loss")
    cache.legend()
    for axis in (tokens, time, cache):
        axis.set_xlim(left=0)
    if any(speeds.values()):
        plots.lines(decode, speeds, "sequences at once", "decoded tokens/s")
        decode.set_title(shape_text(results["decode"]["shape"]), fontsize="medium")
        decode.legend()
    else:
        decode.set_axis_off()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    run(main)
