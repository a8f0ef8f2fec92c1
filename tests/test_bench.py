"""The benchmarks: they count right and refuse what they cannot measure."""

import gc
from types import SimpleNamespace

import pytest
import torch
from util import repository, script

import bench
from benchmarks import engine
from benchmarks.attention import Shape, attention_flops
from benchmarks.markdown import marked
from benchmarks.measure import frozen_objects, leave_out, write_results
from benchmarks.tables import section
from config import UserError
from kernels.reference import visible


@pytest.mark.parametrize("window", [0, 1, 5, 32, 100])
def test_attention_flops_count_the_visible_pairs(window):
    pairs = visible(torch.arange(32), torch.arange(32), window).sum().item()
    assert attention_flops(Shape(2, 4, 2, 32, 16, window)) == 2 * 4 * pairs * 16 * 4


@pytest.mark.parametrize("words", [[], ["speed"], ["engine", "attention"]])
def test_an_unknown_measurement_is_one_line(words):
    result = script("bench.py", *words, check=False)
    assert result.returncode == 2 and "one of attention, train, decode, engine" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flag, words",
    [("--rounds=0", "1 or more, got 0"), ("--peers=ours,cuddn", "got cuddn"), ("--peers=fa2", "takes ours and any others, got fa2")],
)
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


@pytest.mark.parametrize("content", ["{}", "[]", "5", '{"versions": []}'])
@pytest.mark.parametrize("name", ["train", "variants"])
def test_a_file_of_other_contents_is_one_line(tmp_path, name, content):
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(UserError, match=rf"{name}.json is not what bench.py writes .*; run python bench.py {name} again"):
        section(tmp_path)


def test_without_matplotlib_it_ends_in_one_line(tmp_path, monkeypatch):
    def measure(config):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr("benchmarks.variants.bench_variants", measure)
    with pytest.raises(UserError, match="No module named 'matplotlib'; pip install"):
        bench.main(["variants", f"--out_dir={tmp_path}"])


def test_results_are_replaced_as_a_whole(tmp_path):
    """A full disk would cut a file that is written in place."""
    numbers = set()
    for _ in range(2):
        write_results(tmp_path / "train.json", torch.device("cpu"), torch.float32, rows=[])
        numbers.add((tmp_path / "train.json").stat().st_ino)
    assert len(numbers) == 2


def test_a_loads_figures_are_all_of_its_median_turn(monkeypatch):
    """Turns of 5, 1 and 3 seconds behind a first one that only warms up."""
    seconds = iter([9, 5, 1, 3])

    def serve(built, requests):
        took = next(seconds)
        built.stats = SimpleNamespace(
            prefill_tokens=took, prefill_s=1, decode_tokens=10 * took, decode_s=1, peak_pages=took, preemptions=0,
            unused_share=took, unused_share_of_reserving=took,
        )  # fmt: skip
        return took, [took]

    built = SimpleNamespace(runner=SimpleNamespace(graphs={}))
    monkeypatch.setattr(engine, "Engine", lambda *given, **keys: built)
    monkeypatch.setattr(engine, "serve", serve)
    row, trace = engine.measure_load(None, engine.LOADS[0], rounds=3)
    assert (row["seconds"], row["tokens_per_s"], row["new_tokens"]) == (3, 256 / 3, 256)
    assert (row["prefill_tokens_per_s"], row["decode_tokens_per_s"], row["peak_pages"], trace) == (3, 30, 3, [3])


def test_frozen_objects_are_collected_afterwards():
    before = gc.get_freeze_count()
    with pytest.raises(RuntimeError), frozen_objects():
        assert gc.get_freeze_count() > before
        raise RuntimeError
    assert gc.get_freeze_count() == 0


def test_a_peer_that_cannot_take_part_is_named_and_other_errors_are_not_hidden(capsys):
    leave_out("cudnn", RuntimeError("No kernel\nmore"), "mha")
    assert capsys.readouterr().out == "mha, cudnn: left out (No kernel)\n"
    for peer, error in (("ours", RuntimeError("wrong")), ("cudnn", torch.OutOfMemoryError("full"))):
        with pytest.raises(type(error)):
            leave_out(peer, error, "mha")
