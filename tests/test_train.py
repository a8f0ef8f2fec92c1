"""The training loop: recorded losses, exact resumption, data parallel, evaluation, how it stops."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from util import counted_compilations, environment, gpu, metrics, repository, script

import train
from config import UserError, parse
from data.loader import TokenData
from model import GPT, ModelConfig, dense_attention
from train import FiniteGuard, Process, TrainConfig, evaluate, learning_rate, make_optimizer

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--max_seq_len=32", "--batch_size=8", "--learning_rate=1e-2", "--warmup_steps=5"]
alone = Process(rank=0, world=1, device=torch.device("cpu"))
QUIET = ["--wandb=disabled", "--device=cpu", "--eval_tokens=512", "--log_interval=1"]


def command(corpus, out, *more):
    return ["train.py", *TINY, *QUIET, f"--data={corpus}", f"--out_dir={out}", *more]


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def test_ten_recorded_losses(corpus, tmp_path):
    """Anything that changes data order, initialisation, model, loss, optimizer or schedule shows here."""
    script(*command(corpus, tmp_path / "run", "--max_steps=10", "--attention=gqa", "--n_kv_head=1", "--grad_clip=0.5"))
    recorded = [5.5608, 5.3370, 5.0487, 4.7647, 4.3419, 3.8357, 3.3703, 3.0309, 2.8288, 2.7411]
    assert list(metrics(tmp_path / "run").values()) == pytest.approx(recorded, abs=2e-3)
    config = TrainConfig(max_steps=10, learning_rate=1e-2, warmup_steps=5)
    assert metrics(tmp_path / "run", "lr") == {step + 1: learning_rate(step, config) for step in range(10)}


def test_it_learns_on_every_attention_type(corpus, tmp_path):
    for attention in ("mha", "mqa", "gqa", "swa"):
        run = tmp_path / attention
        script(*command(corpus, run, "--max_steps=150", f"--attention={attention}", "--log_interval=50", "--pos=rope"))
        assert metrics(run, "val/loss")[150] < 1.9, attention  # knowing how often each digit comes is worth 2.15
        assert (run / "samples.txt").read_text().startswith("--- step 150")


def test_a_killed_run_resumes_bit_for_bit(corpus, tmp_path):
    """Killed by SIGKILL between the files of its second checkpoint, then started again by the same command."""
    more = ["--max_steps=12", "--save_interval=4", "--eval_interval=4", "--dropout=0.1", "--micro_batch_size=4"]
    script(*command(corpus, tmp_path / "whole", *more))
    again = command(corpus, tmp_path / "killed", *more)
    killer = (
        "import os, runpy, sys, checkpoint; real = checkpoint.optimizer_tensors\n"
        "def tensors(model, optimizer):\n"
        "    found = real(model, optimizer)\n"
        "    if next(iter(optimizer.state.values()))['step'].item() == 8: os.kill(os.getpid(), 9)\n"
        "    return found\n"
        "checkpoint.optimizer_tensors = tensors\n"
        "sys.argv = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')"
    )
    assert script("-c", killer, *again, check=False).returncode == -signal.SIGKILL
    assert [f.name for f in sorted((tmp_path / "killed" / "checkpoints").iterdir())] == ["step-000004", "step-000008.unfinished"]
    assert "resumed at step 4" in script(*again).stdout
    for key in ("train/loss", "grad_norm", "val/loss"):
        assert metrics(tmp_path / "whole", key) == metrics(tmp_path / "killed", key)
    ours, theirs = weights(tmp_path / "whole", 12), weights(tmp_path / "killed", 12)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "done at step 12" in script(*again).stdout  # once more: nothing to do


def test_two_processes_equal_one_with_twice_the_micro_batches(corpus, tmp_path):
    more = ["--max_steps=4", "--micro_batch_size=2", "--save_interval=1", "--keep_checkpoints=9"]
    script(*command(corpus, tmp_path / "one", *more))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script(*launcher, *command(corpus, tmp_path / "two", *more))
    for key in ("train/loss", "grad_norm", "val/loss", "val/stderr"):
        one, two = metrics(tmp_path / "one", key), metrics(tmp_path / "two", key)
        assert one == pytest.approx(two, rel=1e-5), key
    # after one step AdamW's first moment is (1 - beta1) times the gradient
    one, two = (load_file(tmp_path / run / "checkpoints/step-000001/optimizer.safetensors") for run in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-7), name


def test_training_and_evaluation_are_compiled_and_samples_are_not(corpus, tmp_path, monkeypatch):
    compilations = counted_compilations(monkeypatch)
    monkeypatch.setattr(train, "catch_signals", list)
    more = ["--max_steps=4", "--eval_interval=2", "--compile=on", "--n_layer=5", "--attention=swa", "--window_pattern=LLG"]
    train.main(command(corpus, tmp_path / "run", *more, "--eval_tokens=320")[1:])
    assert len(compilations) == 2 * (1 + 2 + 1)  # Blocks of two windows; embedding and losses; for training and for evaluation
    assert (tmp_path / "run" / "samples.txt").read_text().count("--- step") == 2


def test_evaluations_are_not_in_the_speed(corpus, tmp_path, monkeypatch):
    def slow(*args):
        time.sleep(1)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", slow)
    monkeypatch.setattr(train, "catch_signals", list)
    train.main(command(corpus, tmp_path, "--max_steps=4", "--eval_interval=1")[1:])
    speeds = metrics(tmp_path, "tokens_per_s")
    assert min(list(speeds.values())[1:]) > 2 * 8 * 32  # a step is 8 * 32 tokens


@pytest.mark.parametrize("error", [UserError("no memory"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_sample_that_fails_does_not_end_the_run(corpus, tmp_path, monkeypatch, error):
    def generate(*args, **keys):
        raise error

    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "catch_signals", list)
    train.main(command(corpus, tmp_path, "--max_steps=2", "--eval_interval=1")[1:])
    assert (tmp_path / "samples.txt").read_text().count(f"(no sample: {error})") == 2
    assert weights(tmp_path, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(corpus, tmp_path, number):
    argv = [sys.executable, *command(corpus, tmp_path / "run", "--max_steps=100000")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=repository, env=environment(), **pipes) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(number)
                break
        rest, answer = process.communicate(timeout=60)
        assert process.returncode == 0
    assert "stopped at step" in rest and "the same command goes on" in rest
    assert answer.startswith(f"{signal.Signals(number).name}: this run saves and stops")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_a_signal_loses_no_evaluation(corpus, tmp_path, monkeypatch):
    """It comes during the last step: the run is done, and as good as any."""

    inspect = FiniteGuard.inspect

    def signalled(guard, stop):
        signal.raise_signal(signal.SIGTERM)
        return inspect(guard, stop=True)

    monkeypatch.setattr(FiniteGuard, "inspect", signalled)
    train.main(command(corpus, tmp_path / "run", "--max_steps=1")[1:])
    assert list(metrics(tmp_path / "run", "val/loss")) == [1]


def test_a_run_that_is_done_is_left_alone(corpus, tmp_path):
    script(*command(corpus, tmp_path / "run", "--max_steps=2"))
    files = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert "done at step 2 already" in script(*command(corpus, tmp_path / "run", "--max_steps=1")).stdout
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == files


def test_a_tokenizer_that_is_not_the_datas_is_refused(corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps({**meta, "vocab_size": 300}))
    result = script(*command(data, tmp_path / "run", "--max_steps=1"), check=False)
    assert result.returncode == 2 and "300 tokens in vocab_size, 257 in its tokenizer" in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path):
    result = script(*command(corpus, tmp_path / "run", "--save_interval=1", "--learning_rate=1e30", "--warmup_steps=0"), check=False)
    assert result.returncode == 2
    assert "not finite at step 2" in result.stderr and "rank 0" in result.stderr and result.stderr.count("\n") == 1
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (1.0, math.inf), (math.inf, 1.0)])
def test_the_guard_keeps_the_weights_of_the_last_good_step(loss, gradient):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = FiniteGuard(optimizer, alone)

    def step(number, loss, gradient):
        weight.grad = torch.full((3,), gradient)
        guard.watch(number, torch.tensor(loss), weight.grad.norm())
        optimizer.step()

    step(0, 1.0, 1.0)
    assert guard.inspect(stop=False) is False and guard.inspect(stop=True) is True
    good = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    assert not torch.equal(good[0], torch.ones(3))
    step(1, loss, gradient)
    step(2, 1.0, 1.0)  # a good step after it must not move the weights either
    assert torch.equal(weight, good[0])
    assert all(torch.equal(value, good[1][key]) for key, value in optimizer.state[weight].items())
    with pytest.raises(UserError, match="step 2"):
        guard.inspect(stop=False)


def test_evaluation_is_one_mean_whatever_the_batch(corpus):
    data = TokenData(corpus, 32, seed=1)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, max_seq_len=32, vocab_size=257)).double()
    model.init_weights(1)
    attend = dense_attention("reference", torch.device("cpu"), torch.float64, 16)

    def losses(rows):
        sizes.append(len(rows))
        rows = torch.from_numpy(rows)
        return model(rows[:, :-1], rows[:, 1:], attend).double()

    sizes = []
    with torch.no_grad():
        means = losses(data.val_rows(32 * 7)).mean(dim=1)
    expected = means.mean().item(), (means.std() / math.sqrt(7)).item()
    for micro_batch in (1, 3, 7, 10):
        sizes.clear()
        assert evaluate(losses, data, 32 * 7, micro_batch, alone) == pytest.approx(expected, rel=1e-9)
        assert set(sizes) == {micro_batch}, "another size would be compiled anew"


def test_the_standard_error_of_losses_that_hardly_differ(corpus):
    """Squares in float32 would round to a standard error several times as large, or to none."""
    data = TokenData(corpus, seq_len=32, seed=1)
    each = torch.linspace(5.0, 5.0001, 7)[:, None]
    batches = iter(each.split(1))
    _, stderr = evaluate(lambda rows: next(batches), data, 32 * 7, 1, alone)
    assert stderr == pytest.approx((each.double().std() / math.sqrt(7)).item(), rel=1e-4)


def test_dropout_is_off_in_evaluation(corpus, tmp_path):
    """With nothing learned, the validation loss is that of the run without dropout."""
    frozen = ["--max_steps=1", "--learning_rate=0", "--min_lr=0"]
    script(*command(corpus, tmp_path / "with", *frozen, "--dropout=0.5"))
    script(*command(corpus, tmp_path / "without", *frozen))
    assert metrics(tmp_path / "with", "val/loss") == metrics(tmp_path / "without", "val/loss")
    assert metrics(tmp_path / "with") != metrics(tmp_path / "without")


def test_the_optimizer_is_the_one_asked_for():
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=4))
    config = TrainConfig(learning_rate=0.5, weight_decay=0.25, beta1=0.75, beta2=0.875)
    matrices, vectors = make_optimizer(model, config).param_groups
    for group, weight_decay in ((matrices, 0.25), (vectors, 0.0)):
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.75, 0.875), 1e-8)
        assert group["weight_decay"] == weight_decay and {p.dim() > 1 for p in group["params"]} == {weight_decay > 0}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rate_schedules(schedule):
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.1, lr_schedule=schedule)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == max(rates) == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55 if schedule == "cosine" else 1.0)
    assert rates[90] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 80 / 90)) if schedule == "cosine" else 0.55)


def test_changed_model_settings_are_refused_with_the_difference(corpus, tmp_path):
    script(*command(corpus, tmp_path / "run", "--max_steps=2"))
    result = script(*command(corpus, tmp_path / "run", "--max_steps=4", "--n_layer=3", "--qk_norm=true"), check=False)
    assert result.returncode == 2
    assert "n_layer: 2 there, 3 here; qk_norm: False there, True here" in result.stderr
    never = script(*command(corpus, tmp_path / "run", "--max_steps=4", "--resume=never"), check=False)
    assert never.returncode == 2 and "resume=never" in never.stderr


def test_changed_train_settings_are_refused_with_the_difference(corpus, tmp_path):
    """Else a finished run with another seed would train nothing and bear the new seed's name."""
    run = tmp_path / "run"
    script(*command(corpus, run, "--max_steps=2"))
    files = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    changed = ["--seed=2", "--learning_rate=0.5", "--batch_size=64"]
    result = script(*command(corpus, run, "--max_steps=2", *changed), check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "seed: 1 there, 2 here; batch_size: 8 there, 64 here; learning_rate: 0.01 there, 0.5 here" in result.stderr
    assert "give another out_dir" in result.stderr
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == files


def test_a_run_goes_on_with_more_steps_and_with_what_moves_no_loss(corpus, tmp_path):
    script(*command(corpus, tmp_path / "run", "--max_steps=2"))
    moved = shutil.copytree(corpus, tmp_path / "moved")  # the data count by their content
    free = ["--eval_interval=2", "--keep_checkpoints=5", "--micro_batch_size=4", "--attention_impl=reference", "--compile=off"]
    assert "resumed at step 2" in script(*command(moved, tmp_path / "run", "--max_steps=4", *free)).stdout
    meta = json.loads((moved / "meta.json").read_text())
    meta["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (moved / "meta.json").write_text(json.dumps(meta))
    other = script(*command(moved, tmp_path / "run", "--max_steps=6"), check=False)
    assert other.returncode == 2 and re.search("mend: data: sha256 [0-9a-f]{12} there, sha256 [0-9a-f]{12} here$", other.stderr)


def test_a_checkpoint_that_does_not_say_how_it_was_trained_is_refused(corpus, tmp_path):
    run = tmp_path / "run"
    script(*command(corpus, run, "--max_steps=2"))
    state = run / "checkpoints" / "step-000002" / "state.json"
    state.write_text(json.dumps({key: value for key, value in json.loads(state.read_text()).items() if key != "train"}))
    old = script(*command(corpus, run, "--max_steps=4"), check=False)
    assert old.returncode == 2 and old.stderr.count("\n") == 1 and "lacks train" in old.stderr
    script(*command(corpus, tmp_path / "new", "--max_steps=1", f"--init_from={run}"))


def test_init_from_starts_at_the_weights_of_another_run(corpus, tmp_path):
    script(*command(corpus, tmp_path / "first", "--max_steps=40"))
    script(*command(corpus, tmp_path / "second", "--max_steps=1", "--seed=2", "--beta1=0.8", f"--init_from={tmp_path / 'first'}"))
    assert metrics(tmp_path / "second")[1] < metrics(tmp_path / "first")[20]
    script(*command(corpus, tmp_path / "dropping", "--max_steps=1", "--dropout=0.1", f"--init_from={tmp_path / 'first'}"))
    missing = script(*command(corpus, tmp_path / "third", f"--init_from={tmp_path / 'nowhere'}"), check=False)
    assert missing.returncode == 2 and "nowhere" in missing.stderr


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    _, config = parse(["--data=~/data", "--out_dir=~/run", "--init_from=~/other"], TrainConfig, usage="")
    assert (config.data, config.out_dir, config.init_from) == ("/home/a/data", "/home/a/run", "/home/a/other")


@pytest.mark.parametrize("rank", ["1", "-1"])
def test_a_rank_that_is_none_of_the_processes_is_one_line(corpus, tmp_path, rank):
    result = script(*command(corpus, tmp_path / "run", "--max_steps=1"), check=False, env={"RANK": rank})
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and f"RANK={rank} is none of WORLD_SIZE=1" in result.stderr


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--micro_batch_size=3", ["batch_size=8", "micro_batch_size=3"]),
        ("--vocab_size=100", ["vocab_size=100", "257"]),
        ("--max_steps=0", ["max_steps", "0"]),
        ("--max_seq_len=1000000", ["max_seq_len"]),
        ("--data=nowhere", ["nowhere", "python -m data.prepare"]),
        ("--out_dir=/dev/null/run", ["/dev/null/run"]),
        ("--out_dir=out/r\udce9", ["out_dir", "r\\udce9"]),
        ("--min_lr=0.02", ["min_lr", "0.02", "learning_rate=0.01"]),
        ("--batch_size=9223372036854775807", ["batch_size", "9223372036854775807"]),
    ],
)
def test_impossible_combinations_end_with_one_line(corpus, tmp_path, argument, words):
    result = script(*command(corpus, tmp_path / "run", argument), check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_the_run_folder_holds_what_tools_read(corpus, tmp_path):
    run = tmp_path / "run"
    script(*command(corpus, run, "--max_steps=3", "--attention=swa", "--window=8"))
    facts = json.loads((run / "config.json").read_text())
    assert facts["model"]["window"] == 8 and facts["train"]["seed"] == 1
    assert {"params", "flops_per_token", "kv_bytes_per_token", "versions", "git_commit", "device"} <= facts.keys()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "tokens", "time_s", "train/loss", "lr", "grad_norm", "tokens_per_s", "peak_mem_gib"} <= rows[0].keys()
    assert rows[-1].keys() == {"step", "tokens", "time_s", "val/loss", "val/stderr"} and rows[-1]["tokens"] == 3 * 8 * 32


