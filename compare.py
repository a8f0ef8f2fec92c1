"""Runs side by side: a table, what its differences are worth, and a plot.

    python compare.py out/124m-*
    python compare.py out/124m-* --out=results/variants --target_loss=3.2 --readme=README.md
    python compare.py results/variants/runs/*

Takes run folders (config.json and metrics.jsonl) and wandb's offline folders. Prints the table as markdown, and writes
into --out: table.json, table.md, curves.png, curves.svg, and in runs/ what was read of each run, so that the same
table can be made again without the run folders.

Runs of one variant with different seeds become one row with a mean, and a band in the plot. A difference between two
variants counts only outside its 95% band, by Student's t from the spread of the seeds, pooled over all variants that
have several. Two seeds of one variant say little about noise, so the band is 13 standard errors then; two seeds each
of three variants make it 3. Losses and speeds are compared only between runs on the same data, to the end, with the
same evaluation set; --force shows others, too, and says what is wrong with them.
"""

import itertools
import json
import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from benchmarks.runs import ATTENTION, by_variant, distinct, load, objections, read_json
from config import UserError, parse, run


@dataclass(frozen=True)
class CompareConfig:
    out: Annotated[str, "folder for table, plot and what was read of the runs"] = "results/compare"
    target_loss: Annotated[float, "how long until this validation loss; 0: the lowest that all runs reach"] = 0.0
    decode: Annotated[str, "decoding speeds, as bench.py variants writes them; left out when it is missing"] = (
        "results/variants.json"
    )
    readme: Annotated[str, "file to put the table into, between its two marks; empty: none"] = ""
    force: Annotated[bool, "compare what cannot be compared, too"] = False


def main(argv):
    argv = ["--force=true" if argument == "--force" else argument for argument in argv]
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
    print(section(results))
    out = Path(config.out)
    write(out, results, runs)
    plot(variants, results, out / "curves")
    if config.readme:
        put_into(Path(config.readme), section(results))
    print(f"\n{out}: table.json, table.md, curves.png, curves.svg, runs/")


# The comparison.


def compare(variants, target_loss, decode):
    """Everything that is printed, as plain values."""
    runs = [found for group in variants.values() for found in group]
    target_loss = target_loss or max(min(found.column("val/loss")) for found in runs)
    rows = [row_of(label, group, target_loss, decode) for label, group in variants.items()]
    first = runs[0].facts
    return {
        "rows": rows,
        "target_loss": target_loss,
        "verdicts": verdicts(rows),
        "devices": sorted({found.facts["device"] for found in runs}),
        "dtypes": sorted({found.facts.get("dtype", "") for found in runs}),
        "versions": first.get("versions", {}),
        "git_commits": sorted({found.facts.get("git_commit", "") for found in runs}),
        "data": first["data"].get("source"),
        "tokens": sorted({found.rows[-1]["tokens"] for found in runs}),
        "eval_tokens": first["train"]["eval_tokens"],
    }


def row_of(label, group, target_loss, decode):
    """The row of a variant; what differs by run is a mean over its seeds."""
    facts = group[0].facts
    finals = [found.last_evaluation() for found in group]
    reached = [reach(found, target_loss) for found in group]
    return {
        "variant": label,
        "seeds": len(group),
        **{key: facts["model"][key] for key in ("n_kv_head", "window", "window_pattern")},
        "params": facts["params"],
        "final_loss": statistics.fmean(row["val/loss"] for row in finals),
        "final_stderr": statistics.fmean(row.get("val/stderr", math.nan) for row in finals),
        "seed_deviation": statistics.stdev(row["val/loss"] for row in finals) if len(group) > 1 else None,
        "best_loss": statistics.fmean(min(found.column("val/loss")) for found in group),
        "tokens_per_s": mean_of(statistics.median, group, "tokens_per_s"),
        "mfu": mean_of(statistics.median, group, "mfu"),
        "peak_mem_gib": mean_of(max, group, "peak_mem_gib"),
        "flops_per_token": facts["flops_per_token"],
        "kv_bytes_per_token": facts["kv_bytes_per_token"],
        "kv_bytes_needed": facts["kv_bytes_per_token"] * share_of_context(facts["model"]),
        "target_time_s": statistics.fmean(t["time_s"] for t in reached) if all(reached) else None,
        "target_tokens": statistics.fmean(t["tokens"] for t in reached) if all(reached) else None,
        "decode_tokens_per_s": {str(row["batch"]): row["tokens_per_s"] for row in decode if is_of(row, facts)},
    }


