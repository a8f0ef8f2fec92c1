"""The run folder: nothing in it, nor in wandb, runs ahead of the checkpoint that a run goes on from."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import runlog
from config import UserError
from model import GPT, ModelConfig
from runlog import RunLog, WandbMirror, claimed, experiment, git_commit, open_metrics, run_id, samples_until, variant
from train import TrainConfig


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": 1.0} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "train/l')  # killed while writing
    metrics, kept = open_metrics(path, step=2)
    with metrics:
        metrics.write(json.dumps({"step": 3, "train/loss": 0.5}) + "\n")
    assert kept == rows[:2]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:2] + [{"step": 3, "train/loss": 0.5}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", [b"foo}", b"{}", b'{"a": "\xff"}', b'{"step": "2"}'])
def test_a_damaged_row_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"line 2 of {path} is damaged") as error:
        open_metrics(path, step=2)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b'{"step": 1}\n' + line + b"\n"


@pytest.mark.parametrize("content", ["[]", "{}", "{", "5"])
def test_a_damaged_config_gives_a_new_run_id(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    assert run_id(file, step=1) != run_id(file, step=1)
    file.write_text('{"run_id": "kept"}')
    assert run_id(file, step=1) == "kept"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_no_tag(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(runlog, "__file__", str(tmp_path / "runlog.py"))
    assert git_commit() == ""
    (tmp_path / "file").write_text("a")
    git("init"), git("add", "file"), git("commit", "-m", "first"), git("tag", "-a", "v1", "-m", "tagged")
    assert git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_a_new_run_keeps_what_lay_there(tmp_path, capsys):
    """The log of a run whose checkpoints are gone, twice, and another program's settings; not that of a run without steps."""
    for number in (1, 2):
        (tmp_path / "config.json").write_text(f"settings {number}")
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        (tmp_path / "samples.txt").write_text("--- step 1\ntext\n")
        log_of(tmp_path, 0, wandb="disabled").close(0)
        assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "samples.txt").read_text() == ""
        assert (tmp_path / f"config.json.{number}").read_text() == f"settings {number}"
        assert f"samples.txt is kept as samples.txt.{number}" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl.1").read_text() == '{"step": 1}\n'
    log_of(tmp_path, 0, wandb="disabled").close(0)
    assert not (tmp_path / "config.json.3").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    log_of(foreign, 0, wandb="disabled").close(0)
    assert (foreign / "config.json.1").read_text() == "{}"


