"""The benchmarks: they count right and refuse what they cannot measure."""

import pytest
import torch
from util import repository, script

from benchmarks.attention import Shape, attention_flops
from benchmarks.markdown import marked
from benchmarks.tables import section
from kernels.reference import visible


@pytest.mark.parametrize("window", [0, 1, 5, 32, 100])
def test_attention_flops_count_the_visible_pairs(window):
    pairs = visible(torch.arange(32), torch.arange(32), window).sum().item()
    assert attention_flops(Shape(2, 4, 2, 32, 16, window)) == 2 * 4 * pairs * 16 * 4


@pytest.mark.parametrize("words", [[], ["speed"], ["engine", "attention"]])
def test_an_unknown_measurement_is_one_line(words):
    result = script("bench.py", *words, check=False)
    assert result.returncode == 2 and "attention or train or decode or engine" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("flag, words", [("--rounds=0", "1 or more, got 0"), ("--peers=ours,cuddn", "got cuddn")])
def test_wrong_flags_are_one_line(flag, words):
    result = script("bench.py", "engine", flag, check=False)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_no_results_leave_the_readme_as_it_is(tmp_path):
    result = script("bench.py", "tables", f"--out_dir={tmp_path}", check=False)
    assert result.returncode == 2 and "holds no results" in result.stderr
    assert marked("bench.py tables", section(repository / "results")) in (repository / "README.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["attention", "train", "decode"])
def test_kernels_without_a_gpu_are_one_line(name):
    result = script("bench.py", name, check=False)
    assert result.returncode == 2 and "NVIDIA GPU" in result.stderr


def test_the_readmes_tables_are_those_of_the_results():
    assert marked("bench.py tables", section(repository / "results")) in (repository / "README.md").read_text()