def read_decode(path, required):
    if not Path(path).is_file():
        if required:
            raise UserError(f"no file {path}; python bench.py variants writes it")
        return []
    needed = {"attention", "batch", "tokens_per_s"}
    return [row for row in read_json(Path(path)).get("rows", []) if needed <= row.keys()]


def mean_of(middle, group, key):
    values = [middle(found.column(key)) for found in group if found.column(key)]
    return statistics.fmean(values) if values else None


def share_of_context(model):
    """Keys that some later query can still see at the end of a full context, as a share of all, mean over layers."""
    length, pattern = model["max_seq_len"], model["window_pattern"]
    windows = [model["window"] if pattern[layer % len(pattern)] == "L" else 0 for layer in range(model["n_layer"])]
    return statistics.fmean(min(window or length, length) / length for window in windows)


def reach(found, loss):
    """Time and tokens at which the validation loss came down to `loss`, on a straight line between two evaluations."""
    earlier = None
    for row in found.with_finite("val/loss"):
        if row["val/loss"] <= loss:
            if earlier is None:
                return row
            share = (earlier["val/loss"] - loss) / (earlier["val/loss"] - row["val/loss"])
            return {key: earlier[key] + share * (row[key] - earlier[key]) for key in ("time_s", "tokens")}
        earlier = row
    return None


def is_of(decode_row, facts):
    """Whether a decoding speed is of this variant: by its name, or by those numbers that the row has."""
    numbers = {"window_pattern": "L", **decode_row}
    agrees = all(numbers[key] == facts["model"][key] for key in ATTENTION if key in numbers)
    return agrees or decode_row["attention"] == facts["variant"]


# Student's t: 95% of draws lie within so many standard errors, by degrees of freedom; 2.2 or less above.
STUDENT_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}


def verdicts(rows):
    """One line on each variant against the first, or against MHA where there is one."""
    base = next((row for row in rows if row["variant"] == "mha"), rows[0])
    others = [row for row in rows if row is not base and math.isfinite(row["final_loss"] - base["final_loss"])]
    repeated = [row for row in rows if row["seeds"] > 1]
    freedom = sum(row["seeds"] - 1 for row in repeated)
    lines = []
    if freedom and others:
        spread = math.sqrt(sum((row["seeds"] - 1) * row["seed_deviation"] ** 2 for row in repeated) / freedom)
        names = ", ".join(f"{row['seeds']} seeds of {row['variant']}" for row in repeated)
        lines.append(f"Noise: {names} have a standard deviation of {spread:.4f}.")
    elif others:
        lines.append("Noise: no variant has a second seed, so only the evaluations' own standard errors count.")
    for row in others:
        if freedom:
            band = STUDENT_95.get(freedom, 2.2) * spread * math.sqrt(1 / row["seeds"] + 1 / base["seeds"])
        else:
            band = 2 * math.hypot(row["final_stderr"], base["final_stderr"])
        difference = row["final_loss"] - base["final_loss"]
        word = "no difference" if abs(difference) <= band else "higher" if difference > 0 else "lower"
        lines.append(f"{row['variant']} - {base['variant']}: {difference:+.4f}, band ± {band:.4f}: {word}.")
    return lines


# Showing it.

BEGIN, END = "<!-- compare.py: begin -->", "<!-- compare.py: end -->"  # the README's marks around the section


def section(results):
    """What is printed, and stands in the README: the table, its verdicts, and what they were measured on."""
    there = [name for name in ("torch", "triton") if name in results["versions"]]
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in there)
    tokens = " to ".join(count(n) for n in sorted({results["tokens"][0], results["tokens"][-1]}))
    commits = ", ".join(commit[:10] + commit[40:] for commit in results["git_commits"] if commit) or "unknown"
    on = f"Measured on {', '.join(results['devices'])}, {', '.join(results['dtypes'])}, {versions}, commit {commits}; "
    on += f"{tokens} tokens of {results['data']} a run, loss on {count(results['eval_tokens'])} others; `{results['command']}`"
    lines = [*table(results), ""] + [f"- {line}" for line in results["verdicts"]]
    lines += [f"- Note: {note}." for note in results["notes"]]
    return "\n".join([*lines, "", on])


