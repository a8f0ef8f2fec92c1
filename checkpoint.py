"""Checkpoints on disk: complete or absent, and never a pickle.

    out/NAME/checkpoints/step-000500/   model.safetensors, optimizer.safetensors, state.json

A checkpoint is written under a temporary name and renamed last, so a process killed at any moment leaves only whole
checkpoints behind. state.json is plain JSON: step, validation loss, model settings, tokenizer, and the train settings that
a run keeps, which only train.py reads.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import typing
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import UserError, build, checked
from model import GPT, ModelConfig

UNFINISHED = ".unfinished"  # ends the names of folders that are being written or removed
KINDS = {"step": int, "time_s": int | float, "val_loss": int | float | None, "tokenizer": dict, "model": dict}  # of state.json


def save(run_folder, model, optimizer, state, keep):
    """Write a checkpoint of step state["step"] and drop old ones.

    state: JSON values; "val_loss" is the validation loss of these very weights, or None
    keep:  how many of the newest stay; the one with the lowest val_loss stays besides

    Returns its folder. Raises UserError when it cannot be written; earlier checkpoints are untouched then.
    """
    folder = Path(run_folder, "checkpoints", f"step-{state['step']:06d}")
    unfinished = folder.with_name(folder.name + UNFINISHED)
    state = {**state, "model": dataclasses.asdict(model.config)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        unfinished.mkdir()
        save_file(model_tensors(model), unfinished / "model.safetensors")
        save_file(optimizer_tensors(model, optimizer), unfinished / "optimizer.safetensors")
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        for file in unfinished.glob("*.safetensors"):  # which safetensors opens to their owner alone
            shutil.copymode(unfinished / "state.json", file)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {error}; earlier checkpoints are whole, free some space and resume") from None
    prune(run_folder, keep)
    return folder


def model_tensors(model):
    """Parameters by name, each stored once: a tied output head is the embedding."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def optimizer_tensors(model, optimizer):
    """The optimizer's state as `parameter/key` tensors, so that it is bound to names and not to an order."""
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def complete(run_folder):
    """The checkpoints of a run, oldest first."""
    try:
        folders = list(Path(run_folder, "checkpoints").iterdir())
    except FileNotFoundError:
        folders = []
    except OSError as error:  # not none: a new run would be taken for the first in this folder
        raise UserError(f"the checkpoints of {run_folder} cannot be read: {error}") from None
    return sorted((f for f in folders if re.fullmatch(r"step-\d+", f.name)), key=step_of)


def step_of(folder):
    return int(folder.name.removeprefix("step-"))


def newest(run_folder):
    """The folder of the newest checkpoint, or None."""
    return next(reversed(complete(run_folder)), None)


def best(run_folder):
    """The folder of the checkpoint with the lowest validation loss, or None when none was evaluated."""
    return lowest({folder: read_state(folder)["val_loss"] for folder in complete(run_folder)})


def lowest(losses):
    evaluated = {folder: loss for folder, loss in losses.items() if loss is not None and not math.isnan(loss)}
    return min(evaluated, key=evaluated.get, default=None)


def prune(run_folder, keep):
    """A damaged checkpoint stays, and ends no run: it may be the best, and a person can mend it."""
    losses = {}
    for folder in complete(run_folder):
        with contextlib.suppress(UserError):
            losses[folder] = read_state(folder)["val_loss"]
    spared = {*complete(run_folder)[-keep:], lowest(losses)}
    for folder in losses:
        if folder not in spared:
            remove(folder)


def remove(folder):
    """Rename first: a half-removed folder must not look like a checkpoint."""
    doomed = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def sweep(checkpoints):
    """Clear away what a killed process left half-written or half-removed."""
    for leftover in checkpoints.glob(f"*{UNFINISHED}"):
        shutil.rmtree(leftover)


def read_state(folder):
    """The state that `save` was given, and "model". Each value is checked, because people edit JSON."""
    try:
        state = json.loads((folder / "state.json").read_text())
        for key, kind in KINDS.items():
            if not isinstance(state, dict) or key not in state:
                raise UserError(f"{key} is missing")
            if not isinstance(state[key], kind):
                raise UserError(f"{key} is {state[key]!r}")
        if state["step"] != step_of(folder):  # a run from there would find folders taken
            raise UserError(f"step is {state['step']}, that of the folder {step_of(folder)}")
        hints = typing.get_type_hints(ModelConfig, include_extras=True)
        build(ModelConfig, {key: checked(f"model.{key}", state["model"].get(key), hint) for key, hint in hints.items()})
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise damaged(folder, error, "state.json: ") from None
    return state


def read_tensors(path):
    try:
        with open(path, "rb"):  # safetensors calls whatever it may not open missing
            return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path.parent, error) from None


def damaged(folder, error, where=""):
    remedy = "mend it, or remove that folder to use the one before it"
    if isinstance(error, PermissionError):
        remedy = "ask its owner"
    return UserError(f"checkpoint {folder} cannot be read: {where}{error}; {remedy}")


def load_weights(folder, model):
    """Fill the model with a checkpoint's parameters, in the model's dtype and on its device."""
    tensors = read_tensors(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(fitting(folder, tensors, name, parameter.shape))


def load_optimizer(folder, model, optimizer):
    tensors = read_tensors(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        for key, shape in {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}.items():  # AdamW's
            value = fitting(folder, tensors, f"{name}/{key}", shape)
            optimizer.state[parameter][key] = value.to(parameter.device)


def fitting(folder, tensors, name, shape):
    if name not in tensors or tensors[name].shape != shape:
        found = list(tensors[name].shape) if name in tensors else "nothing"
        raise UserError(f"checkpoint {folder} does not fit: {name} is {list(shape)} here, {found} there")
    return tensors[name]


def load_model(run_folder, device, dtype, which="newest"):
    """A model ready to decode.

    run_folder: out/NAME as train.py writes it
    which:      "newest" or "best" (lowest validation loss)

    Returns (GPT in evaluation mode, state dict with "step", "val_loss", "tokenizer"). Raises UserError.
    """
    if not Path(run_folder).is_dir():
        raise UserError(f"no run folder {run_folder}; train first, or give the out_dir of a run")
    folder = best(run_folder) if which == "best" else newest(run_folder)
    if folder is None:
        what = "complete checkpoint" + " with a validation loss" * (which == "best")
        raise UserError(f"{run_folder} holds no {what}; train first, or give the run's out_dir")
    state = read_state(folder)
    with device:
        model = GPT(build(ModelConfig, state["model"])).to(dtype)
    load_weights(folder, model)
    return model.eval(), state