def test_packages_that_a_run_does_not_use_may_be_missing(corpus, tmp_path):
    for package in ("wandb", "tiktoken", "triton"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('no {package} here')")
    without = {"PYTHONPATH": str(tmp_path)}
    script(*command(corpus, tmp_path / "run", "--max_steps=1"), env=without)
    script("sample.py", tmp_path / "run", "--prompt=1 2", "--max_new_tokens=4", env=without)
    result = script(*command(corpus, tmp_path / "logged", "--wandb=offline"), check=False, env=without)
    assert result.returncode == 2 and "pip install wandb" in result.stderr and result.stderr.count("\n") == 1


def test_a_terminal_without_the_characters_does_not_end_the_run(corpus, tmp_path):
    """An untrained byte model writes what is no text at all."""
    result = script(*command(corpus, tmp_path / "run", "--max_steps=1"), env={"PYTHONIOENCODING": "ascii:strict"})
    assert "?" in result.stdout and "\ufffd" in (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")


def test_wandb_offline_stays_in_the_run_folder(corpus, tmp_path):
    pytest.importorskip("wandb")
    script(*command(corpus, tmp_path / "run", "--max_steps=1", "--wandb=offline"))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_online_without_a_key_is_one_line(corpus, tmp_path):
    pytest.importorskip("wandb")
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    started = time.monotonic()
    result = script(*command(corpus, tmp_path / "run", "--wandb=online"), check=False, env=home)
    assert result.returncode == 2 and "wandb=online" in result.stderr and "Traceback" not in result.stderr
    assert time.monotonic() - started < 60


@gpu
def test_a_gpt2_learns_with_our_kernels_as_with_the_float32_reference(tmp_path):
    """200 steps: the kernels move the loss curve less than a changed order of the data and initial weights does."""
    script("-m", "data.prepare", "files", f"--input={Path(torch.__file__).parent}", "--glob=*.py", "--tokenizer=byte",
           f"--out_dir={tmp_path / 'code'}")  # fmt: skip
    curves = {}
    for name, flags in {
        "kernels": ["--attention_impl=triton"],
        "reference": ["--attention_impl=reference", "--dtype=float32"],
        "other seed": ["--attention_impl=triton", "--seed=2"],
    }.items():
        settings = ["--max_steps=200", "--batch_size=8", "--log_interval=1", "--warmup_steps=20", "--bias=false", "--wandb=disabled"]
        script("train.py", *settings, *flags, f"--data={tmp_path / 'code'}", f"--out_dir={tmp_path / name}", "--save_interval=1000",
               timeout=600)  # fmt: skip
        curves[name] = torch.tensor(list(metrics(tmp_path / name).values()))
        assert len(curves[name]) == 200
    smooth = {name: curve.unfold(0, 20, 1).mean(dim=1) for name, curve in curves.items()}
    moved, noise = ((smooth[name] - smooth["kernels"]).abs().mean() for name in ("reference", "other seed"))
    assert moved < noise
