"""What every benchmark needs: fair timing, and results that say what they were measured on."""

import gc
import json
import random
import statistics
from contextlib import contextmanager
from functools import partial

import torch

from config import write_whole
from device import device_name
from runlog import git_commit, versions

COPIED = 400 << 20  # bytes; at some other sizes a copy is a fifth slower, which would flatter whatever is compared with it


def median_ms(calls, rounds, repeats=4):
    """{name: milliseconds a call}. A turn is several calls in a row: the first hides the launch of the others."""
    turns = {name: [] for name in calls}
    for call in calls.values():
        call()
    order = random.Random(0)  # a call is slower behind one that heated the GPU up, so each follows others in each round
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            call = calls[name]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            turns[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) / repeats for a, b in pairs) for name, pairs in turns.items()}


def captured(call, repeats=1):
    """A function that runs `call` so many times as one CUDA graph: the GPU's time, without the host's launches.

    The current stream must not be the default one, and whatever `call` goes back to must have run on it. What `call`
    holds stays in memory as long as the function: the graph has only addresses.
    """
    call()  # compiles what it needs
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            call()

    def replay(_held=call):
        graph.replay()

    return replay


def copying(device):
    """(call, bytes that it moves): a copy on the device, whose bandwidth others are compared with."""
    source = torch.empty(COPIED, dtype=torch.int8, device=device)
    return partial(torch.empty_like(source).copy_, source), 2 * COPIED


@contextmanager
def frozen_objects():
    """Leaves all that exists now out of garbage collections, as sample.py does: to search a model, its engine and what
    was compiled for them took 40% of the host's time with 256 sequences."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # a compiled model refers to itself: only a collection ever gives its memory back


def leave_out(peer, error, where):
    """Name a peer that cannot take part, on this GPU or with this build of torch. Any other error is raised again."""
    if peer == "ours" or isinstance(error, torch.OutOfMemoryError):
        raise error
    print(f"{where}, {peer}: left out ({str(error).splitlines()[0]})", flush=True)


def forget_compiled():
    """To be called when a model is deleted: gives back what was compiled for it, and with that the model itself."""
    torch._dynamo.reset()
    gc.collect()


def write_results(path, device, dtype, **measured):
    """The results with what they were measured on, as a file and as the last line."""
    facts = {"device": device_name(device), "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    facts |= {"versions": versions(), "git_commit": git_commit(), **measured}
    print(json.dumps(facts), flush=True)  # first: the disk may be full
    write_whole(path, json.dumps(facts, indent=1))
