"""Settings: later ones win, and every mistake is one line that says what to do."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from util import repository, script

from config import UserError, parse, pathname, run
from model import ModelConfig
from train import TrainConfig


@dataclass(frozen=True)
class Toy:
    width: Annotated[int, "an int"] = 4
    rate: Annotated[float, "a float"] = 0.5
    mode: Annotated[Literal["slow", "fast"], "a choice"] = "slow"
    name: Annotated[str, "a string"] = ""
    flag: Annotated[bool, "a switch"] = False
    place: Annotated[pathname, "a file or folder"] = ""


def read(*argv):
    words, toy = parse(argv, Toy, usage="toy")
    return words, toy


def test_later_settings_win(tmp_path):
    (tmp_path / "a.toml").write_text("width = 1\nrate = 2\nname = 'a'")
    (tmp_path / "b.toml").write_text("width = 2\nflag = true")
    words, toy = read("run", str(tmp_path / "a.toml"), str(tmp_path / "b.toml"), "--mode=fast", "--name=x=y")
    assert words == ["run"]
    assert toy == Toy(width=2, rate=2.0, mode="fast", name="x=y", flag=True)
    assert isinstance(toy.rate, float)
    assert read("--width=9", str(tmp_path / "a.toml"))[1].width == 1
    assert read("--flag")[1].flag


def test_a_tilde_is_the_home_folder_in_names_of_files_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    (tmp_path / "a.toml").write_text('place = "~/b"')
    for argument in ("--place=~/b", str(tmp_path / "a.toml")):
        assert read(argument, "--name=~/b")[1] == Toy(place="/home/a/b", name="~/b")
    for kept in ("b/~", "~nobody is called so/b"):
        assert read(f"--place={kept}")[1].place == kept


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--widht=3", ["widht", "nearest", "width"]),
        ("--width=3.5", ["width", "int", "3.5"]),
        ("--width=", ["width", "int"]),
        ("--width", ["width", "--width=VALUE"]),
        ("--rate=much", ["rate", "float", "much"]),
        ("--flag=yes", ["flag", "true|false", "yes"]),
        (f"--width={10**400}", ["width", "at most 1023 bits"]),
        (f"--width={'9' * 5000}", ["width", "int", "999"]),
        ("--mode=medium", ["mode", "slow|fast", "medium"]),
        ("-w", ["-w", "--key=value"]),
        ("missing.toml", ["missing.toml"]),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_is_taken(argument, words):
    with pytest.raises(UserError) as error:
        read(argument)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


WRONG = ["width = 'four'", "width = true", "width = 1.0", "flag = 1", "mode = 3", "wide = 3", "a = [", r'name = "\u0000"']
ENORMOUS = [f"rate = {10**400}", f"width = {'9' * 5000}", f"width = 0x{'f' * 5000}"]
DEEP = ["a = " + "[" * 5000, "width." + "a." * 5000 + "a = 1"]


@pytest.mark.parametrize("text", WRONG + ENORMOUS + DEEP)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.toml") as error:
        read(str(tmp_path / "bad.toml"))
    assert len(str(error.value)) < 300 + len(str(tmp_path)) and "\n" not in str(error.value)


def test_every_key_is_explained():
    for schema in (ModelConfig, TrainConfig):
        with pytest.raises(SystemExit) as done:
            parse(["--help"], schema, usage="")
        assert done.value.code == 0


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_help_prints_every_key(program):
    text = script(program, "--help").stdout
    for key in ("--seed", "--device") + (("--attention=mha|mqa|gqa|swa", "--window_pattern") if program == "train.py" else ()):
        assert key in text


@pytest.mark.parametrize("argument", ["--atention=mqa", "--n_kv_head=5", "--learning_rate=fast", "--attention=mqb", "x.toml", "word"])
def test_the_program_ends_with_one_line_and_code_2(argument):
    result = script("train.py", argument, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr


def test_a_closed_stdout_is_said_in_a_line(monkeypatch, capsys):
    """As `>&-` of a shell leaves it."""
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(SystemExit) as done:
        run(raises(AssertionError("main has begun")))
    message = capsys.readouterr().err
    assert done.value.code == 2 and message.startswith("error: stdout is closed") and message.count("\n") == 1


TORCH_ON_CUDA = "CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 4 is free."


def raises(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "main, words",
    [
        (raises(torch.OutOfMemoryError(TORCH_ON_CUDA)), "(CUDA out of memory. Tried to allocate 96.00 MiB);"),
        (raises(RuntimeError("CUDA error: out of memory\nFor debugging consider ..")), "(CUDA error: out of memory);"),
        (raises(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")), "cublasCreate"),
        (lambda argv: torch.empty(10**15), "you tried to allocate 4000000000000000 bytes);"),
        (lambda argv: torch.empty(2**31, 2**31), "(Storage size calculation overflowed"),
        (lambda argv: np.empty(10**15), "(Unable to allocate 7.11 PiB"),
        (lambda argv: bytearray(10**16), "(MemoryError);"),
    ],
)
def test_no_memory_is_said_in_a_line(main, words, capsys):
    with pytest.raises(SystemExit) as done:
        run(main)
    message = capsys.readouterr().err
    assert done.value.code == 2 and message.startswith("error: out of memory (") and message.count("\n") == 1
    assert words in message and "micro_batch_size" in message and "num_pages" in message and "total capacity" not in message


@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access was encountered", "shapes do not match"])
def test_an_error_of_the_code_keeps_its_traceback(words):
    with pytest.raises(RuntimeError, match=words):
        run(raises(RuntimeError(words)))


def test_a_model_larger_than_memory_ends_a_program_with_a_line(corpus, tmp_path):
    flags = [f"--data={corpus}", f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--max_seq_len=8"]
    result = script("train.py", *flags, f"--vocab_size={2 * 10**9}", check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: out of memory (") and result.stderr.count("\n") == 1


def test_shipped_configs_are_accepted_and_hold_only_what_differs():
    import tomllib

    paths = sorted((repository / "configs").glob("*.toml"))
    assert len(paths) >= 5
    for path in paths:
        parse([str(path)], ModelConfig, TrainConfig, usage="")
        for key, value in tomllib.loads(path.read_text()).items():
            default = {**vars_of(ModelConfig), **vars_of(TrainConfig)}[key]
            assert value != default, f"{path.name}: {key} = {value} is the default"


def vars_of(schema):
    return {name: field.default for name, field in schema.__dataclass_fields__.items()}
