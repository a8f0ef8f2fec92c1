"""Checkpoints: whole or absent, the newest and the best kept, damage reported, never a pickle."""

import json
import math
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from config import UserError
from model import GPT, ModelConfig
from train import TrainConfig, resume


def make():
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, max_seq_len=8, vocab_size=11))
    model.init_weights(1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return model, optimizer


def train_a_step(model, optimizer):
    model.logits(model.features(torch.arange(8)[None], lambda layer, q, k, v, window: v)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state(step, val_loss=None):
    return {"step": step, "val_loss": val_loss, "time_s": 0.0, "tokenizer": {"type": "byte"}}


def names(run):
    return [folder.name for folder in checkpoint.complete(run)]


def test_model_and_optimizer_come_back_bit_for_bit(tmp_path):
    model, optimizer = make()
    train_a_step(model, optimizer)
    folder = checkpoint.save(tmp_path, model, optimizer, state(1), keep=1)
    other, other_optimizer = make()
    checkpoint.load_weights(folder, other)
    checkpoint.load_optimizer(folder, other, other_optimizer)
    for pair in (model, optimizer), (other, other_optimizer):
        train_a_step(*pair)
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)
    assert other.head.weight is other.tok_emb.weight


def test_the_newest_and_the_best_are_kept(tmp_path):
    model, optimizer = make()
    for step, loss in ((1, math.nan), (2, 1.0), (3, None), (4, 2.0), (5, None), (10, None)):
        checkpoint.save(tmp_path, model, optimizer, state(step, loss), keep=2)
    assert names(tmp_path) == ["step-000002", "step-000005", "step-000010"]
    assert checkpoint.newest(tmp_path).name == "step-000010"
    assert checkpoint.best(tmp_path).name == "step-000002"
    assert checkpoint.load_model(tmp_path, torch.device("cpu"), torch.float32, "best")[1]["step"] == 2


def test_a_failed_save_leaves_the_earlier_ones_and_no_rubbish(tmp_path, monkeypatch):
    model, optimizer = make()
    checkpoint.save(tmp_path, model, optimizer, state(1), keep=1)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(tmp_path, model, optimizer, state(2), keep=1)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_leftovers_of_a_killed_process_are_no_checkpoints(tmp_path):
    model, optimizer = make()
    checkpoint.save(tmp_path, model, optimizer, state(1), keep=1)
    leftover = tmp_path / "checkpoints" / f"step-000002{checkpoint.UNFINISHED}"
    leftover.mkdir()
    (leftover / "state.json").write_text("{}")
    assert names(tmp_path) == ["step-000001"]
    checkpoint.save(tmp_path, model, optimizer, state(3), keep=2)
    assert not leftover.exists()


def test_checkpoints_that_cannot_be_listed_are_not_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints of .* cannot be read"):
        checkpoint.newest(tmp_path)


def test_who_may_read_a_checkpoint_is_up_to_the_umask(tmp_path):
    model, optimizer = make()
    before = os.umask(0o027)
    try:
        folder = checkpoint.save(tmp_path, model, optimizer, state(1), keep=1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "pickle"])
def test_a_damaged_checkpoint_is_named(tmp_path, file, damage):
    model, optimizer = make()
    path = checkpoint.save(tmp_path, model, optimizer, state(1), keep=1) / file
    whole = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="step-000001 cannot be read"):
        checkpoint.load_model(tmp_path, torch.device("cpu"), torch.float32)


def edit(folder, change):
    path = folder / "state.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    "change, message",
    [
        *((without(key), f"{key} is missing") for key in checkpoint.KINDS),
        (lambda state: [state], "step is missing"),
        (lambda state: None, "step is missing"),
        (lambda state: {**state, "step": "one"}, "step is 'one'"),
        (lambda state: {**state, "step": 7}, "step is 7, that of the folder 1"),
        (lambda state: {**state, "time_s": None}, "time_s is None"),
        (lambda state: {**state, "val_loss": "low"}, "val_loss is 'low'"),
        (lambda state: {**state, "tokenizer": "byte"}, "tokenizer is 'byte'"),
        (lambda state: {**state, "model": [1]}, r"model is \[1\]"),
        (lambda state: {**state, "model": without("n_embd")(state["model"])}, "model.n_embd takes int, got None"),
        (lambda state: {**state, "model": {**state["model"], "n_embd": "32"}}, "model.n_embd takes int, got '32'"),
        (lambda state: {**state, "model": {**state["model"], "pos": []}}, r"model.pos takes learned\|rope, got \[\]"),
        (lambda state: {**state, "model": {**state["model"], "n_kv_head": 3}}, "n_kv_head must divide n_head=2, got 3"),
    ],
)
def test_an_edited_state_is_named_wherever_it_is_read(tmp_path, change, message):
    model, optimizer = make()
    folder = checkpoint.save(tmp_path, model, optimizer, state(1, 2.0), keep=2)
    edit(folder, change)
    config = TrainConfig(out_dir=str(tmp_path))
    data = SimpleNamespace(tokenizer_spec={"type": "byte"})
    for read in (
        lambda: checkpoint.load_model(tmp_path, torch.device("cpu"), torch.float32),
        lambda: checkpoint.load_model(tmp_path, torch.device("cpu"), torch.float32, "best"),
        lambda: resume(model, optimizer, config, data),
    ):
        with pytest.raises(UserError, match=f"step-000001 cannot be read: state.json: {message}") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_damaged_older_checkpoint_neither_ends_a_run_nor_is_removed(tmp_path):
    model, optimizer = make()
    for step, loss in ((1, 2.0), (2, 3.0)):
        checkpoint.save(tmp_path, model, optimizer, state(step, loss), keep=2)
    edit(tmp_path / "checkpoints" / "step-000001", without("step"))
    for step in (3, 4):
        checkpoint.save(tmp_path, model, optimizer, state(step, 4.0), keep=1)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000004"]  # damaged, best, newest


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: {}, "tok_emb.weight/step is .* here, nothing there"),
        (lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()}, "nothing there"),
        (lambda tensors: without("head.weight/exp_avg")(without("tok_emb.weight/exp_avg")(tensors)), "exp_avg is .* nothing there"),
        (lambda tensors: {name: tensor[:1] if tensor.dim() else tensor for name, tensor in tensors.items()}, r"\[11, 32\] here, \[1, 32\] there"),
    ],
    ids=["empty", "another model's", "one missing", "another shape"],
)
def test_moments_that_do_not_fit_are_named(tmp_path, change, message):
    model, optimizer = make()
    train_a_step(model, optimizer)
    folder = checkpoint.save(tmp_path, model, optimizer, state(1), keep=1)
    save_file(change(checkpoint.optimizer_tensors(model, optimizer)), folder / "optimizer.safetensors")
    with pytest.raises(UserError, match=f"step-000001 does not fit: .*{message}"):
        checkpoint.load_optimizer(folder, *make())


def test_copies_that_a_person_made_are_no_checkpoints(tmp_path):
    model, optimizer = make()
    folder = checkpoint.save(tmp_path, model, optimizer, state(1), keep=1)
    for name in ("step-000001 copy", "step-best", "step-"):
        shutil.copytree(folder, folder.with_name(name))
    assert names(tmp_path) == ["step-000001"]


def test_a_run_without_checkpoints_says_so(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load_model(tmp_path, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="no run folder"):
        checkpoint.load_model(tmp_path / "nowhere", torch.device("cpu"), torch.float32)
