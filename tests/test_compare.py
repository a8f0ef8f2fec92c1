"""Runs side by side: what may be compared, what the table says, what counts as a difference."""

import dataclasses
import functools
import hashlib
import json
import math
import random
import shutil
import statistics
import sys

import pytest
from test_runlog import log_of
from util import repository, script

import compare
from benchmarks import plots
from benchmarks.markdown import marked
from benchmarks.runs import ATTENTION, Run, by_variant, cut_short, load, objections
from config import UserError, parse
from model import ModelConfig
from runlog import variant
from train import TrainConfig

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 64, "max_seq_len": 64, "vocab_size": 256}
LOSSES = (4.0, 3.0, 2.5, 2.25)


def write_run(folder, losses=LOSSES, seed=1, text="text", eval_tokens=262_144, speed=1000.0, **attention):
    """A run folder as train.py leaves it: an evaluation every 10 steps of 100 tokens and 2 seconds."""
    model = ModelConfig(**SHAPE, **attention)
    train = TrainConfig(out_dir=str(folder), max_steps=40, seed=seed, eval_tokens=eval_tokens)
    shard = {"file": "a.bin", "tokens": 900, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    facts = {
        "run_id": str(folder),
        "variant": variant(model),
        "model": dataclasses.asdict(model),
        "train": dataclasses.asdict(train),
        "data": {"source": text, "splits": {"train": {"shards": [shard]}, "val": {"tokens": 900, "shards": [shard]}}},
        "params": 1_234_567,
        "flops_per_token": 7e6,
        "kv_bytes_per_token": 1024 * model.n_kv_head,
        "device": "cpu",
        "processes": 1,
        "dtype": "float32",
        "versions": {"torch": "2"},
        "git_commit": "a" * 40,
    }
    rows = []
    for i, loss in enumerate(losses, start=1):
        base = {"step": 10 * i, "tokens": 1000 * i, "time_s": 20.0 * i}
        rows.append({**base, "train/loss": loss, "tokens_per_s": speed * (0.1 if i == 1 else 1), "peak_mem_gib": i / 4})
        rows.append({**base, "val/loss": loss, "val/stderr": 0.03})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def change(folder, **changed):
    """Replace facts of a run; a key of two parts is written a__b."""
    facts = json.loads((folder / "config.json").read_text())
    for key, value in changed.items():
        *parts, last = key.split("__")
        functools.reduce(dict.__getitem__, parts, facts)[last] = value
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


DECODE = {  # as bench.py variants writes it, of another shape
    "shape": {"n_layer": 16, "n_head": 8, "n_embd": 2048, "max_seq_len": 2048},
    "tokens": 2048,
    "device": "a GPU",
    "dtype": "bfloat16",
    "versions": {"python": "3", "torch": "2.1", "triton": "3.2"},
    "git_commit": "b" * 40 + "-dirty",
    "rows": [
        {"attention": "mha", "n_kv_head": 8, "window": 0, "window_pattern": "L", "decode_tokens_per_s": {"1": 10.0, "8": 20.0, "64": None}},
        {"attention": "mqa", "n_kv_head": 1, "window": 0, "window_pattern": "L", "decode_tokens_per_s": {"1": 11.0, "8": 40.0, "64": 80.0}},
        {"attention": "swa", "n_kv_head": 8, "window": 512, "window_pattern": "L", "decode_tokens_per_s": {"1": 12.0, "8": 30.0, "64": 60.0}},
    ],
}


def shifted(by):
    return [loss + by for loss in LOSSES]


@pytest.fixture
def run_compare(tmp_path, capsys, monkeypatch):
    """Run it in an empty folder: (what it printed, table.json)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        compare.main([f"--out={tmp_path / 'results'}", *map(str, argv)])
        return capsys.readouterr().out, json.loads((tmp_path / "results" / "table.json").read_text())

    return call


def test_the_variants_resolved_settings_differ_in_attention_alone():
    flags = {"mha": [], "mqa": [], "gqa": [], "swa": [], "hybrid": ["--attention=swa", "--window_pattern=LLLG"]}
    resolved = {}
    for name, more in flags.items():
        argv = [
            f"{repository}/configs/gpt2_124m.toml",
            *(more or [f"--attention={name}"]),
            f"--out_dir=out/124m-{name}",
        ]
        _, model, train = parse(argv, ModelConfig, TrainConfig, usage="")
        resolved[name] = {**dataclasses.asdict(model), **dataclasses.asdict(train)}
    for name, settings in resolved.items():
        different = {key for key in settings if settings[key] != resolved["mha"][key]}
        assert different <= ATTENTION | {"out_dir"}, name
    numbers = [(s["n_kv_head"], s["window"], s["window_pattern"]) for s in resolved.values()]
    assert numbers == [(12, 0, "L"), (1, 0, "L"), (3, 0, "L"), (12, 256, "L"), (12, 256, "LLLG")]


def test_table_files_and_plots(tmp_path, run_compare):
    """A run folder with a space in its name, two seeds, a hybrid, decoding speeds."""
    paths = [
        write_run(tmp_path / "out" / "with space"),
        write_run(tmp_path / "out" / "mha-2", losses=shifted(0.02), seed=2, speed=2000.0),
        write_run(tmp_path / "out" / "mqa", losses=shifted(0.2), attention="mqa"),
        write_run(tmp_path / "out" / "hybrid", losses=shifted(0.01), attention="swa", window_pattern="LLLG"),
    ]
    (tmp_path / "decode.json").write_text(json.dumps(DECODE))
    printed, results = run_compare(*paths, "--target_loss=2.75", f"--decode={tmp_path / 'decode.json'}")
    mha, mqa, hybrid = results["rows"]
    assert (mha["seeds"], mha["tokens_per_s"], mha["peak_mem_gib"]) == (2, 1500.0, 1.0)
    assert mha["final_loss"] == pytest.approx(2.26) and mha["seed_deviation"] == pytest.approx(0.02 / math.sqrt(2))
    assert mha["target_tokens"] == pytest.approx((2500 + 2540) / 2), "on the line between evaluations"
    assert mha["target_time_s"] == pytest.approx((2.5 + 1.27) / 2), "at the median speed"
    assert mha["decode_tokens_per_s"] == {"1": 10.0, "8": 20.0} and hybrid["decode_tokens_per_s"] == {}
    assert mqa["decode_tokens_per_s"] == {"1": 11.0, "8": 40.0, "64": 80.0}
    assert (mqa["n_kv_head"], mqa["kv_bytes_per_token"], mqa["kv_bytes_needed"]) == (1, 1024, 1024)
    assert hybrid["kv_bytes_needed"] == 4096 * (3 * 16 / 64 + 1) / 4
    table = (tmp_path / "results" / "table.md").read_text()
    for line in (
        "| variant | mha | mqa | swa-w16-LLLG |",
        "| seeds | 2 | 1 | 1 |",
        "| seed deviation | 0.0141 |  |  |",
        "| window | none | none | 16, LLLG |",
        "| parameters | 1.2M | 1.2M | 1.2M |",
        "| tokens/s | 1,500 | 1,000 | 1,000 |",
        "| FLOPs/token | 7.0M | 7.0M | 7.0M |",
        "| training time to 2.75 | 1.89 s | 2.9 s | 2.52 s |",
        "| decode tokens/s, batch 8, see below | 20 | 40 |  |",  # the largest that all of them could do
    ):
        assert line in table
    assert "| 2.4500 ± 0.0300 |" in table and "MFU" not in table
    assert "4.0k tokens of text a run, loss on 900 others;" in table, "eval_tokens are more than there are"
    assert "times are tokens at median speed, without compiling and evaluations" in table
    assert "a model of 16 layers of 2,048 channels and 8 heads, with sequences close to 2,048 tokens" in table
    assert "`python bench.py variants` on a GPU, bfloat16, torch 2.1, triton 3.2, commit bbbbbbbbbb-dirty." in table
    assert results["decode"] == {key: value for key, value in DECODE.items() if key != "rows"}
    assert len({len(line) for line in printed.splitlines() if line.startswith("|")}) == 1, "columns are aligned"
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert written == {"table.json", "table.md", "curves.png", "curves.svg", "runs"}

    before = {path: path.read_bytes() for path in (tmp_path / "results").glob("curves.*")}
    again = sorted((tmp_path / "results" / "runs").iterdir(), key=lambda path: [p.name for p in paths].index(path.name))
    _, from_results = run_compare(*again, "--target_loss=2.75", f"--decode={tmp_path / 'decode.json'}")
    assert {**from_results, "command": ""} == {**results, "command": ""}
    assert before == {path: path.read_bytes() for path in before}, "the same results give the same files"


def test_a_difference_inside_the_band_is_none(tmp_path, run_compare):
    """One pair of seeds: one degree of freedom."""
    differences = {"mqa": 0.3, "gqa": 0.2, "swa": -0.3}
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", losses=shifted(0.02), seed=2)]
    paths += [write_run(tmp_path / name, losses=shifted(by), attention=name) for name, by in differences.items()]
    _, results = run_compare(*paths)
    band = 12.71 * 0.02 / math.sqrt(2) * math.sqrt(1 + 1 / 2)
    noise, mqa, gqa, swa = results["verdicts"]
    assert "of the same variant have a standard deviation of 0.0141 (2 seeds of mha)" in noise and "1 degree of freedom" in noise
    assert noise.endswith("The band is for one comparison: the more of them, the likelier that one shows a difference where there is none.")
    assert mqa == f"mqa - mha: +0.2900, band ± {band:.4f}: higher."
    assert gqa == f"gqa-1 - mha: +0.1900, band ± {band:.4f}: no difference beyond noise."
    assert swa.endswith(": lower.")


def test_without_a_second_seed_no_difference_counts(tmp_path, run_compare):
    _, results = run_compare(
        write_run(tmp_path / "a"), write_run(tmp_path / "b", losses=shifted(0.8), attention="mqa")
    )
    assert results["verdicts"][0].startswith("Noise: unknown") and results["verdicts"][1] == "mqa - mha: +0.8000."


def test_mha_is_what_the_others_are_compared_with(tmp_path, run_compare):
    paths = [write_run(tmp_path / name, attention=name) for name in ("mqa", "mha", "gqa")]
    assert [line.split(":")[0] for line in run_compare(*paths)[1]["verdicts"][1:]] == ["mqa - mha", "gqa-1 - mha"]
    _, without = run_compare(paths[0], paths[2])
    assert without["verdicts"][1] == "gqa-1 - mqa: +0.0000."


@pytest.mark.parametrize("step, short", [(39, True), (40, False)])
def test_a_run_is_cut_short_by_a_single_step(step, short):
    assert bool(list(cut_short([Run("a", {"train": {"max_steps": 40}}, [{"step": step, "val/loss": 1.0}])]))) == short


def share_of_differences(seeds, shift, experiments=4000):
    """How often the second of variants with so many seeds each is said to differ from the first, in units of the noise."""
    draw, found = random.Random(0), 0
    for _ in range(experiments):
        rows = []
        for i, count in enumerate(seeds):
            losses = [shift * (i == 1) + draw.gauss(0, 1) for _ in range(count)]
            deviation = statistics.stdev(losses) if count > 1 else None
            row = {"variant": f"mha {i}", "seeds": count, "final_loss": statistics.fmean(losses), "seed_deviation": deviation}
            rows.append(row)
        found += "no difference" not in compare.verdicts(rows)[1]
    return found / experiments


@pytest.mark.parametrize("seeds", [(2, 1), (1, 2), (2, 2), (3, 3), (2, 2, 2, 2, 2), (7, 7)])
def test_the_band_is_honest_and_useful(seeds):
    """5% false differences, and with two pairs or more most of five standard deviations are found."""
    assert share_of_differences(seeds, shift=0) == pytest.approx(0.05, abs=0.015)
    assert share_of_differences(seeds, shift=5) > (0.5 if sum(seeds) > 3 else 0.2)


def test_a_seed_without_a_final_loss_says_nothing_about_noise(tmp_path):
    group = [load(write_run(tmp_path / "a")), load(write_run(tmp_path / "b", (4.0, 3.0, 2.5, math.nan), seed=2))]
    assert compare.row_of("mha", group, 1.0, None)["seed_deviation"] is None


def test_one_run_alone_and_a_half_written_last_line(tmp_path, run_compare):
    with open(write_run(tmp_path / "a") / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "val/lo')
    printed, results = run_compare(tmp_path / "a")
    assert len(results["rows"]) == 1 and results["verdicts"] == [] and "| mha " in printed


def test_other_settings_that_differ_become_part_of_the_label(tmp_path, run_compare):
    for name, layers in (("a", 4), ("b", 2)):
        change(write_run(tmp_path / name), model__n_layer=layers)
    _, results = run_compare(tmp_path / "a", tmp_path / "b")
    assert [row["variant"] for row in results["rows"]] == ["mha n_layer=4", "mha n_layer=2"]


def test_a_number_is_the_same_setting_in_wandbs_spelling(tmp_path):
    cases = (("a", 1, 1.0), ("b", 2, 1))
    runs = [load(change(write_run(tmp_path / name, seed=seed), train__grad_clip=clip)) for name, seed, clip in cases]
    assert list(by_variant(runs)) == ["mha"]


def test_everything_that_runs_were_measured_on_is_named(tmp_path, run_compare):
    paths = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    change(paths[1], versions={"torch": "3", "triton": "1"}, git_commit="c" * 40)
    change(paths[2], versions={"torch": "2", "numpy": "2"}, git_commit="")
    printed, results = run_compare(*paths)
    assert len(results["versions"]) == 3
    assert "Measured on cpu, float32, torch 2, torch 3, triton 1, commit aaaaaaaaaa, cccccccccc; " in printed


def wrong_cases(folder):
    """{case: (arguments, words of the one line)}; all but the first few may be forced."""
    good = write_run(folder / "good")
    empty = write_run(folder / "empty")
    (empty / "metrics.jsonl").write_text("")
    broken = write_run(folder / "broken")
    (broken / "metrics.jsonl").write_text('{"step": 1\n{"step": 2, "tokens": 1, "time_s": 1}\n')
    strange = write_run(folder / "strange")
    (strange / "metrics.jsonl").write_text('{"step": 1, "val/loss": null}\n')
    deep, deep_rows, huge = (write_run(folder / name) for name in ("deep", "deep_rows", "huge"))
    (deep / "config.json").write_text("[" * 5000)
    (deep_rows / "metrics.jsonl").write_text("[" * 5000 + "\n{}\n")
    (huge / "metrics.jsonl").write_text(f'{{"step": 1, "tokens": {10**400}, "time_s": 1, "val/loss": 1}}\n')
    older, lists = change(write_run(folder / "older"), model={}), write_run(folder / "lists")
    (lists / "config.json").write_text("[1]")
    (folder / "decode.json").write_text('{"rows": [{"attention": "mha"}]}')
    (folder / "plain").mkdir()
    mirrored = write_run(folder / "mirrored")
    (mirrored / "metrics.jsonl").unlink()
    (mirrored / "wandb" / "offline-run-a").mkdir(parents=True)
    (mirrored / "wandb" / "offline-run-a" / "run-a.wandb").write_bytes(b"")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "run-a.wandb").write_bytes(b"")
    for name in ("a", "b"):
        (folder / "several" / name).mkdir(parents=True)
        (folder / "several" / name / "run.wandb").write_bytes(b"")
    return {
        "nothing": ([], "takes run folders"),
        "absent": ([folder / "absent"], "absent is no folder"),
        "no run": ([folder / "plain"], "plain is no run: it lacks config.json and metrics.jsonl"),
        "no metrics": ([mirrored], "mirrored is no run: it lacks metrics.jsonl;"),
        "no rows": ([empty], "no validation loss yet"),
        "not JSON": ([broken], "line 1 is not JSON"),
        "not numbers": ([strange], "not numbers by name"),
        "deep settings": ([deep], "config.json is not JSON: maximum recursion depth exceeded"),
        "deep rows": ([deep_rows], "line 1 is not JSON: maximum recursion depth exceeded"),
        "enormous": ([huge], "a row of"),
        "other version": ([older], "no valid model.window_pattern, model.attention, model.n_layer"),
        "no settings": ([lists], "lists have no valid run_id, variant"),
        "no speed": ([write_run(folder / "slow", speed=0.0)], "slow has no tokens_per_s above 0"),
        "no name": ([good, "--out="], "out takes a name, got none"),
        "target": ([good, "--target_loss=nan"], "target_loss takes a number of 0 or more"),
        "other decode": ([good, f"--decode={folder / 'decode.json'}"], "decode.json holds no decoding speeds"),
        "wandb without history": ([folder / "wandb"], str(folder / "wandb")),
        "several wandb runs": ([folder / "several"], "several holds 2 runs of wandb's"),
        "decode": ([good, "--decode=nowhere.json"], "no file nowhere.json"),
        "readme": ([good, f"--readme={folder / 'good' / 'config.json'}"], "no place for the table"),
        "cut short": (
            [write_run(folder / "short", losses=(4.0, 3.0))],
            "short is cut short: its last evaluation is of step 20",
        ),
        "not finite": (
            [write_run(folder / "nan", losses=(4.0, 3.0, 2.0, math.nan))],
            "nan ends with the validation loss nan",
        ),
        "evaluation": (
            [good, write_run(folder / "tokens", eval_tokens=64, attention="mqa")],
            "eval_tokens is 64, there 262144",
        ),
        "data": (
            [good, write_run(folder / "text", text="other", attention="mqa")],
            "the validation split is 900 tokens (d9298a10), there 900 tokens (982d9e3e)",
        ),
        "steps": (
            [good, change(write_run(folder / "steps", losses=LOSSES[:2], attention="mqa"), train__max_steps=20)],
            f"steps takes 20 steps, {good} 40",
        ),
        "steps beyond the end": (
            [good, write_run(folder / "beyond", losses=[*LOSSES, 2.0], attention="mqa")],
            f"beyond takes 50 steps, {good} 40",
        ),
        "seeds": ([good, write_run(folder / "twin")], "twin and"),
    }


FORCIBLE = ("cut short", "not finite", "evaluation", "data", "steps", "steps beyond the end", "seeds")


def test_what_cannot_be_compared_is_one_line(tmp_path, run_compare):
    for case, (arguments, words) in wrong_cases(tmp_path).items():
        with pytest.raises(UserError) as caught:
            run_compare(*arguments)
        assert words in str(caught.value) and "\n" not in str(caught.value), case
        if case in FORCIBLE:
            printed, _ = run_compare(*arguments, "--force")
            assert (
                f"- Note: {str(caught.value).removesuffix('; mend that, leave a run out, or add --force')}." in printed
            ), case


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.splits.train.shards", [1]),
        ("data.splits.val.shards", "abc"),
        ("data.splits.val.shards", [{"tokens": 1}]),
        ("data.splits.val.tokens", "x"),
        ("run_id", ""),
        ("variant", ""),
        ("versions", None),
        ("git_commit", None),
        ("processes", 0),
        ("params", 10**400),
        ("model.n_layer", 0),
        ("model.n_head", 0),
        ("model.max_seq_len", -1),
        ("model.window_pattern", ""),
    ],
)
def test_settings_that_will_not_do_are_named(tmp_path, key, value):
    folder = change(write_run(tmp_path / "a"), **{key.replace(".", "__"): value})
    with pytest.raises(UserError, match=f"the settings in {folder} have no valid {key}: another program or version wrote them"):
        load(folder)


def test_a_run_of_step_0_alone_can_be_shown(tmp_path, run_compare):
    row = {"step": 0, "tokens": 0, "time_s": 1.0, "val/loss": 4.0, "tokens_per_s": 10.0}
    (write_run(tmp_path / "a") / "metrics.jsonl").write_text(json.dumps(row))
    printed, results = run_compare(tmp_path / "a", "--force")
    assert results["rows"][0]["final_loss"] == 4.0 and "curves.png" in printed


def test_decoding_speeds_belong_to_the_attention_and_not_to_the_size(tmp_path):
    there = {"mha": True, "mqa": True, "swa": True, "gqa": False, "swa with mqa": False, "other window": False, "hybrid": False}
    flags = {"swa with mqa": {"n_kv_head": 1}, "other window": {"window": 8}, "hybrid": {"window_pattern": "LG"}}
    for name, found in there.items():
        attention = name if name not in flags else "swa"
        model = dataclasses.asdict(ModelConfig(**SHAPE, attention=attention, **flags.get(name, {})))
        assert bool(compare.decode_speeds(DECODE, model)) == found, name
    assert compare.decode_speeds(None, model) == {}


ROW = DECODE["rows"][0]


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [DECODE],
        {"shape": None},
        *({"shape": DECODE["shape"] | {key: wrong}} for key in DECODE["shape"] for wrong in (None, 0)),
        {"tokens": "2048"},
        *({key: None} for key in ("device", "dtype", "versions", "git_commit")),
        {"rows": {}},
        {"rows": [None]},
        {"rows": [ROW, [ROW]]},
        {"rows": [ROW | {"n_kv_head": None}]},
        {"rows": [ROW | {"decode_tokens_per_s": 10.0}]},
        {"rows": [ROW | {"decode_tokens_per_s": {"1": "10"}}]},
        {"rows": [ROW | {"decode_tokens_per_s": {"1": 10**400}}]},
        {"rows": [ROW | {"decode_tokens_per_s": {"one": 10.0}}]},
    ],
)
def test_a_file_of_other_contents_is_no_decoding_speeds(tmp_path, wrong):
    path = tmp_path / "decode.json"
    path.write_text(json.dumps(DECODE | wrong if isinstance(wrong, dict) else wrong))
    with pytest.raises(UserError, match="decode.json holds no decoding speeds; python bench.py variants writes them"):
        compare.read_decode(path, required=True)


@pytest.mark.parametrize("key, here, there", [("dtype", "float32", "bfloat16"), ("processes", 1, 2)])
def test_another_precision_or_number_of_processes_is_another_variant(tmp_path, run_compare, key, here, there):
    other = change(write_run(tmp_path / "b", seed=2, speed=2000.0), **{key: there})
    _, results = run_compare(write_run(tmp_path / "a"), other)
    assert [row["variant"] for row in results["rows"]] == [f"mha {key}={here}", f"mha {key}={there}"]
    assert [row["tokens_per_s"] for row in results["rows"]] == [1000.0, 2000.0]


def test_the_same_data_from_another_place_are_the_same(tmp_path, run_compare):
    other = change(write_run(tmp_path / "b", attention="mqa"), data__source="elsewhere")
    assert run_compare(write_run(tmp_path / "a"), other)[1]["notes"] == []


def test_of_a_copy_that_went_on_the_longer_counts(tmp_path, run_compare):
    long = write_run(tmp_path / "long")
    short = change(write_run(tmp_path / "short", losses=LOSSES[:2]), run_id=str(long), train__max_steps=20)
    for paths in ((short, long), (long, short)):
        _, results = run_compare(*paths)
        (row,), (note,) = results["rows"], results["notes"]
        assert row["final_loss"] == LOSSES[-1]
        assert note == f"{short} is the same run as {long} and counts once: the longer one, of 40 steps against 20"


@pytest.mark.parametrize(
    "number, text", [(None, ""), (0.01234, "0.0123 s"), (999.4, "999 s"), (999.5, "1,000 s"), (12345.6, "12,346 s")]
)
def test_times_have_few_digits(number, text):
    assert compare.seconds(number) == text


def test_the_ticks_of_lines_are_their_points_and_bars_names_do_not_overlap():
    """A series without points takes its colour, so that it agrees with other plots, and no place in the legend."""
    colors = pytest.importorskip("matplotlib.colors")
    figure, (left, middle, right) = plots.pyplot().subplots(1, 3, figsize=(12, 4), layout="constrained")
    plots.lines(left, {"a": [], "b": [(1, 2.0), (16, 3.0)], "c": [(64, 1.0)]}, "x", "y")
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "16", "64"]
    assert left.get_legend_handles_labels()[1] == ["b", "c"]
    assert colors.same_color(left.lines[1].get_color(), "C1")
    plots.bars(middle, {"mha": 1, "mqa": 2}, "y")
    plots.bars(right, dict.fromkeys(("mha", "gqa-8", "mqa", "swa-w512", "swa-w512-LLLG"), 1), "y")
    figure.canvas.draw()
    assert [label.get_rotation() for label in middle.get_xticklabels()] == [0, 0]
    assert [label.get_text() for label in right.get_xticklabels()][-1] == "swa-w512-LLLG"
    assert {label.get_rotation() for label in right.get_xticklabels()} == {20}


def test_without_matplotlib_the_table_is_there(tmp_path, run_compare, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    printed, results = run_compare(write_run(tmp_path / "ä ö"))
    assert "no plot" in printed and "pip install matplotlib" in printed and results["rows"]


def test_runs_of_an_earlier_table_are_named(tmp_path, run_compare):
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", attention="mqa")]
    assert "not in this table" not in run_compare(*paths)[0]
    assert "also holds runs that are not in this table: b\n" in run_compare(paths[0])[0]


def test_the_program_ends_with_exit_code_2(tmp_path):
    result = script("compare.py", tmp_path, check=False)
    assert result.returncode == 2 and result.stderr == (
        f"error: {tmp_path} is no run: it lacks config.json and metrics.jsonl; "
        "give a run's out_dir or its wandb/offline-run-* folder\n"
    )


def test_wandb_folders_and_runs_given_twice(tmp_path, run_compare):
    """A run's folder, its wandb folder and a copy are one run; the wandb folder alone gives the same table."""
    pytest.importorskip("wandb")
    log = log_of(tmp_path / "run", 0)
    for step in range(1, 9):
        log.progress(step, loss=1.0, grad_norm=1.0, lr=0.1)
    log.evaluation(8, val_loss=2.0, stderr=0.1, text="text")
    log.close(8)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (mirror,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    merged = {}
    for row in load(tmp_path / "run").rows:
        merged.setdefault(row["step"], {}).update(row)
    assert load(mirror).rows == load(tmp_path / "run" / "wandb").rows == list(merged.values())
    assert load(mirror).facts == load(tmp_path / "run").facts
    _, results = run_compare(tmp_path / "run", mirror, tmp_path / "copy")
    assert results["rows"][0]["seeds"] == 1 and len(results["notes"]) == 2
    assert "is the same run as" in results["notes"][0]
    _, alone = run_compare(mirror)
    assert alone["rows"] == results["rows"]


def test_the_section_goes_between_the_marks_of_the_readme(tmp_path, run_compare):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{marked('compare.py', 'old')}\nbelow\n")
    for _ in range(2):
        _, results = run_compare(
            write_run(tmp_path / "a") if not (tmp_path / "a").exists() else tmp_path / "a", f"--readme={readme}"
        )
        assert readme.read_text() == f"above\n{marked('compare.py', compare.section(results))}\nbelow\n"


def test_files_are_replaced_as_a_whole(tmp_path, run_compare):
    """A full disk would cut one that is written in place. A README that is a link stays one."""
    (tmp_path / "real.md").write_text(marked("compare.py", ""))
    (tmp_path / "README.md").symlink_to("real.md")
    arguments = [write_run(tmp_path / "a"), f"--readme={tmp_path / 'README.md'}"]
    run_compare(*arguments)
    texts = [path for path in (tmp_path / "results").rglob("*") if path.suffix in (".json", ".jsonl", ".md")]
    before = {path: path.stat().st_ino for path in [*texts, tmp_path / "real.md"]}
    run_compare(*arguments)
    assert len(before) == 5 and not [path for path in before if path.stat().st_ino == before[path]]
    assert (tmp_path / "README.md").is_symlink()


def test_paths_that_are_not_utf8(tmp_path, run_compare):
    paths = [change(write_run(tmp_path / name), data__source="caf\udce9.txt") for name in "ab"]
    _, results = run_compare(paths[0], change(paths[1], train__init_from="caf\udce9"))
    assert results["rows"][1]["variant"] == r"mha init_from=caf\udce9"
    assert r"4.0k tokens of caf\udce9.txt a run" in (tmp_path / "results" / "table.md").read_text(encoding="utf-8")


def test_a_readme_that_is_not_utf8_is_one_line(tmp_path, run_compare):
    (tmp_path / "README.md").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"README.md is not UTF-8: .*; save it as such"):
        run_compare(write_run(tmp_path / "a"), f"--readme={tmp_path / 'README.md'}")


@pytest.mark.skipif(not (repository / "results/variants").exists(), reason="no results/variants")
def test_the_published_runs_are_comparable_and_give_the_published_table():
    published = json.loads((repository / "results/variants/table.json").read_text())
    runs = [load(path) for path in sorted((repository / "results/variants/runs").iterdir())]
    variants = by_variant(runs)
    assert objections(runs) == [] and not any("=" in label for label in variants)
    decode = compare.read_decode(repository / "results/variants.json", required=published["decode"] is not None)
    results = compare.compare(variants, published["target_loss"], decode)
    rows = {row["variant"]: row for row in json.loads(json.dumps(results["rows"]))}
    assert rows == {row["variant"]: row for row in published["rows"]}


@pytest.mark.skipif(not (repository / "results/variants/table.json").exists(), reason="no results/variants/table.json")
def test_the_readmes_table_is_the_measured_one():
    results = json.loads((repository / "results/variants/table.json").read_text())
    assert marked("compare.py", compare.section(results)) in (repository / "README.md").read_text()