def table(results):
    """The rows as lines of markdown. A column without any value is left out."""
    rows = results["rows"]
    batch = max((batch for row in rows for batch in row["decode_tokens_per_s"]), key=int, default="")
    columns = {
        "variant": [row["variant"] for row in rows],
        "seeds": [str(row["seeds"]) for row in rows],
        "their deviation": cells(rows, "seed_deviation", "{:.4f}"),
        "KV heads": [str(row["n_kv_head"]) for row in rows],
        "window": [window_text(row) for row in rows],
        "parameters": [count(row["params"]) for row in rows],
        "final loss": [f"{row['final_loss']:.4f} ± {row['final_stderr']:.4f}" for row in rows],
        "best loss": cells(rows, "best_loss", "{:.4f}"),
        "tokens/s": cells(rows, "tokens_per_s", "{:,.0f}"),
        "MFU": cells(rows, "mfu", "{:.1%}"),
        "peak memory": cells(rows, "peak_mem_gib", "{:.1f} GiB"),
        "MFLOP/token": [f"{row['flops_per_token'] / 1e6:,.0f}" for row in rows],
        "KV bytes/token": cells(rows, "kv_bytes_per_token", "{:,.0f}"),
        "needed at full context": cells(rows, "kv_bytes_needed", "{:,.0f}"),
        f"time to {results['target_loss']:.4g}": cells(rows, "target_time_s", "{:,.0f} s"),
        "tokens to it": [count(row["target_tokens"]) for row in rows],
        f"decode tokens/s, batch {batch}": [
            f"{row['decode_tokens_per_s'][batch]:,.0f}" if batch in row["decode_tokens_per_s"] else "" for row in rows
        ],
    }
    shown = {header: texts for header, texts in columns.items() if any(texts)}
    lines = [shown, ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    return [f"| {' | '.join(line)} |" for line in lines]


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


def write(out, results, runs):
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(section(results) + "\n", encoding="utf-8")
    names = set()
    for found in runs:
        name = next(name for n in itertools.count(1) if (name := found.name + (f"-{n}" if n > 1 else "")) not in names)
        names.add(name)
        folder = out / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(found.facts, indent=1), encoding="utf-8")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found.rows), encoding="utf-8")


def put_into(path, text):
    """Put the section between the marks of a file."""
    content = path.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(END) < content.index(BEGIN):
        raise UserError(f"{path} has no place for the table; add two lines: {BEGIN} and {END}")
    before, rest = content.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def plot(variants, results, path):
    """The curves, as PNG and as SVG. The same results give the same files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "compare.py", "axes.grid": True, "grid.alpha": 0.3})
    figure, ((tokens, time), (cache, decode)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    early = []
    for (label, group), row in zip(variants.items(), results["rows"], strict=True):
        colour = f"C{results['rows'].index(row)}"
        for axis, key, unit in ((tokens, "tokens", 1e6), (time, "time_s", 60)):
            xs, means, lowest, highest = curve(group, key)
            axis.plot([x / unit for x in xs], means, label=label, color=colour, marker=".")
            axis.fill_between([x / unit for x in xs], lowest, highest, color=colour, alpha=0.2)
        early += means[len(means) // 3 : -1][:1]
        finals = [found.last_evaluation()["val/loss"] for found in group]
        cache.plot([row["kv_bytes_needed"]] * len(finals), finals, color=colour, marker="o")
        cache.annotate(f" {label}", (row["kv_bytes_needed"], row["final_loss"]), color=colour)
        speeds = sorted((int(batch), speed) for batch, speed in row["decode_tokens_per_s"].items())
        decode.plot(*zip(*speeds, strict=True), label=label, color=colour, marker=".") if speeds else None
    for axis, unit in ((tokens, "million tokens"), (time, "minutes")):
        axis.set(xlabel=unit, ylabel="validation loss", ylim=(None, max(early, default=None)))
        axis.legend()
    cache.margins(0.2)
    cache.set(xlabel="KV bytes a token needs at full context", ylabel="final validation loss", xscale="log")
    decode.set(xlabel="sequences at once", ylabel="decoded tokens/s", xscale="log", yscale="log")
    decode.legend() if decode.lines else decode.set_axis_off()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def curve(group, key):
    """Validation loss over a key, at the steps that all seeds were evaluated at: (xs, means, lowest, highest)."""
    by_step = [{row["step"]: row for row in found.with_finite("val/loss")} for found in group]
    common = [step for step in by_step[0] if all(step in rows for rows in by_step)]
    xs = [statistics.fmean(rows[step][key] for rows in by_step) for step in common]
    losses = [[rows[step]["val/loss"] for rows in by_step] for step in common]
    return xs, *([middle(each) for each in losses] for middle in (statistics.fmean, min, max))


if __name__ == "__main__":
    run(main)
