"""What several test files share: running the programs as a user does, and where kernels run."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, kernels run in Triton's interpreter
repository = Path(__file__).parent.parent


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")(test))


def script(*argv, check=True, timeout=120, env=None, cwd=repository):
    """Run a program of the repository; with check, its exit code must be 0."""
    result = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert not check or result.returncode == 0, result.stderr
    return result


def environment(more=None):
    """One thread a process: tests run side by side with other work, and more threads only wait for each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}


def metrics(run_folder, key="train/loss"):
    """{step: value} of one key of metrics.jsonl."""
    rows = [json.loads(line) for line in Path(run_folder, "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def counted_compilations(monkeypatch):
    """A list of all graphs that torch.compile is given from now on. They run as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    return graphs