def test_a_folder_is_claimed_by_one_process(tmp_path):
    with claimed(tmp_path / "run"):
        with pytest.raises(UserError, match="in use by another process"), claimed(tmp_path / "run"):
            pass
        (tmp_path / "run" / "file").write_text("")
    with claimed(tmp_path / "run"), claimed(tmp_path / "other"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "an empty folder goes"


def test_samples_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "samples.txt"
    path.write_bytes("--- step 5\none\r\n\n--- two\n--- step 10\n\n--- step 15\nnaïve".encode())
    assert samples_until(path, step=10) == [(5, "one\r\n\n--- two"), (10, "")]
    assert path.read_bytes() == b"--- step 5\none\r\n\n--- two\n--- step 10\n\n"


SHAPE = {"n_head": 8, "n_embd": 64, "max_seq_len": 32, "vocab_size": 8}


def test_variants_have_names_of_their_own():
    names = {
        "mha": {},
        "mqa": {"attention": "mqa"},
        "gqa-2": {"attention": "gqa"},
        "gqa-4": {"attention": "gqa", "n_kv_head": 4},
        "swa-w8": {"attention": "swa"},
        "swa-w8-LLLG": {"attention": "swa", "window_pattern": "LLLG"},
        "swa-2-w4": {"attention": "swa", "n_kv_head": 2, "window": 4},
    }
    for name, flags in names.items():
        assert variant(ModelConfig(**SHAPE, **flags)) == name


def log_of(folder, step, wandb="offline", attention="gqa", seed=1, max_steps=8, time_s=0.0):
    """The RunLog of a run that is new, or goes on at `step`."""
    model = GPT(ModelConfig(n_layer=1, **SHAPE, attention=attention))
    config = TrainConfig(out_dir=str(folder), batch_size=2, max_steps=max_steps, wandb=wandb, seed=seed)
    data = SimpleNamespace(meta={"source": "a", "splits": {"val": {"shards": []}}, "tokenizer": {"type": "byte"}})
    folder.mkdir(exist_ok=True)
    return RunLog(model, config, data, torch.device("cpu"), torch.float32, 1, {"step": step, "time_s": time_s})


def test_speed_is_tokens_over_the_time_between_two_logs(tmp_path, monkeypatch):
    """Of 64 tokens a step, on two devices; an evaluation takes no part. time_s goes on from the checkpoint's."""
    now = [100.0]
    monkeypatch.setattr(runlog, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    log = log_of(tmp_path, 20, wandb="disabled", max_steps=40, time_s=50.0)
    log.tokens_per_step, log.flops_per_token, log.peak, log.world = 64, 1e6, 1e9, 2
    for step, logged, evaluated in ((30, 105.0, 111.0), (40, 113.0, 113.0)):
        now[0] = logged
        log.progress(step, 1.0, 1.0, 1.0)
        now[0] = evaluated
        log.evaluation(step, 1.0, 0.1, "text")
        log.restart_clock()
    log.close(40)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["time_s"] for row in rows] == [55.0, 61.0, 63.0, 63.0]
    assert [row["tokens_per_s"] for row in rows[::2]] == [64 * 10 / 5, 64 * 10 / 2]
    assert [row["mfu"] for row in rows[::2]] == pytest.approx([128 * 1e6 / 2e9, 320 * 1e6 / 2e9])


def test_the_command_that_comes_next_can_be_pasted(tmp_path, capsys):
    log_of(tmp_path / "a run", 8, wandb="disabled").close(8)
    assert f"done at step 8; try: python sample.py '{tmp_path}/a run'" in capsys.readouterr().out


def facts_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_one_experiment_is_all_runs_that_differ_in_attention_and_seed_alone(tmp_path):
    for name, settings in {"a": {}, "b": {"attention": "mqa"}, "c": {"seed": 2}, "d": {"max_steps": 9}}.items():
        log_of(tmp_path / name, 0, wandb="disabled", **settings).close(0)
    a, b, c, d = (facts_of(tmp_path / name) for name in "abcd")
    assert experiment(a) == experiment(b) == experiment(c) != experiment(d)
    assert len({facts["run_id"] for facts in (a, b, c, d)}) == 4


def inspect(folder, *flags):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_resumed_offline_run_is_one_whole_run(tmp_path):
    """Stopped at step 6, gone on from the checkpoint of step 4. Another run's folder beside it stays."""
    pytest.importorskip("wandb")
    other = tmp_path / "wandb" / "offline-run-1-other"
    other.mkdir(parents=True)
    for first, last in ((1, 6), (5, 8)):
        log = log_of(tmp_path, first - 1)
        for step in range(first, last + 1):
            log.progress(step, loss=10.0 * first + step, grad_norm=1.0, lr=0.1)
            if step % 4 == 0:
                log.evaluation(step, val_loss=5.0 - step % 8, stderr=0.1, text=f"text {step}")
        log.close(last)
    (folder,) = set((tmp_path / "wandb").glob("offline-run-*")) - {other}
    assert other.exists()
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["_step"] for row in rows] == [row["step"] for row in rows] == list(range(1, 9))
    assert [row["train/loss"] for row in rows] == [11, 12, 13, 14, 55, 56, 57, 58]
    kept = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        kept.setdefault(json.loads(line)["step"], {}).update(json.loads(line))
    assert [{key: row[key] for key in kept[row["step"]]} for row in rows] == list(kept.values())

    (run,) = (record["run"] for record in records if record["type"] == "run")
    facts = facts_of(tmp_path)
    assert (run["run_group"], run["job_type"], run["run_id"]) == (experiment(facts), "train", facts["run_id"])
    defined = [record["metric"] for record in records if record["type"] == "metric"]
    assert ("*", "tokens") in [(metric.get("glob_name"), metric.get("step_metric")) for metric in defined]
    seen = json.loads(inspect(folder, "--summary"))
    assert seen["config"] == facts
    assert {"variant", "params", "flops_per_token", "kv_bytes_per_token", "git_commit"} <= facts.keys()
    speeds = sorted(row["tokens_per_s"] for row in kept.values())
    assert seen["summary"]["val/loss"] == {"min": 1.0}
    assert seen["summary"]["tokens_per_s_median"] == pytest.approx((speeds[3] + speeds[4]) / 2)
    assert seen["summary"]["peak_mem_gib"] == {"max": max(row["peak_mem_gib"] for row in kept.values())}
    (table,) = (folder / "files" / "media" / "table").glob(f"samples_{8}_*.json")
    assert json.loads(table.read_text())["data"] == [[4, 4 * 2 * 32, "text 4"], [8, 8 * 2 * 32, "text 8"]]


def test_a_resumed_online_run_sends_what_the_server_lacks(tmp_path, monkeypatch):
    sent = []
    server = SimpleNamespace(step=7, define_metric=lambda *names, **keys: None, log=lambda row, step: sent.append((row, step)))
    monkeypatch.setattr(runlog, "start_wandb", lambda config, facts: server)
    rows = [{"step": step, "tokens": 64 * step} for step in range(1, 11)]
    WandbMirror(TrainConfig(out_dir=str(tmp_path)), {"run_id": "a", "model": {"max_seq_len": 8}}, rows, [])
    assert sent == [(row, row["step"]) for row in rows[6:]]
