"""Batches of token sequences from a folder that data/prepare.py wrote.

    python -m data.prepare stdlib
    python -c "from data.loader import *; print(TokenData(folder_of('stdlib'), 64, seed=1).train_batch(0, 12).shape)"

A training batch is a pure function of (seed, step): nothing has to be saved to resume, and every process can cut its
own rows out of the same global batch. Validation rows are a fixed set, whatever the seed or the batch size.
A split is one long token array, laid over its shards; a sequence may run across documents and shards.
"""

import contextlib
import json
import shlex
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from operator import index
from pathlib import Path

import numpy as np

from config import UserError


def folder_of(data):
    """The folder of the config value `data`: a path if it has a slash, else data/NAME of this repository."""
    path = Path(data)
    return path if len(path.parts) > 1 or data.startswith(".") else Path(__file__).resolve().parent / data


class TokenData:
    """The two splits of a prepared folder, as rows of seq_len + 1 tokens (inputs and targets overlap by all but one)."""

    def __init__(self, folder, seq_len, seed):
        self.seq_len, self.seed = seq_len, seed
        self.meta = read_meta(Path(folder))
        self.vocab_size = self.meta["vocab_size"]
        self.tokenizer_spec = self.meta["tokenizer"]
        self.train = Tokens(Path(folder), self.meta, "train", seq_len)
        self.val = Tokens(Path(folder), self.meta, "val", seq_len)
        # One chunk less than would fit leaves the room by which an epoch's start offset moves the chunk boundaries.
        self.num_chunks = max(1, self.train.size // seq_len - 1)
        self.max_offset = self.train.size - 1 - self.num_chunks * seq_len

    def train_batch(self, step, batch_size, rows=slice(None)):
        """The given rows of a step's batch: (rows, seq_len + 1) int64. Only these rows are read.

        Training sample g = step * batch_size + row is chunk g % n of epoch g // n. Each epoch visits all n chunks once,
        in an order and from a start offset of its own.
        """
        samples = (step * batch_size + np.arange(batch_size))[rows]
        starts = []
        for epoch, position in zip(*(x.tolist() for x in np.divmod(samples, self.num_chunks))):
            offset, order = epoch_order(self.num_chunks, self.max_offset, self.seed, epoch)
            starts.append(offset + int(order[position]) * self.seq_len)
        return self.train.rows(starts, self.seq_len + 1)

    def num_val_rows(self, eval_tokens):
        """How many rows hold about `eval_tokens` tokens: at least one, at most what the split has."""
        return min(max(1, eval_tokens // self.seq_len), (self.val.size - 1) // self.seq_len)

    def val_rows(self, eval_tokens, rows=slice(None)):
        """The given rows of the validation set: (rows, seq_len + 1) int64. The set is spread evenly over the split."""
        count, chunks = self.num_val_rows(eval_tokens), (self.val.size - 1) // self.seq_len
        starts = np.arange(count)[rows] * chunks // count * self.seq_len
        return self.val.rows(starts.tolist(), self.seq_len + 1)


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(num_chunks, max_offset, seed, epoch):
    """(start offset, order of the chunks) of an epoch: 4 bytes per chunk, half a second for 10 million."""
    # RandomState, because NumPy promises never to change its numbers; default_rng's may change with a release.
    random = np.random.RandomState([seed % 2**32, epoch])
    order = np.arange(num_chunks, dtype=np.uint32)
    random.shuffle(order)
    return int(random.randint(max_offset + 1)), order


class Tokens:
    """One split: its memory-mapped shards, read as one long array."""

    def __init__(self, folder, meta, split, seq_len):
        self.remedy, self.vocab_size = how_to_prepare_again(folder, meta), meta["vocab_size"]
        counts = [shard["tokens"] for shard in meta["splits"][split]["shards"]]
        self.files = [folder / shard["file"] for shard in meta["splits"][split]["shards"]]
        self.size = sum(counts)
        self.starts = [0, *accumulate(counts)]
        if self.size < seq_len + 1:
            raise UserError(
                f"{folder} has {self.size} {split} tokens, a sequence needs {seq_len + 1}: "
                "prepare more text or lower max_seq_len"
            )
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        for file, count in zip(self.files, counts):
            expected = count * dtype.itemsize
            found = file.stat().st_size if file.is_file() else None
            if found is None:
                raise UserError(f"{file} is missing, meta.json names it; {self.remedy}")
            if found != expected:
                raise UserError(
                    f"{file} has {found} bytes, expected {expected} ({count} tokens of {meta['dtype']}); {self.remedy}"
                )
        # np.asarray: a slice of a plain array costs a tenth of a slice of a memmap.
        self.shards = [np.asarray(np.memmap(file, dtype, mode="r")) for file in self.files]

    def rows(self, starts, length):
        """The windows of `length` tokens that begin at `starts`: (len(starts), length) int64."""
        batch = np.empty((len(starts), length), np.int64)
        for row, start in zip(batch, starts):
            shard, done = bisect_right(self.starts, start) - 1, 0
            while done < length:
                begin = start + done - self.starts[shard]
                part = self.shards[shard][begin : begin + length - done]
                row[done : done + len(part)] = part
                shard, done = shard + 1, done + len(part)
        if batch.max(initial=0) >= self.vocab_size:
            self.report_bad_token(batch, starts)
        return batch

    def report_bad_token(self, batch, starts):
        row, column = np.argwhere(batch >= self.vocab_size)[0].tolist()
        position = starts[row] + column
        shard = bisect_right(self.starts, position) - 1
        raise UserError(
            f"{self.files[shard]} holds token id {batch[row, column]} at position {position - self.starts[shard]}, "
            f"expected ids below vocab_size {self.vocab_size}; {self.remedy}"
        )


def read_meta(folder):
    """meta.json, checked for what the loader relies on."""
    path = folder / "meta.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; prepare the data: {prepare_command(folder)}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        shards = [shard for split in ("train", "val") for shard in meta["splits"][split]["shards"]]
        valid = (
            meta["format"] == 1
            and meta["dtype"] in ("uint16", "uint32")
            and 0 < index(meta["vocab_size"]) <= 2 ** (8 * np.dtype(meta["dtype"]).itemsize)
            and isinstance(meta["tokenizer"]["type"], str)
            and all(isinstance(shard["file"], str) and index(shard["tokens"]) > 0 for shard in shards)
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {how_to_prepare_again(folder)}") from None
    if not valid:
        found = {key: meta[key] for key in ("format", "dtype", "vocab_size")}
        remedy = how_to_prepare_again(folder, meta)
        raise UserError(f"{path} does not fit this version, which reads format 1, found {found}; {remedy}")
    return meta


def how_to_prepare_again(folder, meta=None):
    return f"prepare it again: {prepare_command(folder, meta)} --overwrite=true"


def prepare_command(folder, meta=None):
    """The command that prepares this folder. The one in its meta.json names another if this is a copy."""
    words = []
    with contextlib.suppress(ValueError):  # people edit JSON
        words = shlex.split(str((meta or {}).get("command", "")))
    if len(words) < 4:
        known = folder.name in ("stdlib", "shakespeare", "fineweb")
        words = ["python", "-m", "data.prepare", *([folder.name] if known else ["files", "--input=TEXT"])]
    places = [word.removeprefix("--out_dir=") for word in words if word.startswith("--out_dir=")] or [words[3]]
    if folder_of(places[-1]).resolve() != folder.resolve():
        words = [word for word in words if not word.startswith("--out_dir=")] + [f"--out_dir={folder.absolute()}"]
    return shlex.join(words)
