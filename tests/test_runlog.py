"""The run folder: metrics never run ahead of the checkpoint that a run goes on from."""

import json

from runlog import open_metrics


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": 1.0} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "train/l')  # killed while writing
    with open_metrics(path, step=2) as metrics:
        metrics.write(json.dumps({"step": 3, "train/loss": 0.5}) + "\n")
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:2] + [{"step": 3, "train/loss": 0.5}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # a run that ended before its first checkpoint
    open_metrics(tmp_path / "metrics.jsonl", step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
