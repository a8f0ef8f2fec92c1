"""Text to token files: train-00000.bin, ..., val-00000.bin, ... (raw little-endian token ids) and meta.json.

    python -m data.prepare stdlib                                      Python's own library; no download
    python -m data.prepare shakespeare [--input=FILE]                  tinyshakespeare, split as in nanoGPT
    python -m data.prepare files --input=PATH,PATH --out_dir=data/my   your text, .jsonl and .parquet files
    python -m data.prepare fineweb --max_tokens=1000000000             streamed from the Hugging Face hub

A file is a document; in .jsonl and .parquet a row is. Each is followed by the end-of-text id, if the tokenizer has one.
The sha256 of a document (of its first million characters, if it is longer) decides whether it is for validation, so
nothing moves when files are added, and equal documents stay together. A single document is split by position.
Bytes that are not UTF-8 become U+FFFD and are counted. Files with a NUL byte near their start, copies of text files
read before, hidden files in a given folder, and empty documents are left out.

Text is read in pieces of a million characters, a few per process at a time, so memory stays bounded whatever the size
of the input. The result does not depend on --jobs. Everything is written to a hidden folder beside the output folder,
which takes its place when it is complete.
"""

import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from config import UserError, parse, pathname, run
from data import tokenizer as tokenizers
from data.corpus import open_corpus
from data.loader import folder_of

PIECE = 1 << 20  # characters read, tokenised and handed between processes at a time

DEFAULTS = {  # NAME: (tokenizer, val_fraction, the keys that it takes and another NAME does not)
    "stdlib": ("byte", 0.1, ()),
    "shakespeare": ("char", 0.1, ("input",)),
    "files": ("r50k_base", 0.1, ("input", "glob", "text_key")),
    "fineweb": ("r50k_base", 0.005, ("dataset", "subset", "text_key")),
}


@dataclass(frozen=True)
class PrepareConfig:
    out_dir: Annotated[pathname, "folder to write; empty: data/NAME"] = ""
    overwrite: Annotated[bool, "replace the folder if it has been prepared before"] = False
    tokenizer: Annotated[str, "byte, char or a tiktoken name; empty: the usual one of NAME"] = ""
    val_fraction: Annotated[float, "share of the documents for validation; 0: the usual one of NAME"] = 0.0
    input: Annotated[str, "files, shakespeare: files and folders, separated by commas"] = ""
    glob: Annotated[str, "files: which files of the folders given"] = "*"
    text_key: Annotated[str, "files, fineweb: the field or column that holds the text"] = "text"
    dataset: Annotated[str, "fineweb: a data set of the hub, or a local folder"] = "HuggingFaceFW/fineweb-edu"
    subset: Annotated[str, "fineweb: configuration of the data set; empty for a local folder"] = "sample-10BT"
    max_tokens: Annotated[int, "stop after about this many; 0: no limit"] = 0
    shard_tokens: Annotated[int, "tokens per file"] = 100_000_000
    jobs: Annotated[int, "processes that tokenise; 0: one per core"] = 0

    def __post_init__(self):
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction lies between 0 and 1, got {self.val_fraction}")
        if self.shard_tokens < 1 or self.max_tokens < 0 or not 0 <= self.jobs <= 1024:
            raise ValueError(
                f"shard_tokens must be at least 1, max_tokens at least 0, jobs from 0 to 1024, "
                f"got {self.shard_tokens}, {self.max_tokens}, {self.jobs}"
            )


# Here every tiktoken vocabulary begins a new token, so pieces that end here give the same tokens as the whole text. Text
# without such a place, like Chinese, is cut anywhere, perhaps within a token.
SAFE_CUT = re.compile(r".*\S(?= [A-Za-z])", re.DOTALL)


def pieces(document):
    """Yield (text, whether the document ends here) in pieces of at most PIECE characters."""
    with open_text(document) as stream:
        text = stream.read(PIECE)
        while len(text) == PIECE:
            match = SAFE_CUT.match(text)
            cut = match.end() if match else PIECE
            yield text[:cut], False
            text = text[cut:] + stream.read(cut)
        yield text, True


def open_text(document):
    if isinstance(document, Path):
        return open(document, encoding="utf-8", errors="replace", newline="")
    return io.StringIO(document, newline="")


def split_pieces(documents, val_fraction):
    """Yield the pieces of all documents, each with its split."""
    first = list(itertools.islice(documents, 2))
    if len(first) == 1:
        yield from split_by_position(first[0], val_fraction)
        return
    for document in itertools.chain(first, documents):
        split = None
        for text, ends in pieces(document):
            if split is None:
                split = "val" if hash_share(text) < val_fraction else "train"
            yield split, text, ends


def hash_share(text):
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(tokenizers.utf8(text)).digest()[:8]) / 2**64


def split_by_position(document, val_fraction):
    length = sum(len(text) for text, _ in pieces(document))
    left = int(length * (1 - val_fraction))  # characters, and this formula, as in nanoGPT
    for text, ends in pieces(document):
        yield "train", text[:left], False
        yield "val", text[left:], ends
        left = max(0, left - len(text))


def batches(split_texts):
    """Lists of pieces of about PIECE characters: the unit of work of a process."""
    batch, length = [], 0
    for split, text, ends in split_texts:
        batch.append((split, text, ends))
        length += len(text)
        if length >= PIECE:
            yield batch
            batch, length = [], 0
    yield batch


def tokenise(tokenizer, dtype, batch):
    """Turn a batch into {split: (tokens, counts)}."""
    tokens, counts = {"train": [], "val": []}, {"train": Counter(), "val": Counter()}
    for split, text, ends in batch:
        tokens[split] += tokenizer.encode(text)
        if ends and tokenizer.eot is not None:
            tokens[split].append(tokenizer.eot)
        counts[split].update(documents=ends, bytes=len(tokenizers.utf8(text)), replaced=text.count("\ufffd"))
    return {split: (np.array(tokens[split], dtype), counts[split]) for split in tokens}


def tokenise_all(work, todo, jobs):
    """map(work, todo) by `jobs` processes, in order, with at most two batches per process under way."""
    if jobs == 1:
        yield from map(work, todo)
        return
    # spawn: a fork of a process with threads (tqdm's, pyarrow's) can hang.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker) as pool:
        under_way = deque()
        for batch in todo:
            under_way.append(pool.submit(work, batch))
            if len(under_way) == 2 * jobs:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def start_worker():
    """Leave Ctrl-C to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class ShardWriter:
    """Appends tokens to the files of one split, `shard_tokens` to a file."""

    def __init__(self, folder, split, shard_tokens):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards = []  # file name, tokens, running sha256

    def write(self, tokens):
        while len(tokens):
            if not self.shards or self.shards[-1]["tokens"] == self.shard_tokens:
                name = f"{self.split}-{len(self.shards):05d}.bin"
                self.shards.append({"file": name, "tokens": 0, "sha256": hashlib.sha256()})
            shard = self.shards[-1]
            part = tokens[: self.shard_tokens - shard["tokens"]]
            with open(self.folder / shard["file"], "ab") as file:
                file.write(part)
            shard["sha256"].update(part)
            shard["tokens"] += len(part)
            tokens = tokens[len(part) :]

    def finished(self):
        """The shards as meta.json lists them."""
        return [{**shard, "sha256": shard["sha256"].hexdigest()} for shard in self.shards]


def write_folder(folder, name, config):
    """Write shards and meta.json into an empty folder; returns meta."""
    usual_tokenizer, usual_fraction, _ = DEFAULTS[name]
    val_fraction = config.val_fraction or usual_fraction
    start, size, source = open_corpus(name, config)
    tokenizer = make_tokenizer(config.tokenizer or usual_tokenizer, start)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"

    writers = {split: ShardWriter(folder, split, config.shard_tokens) for split in ("train", "val")}
    counts = {split: Counter(tokens=0, documents=0, bytes=0, replaced=0) for split in writers}
    left_out = Counter()
    work = partial(tokenise, tokenizer, np.dtype(dtype).newbyteorder("<"))
    todo = batches(split_pieces(start(left_out), val_fraction))
    with tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as bar:
        for result in tokenise_all(work, todo, config.jobs or num_cores()):
            for split, (tokens, count) in result.items():
                writers[split].write(tokens)
                counts[split].update(count, tokens=len(tokens))
                bar.update(count["bytes"])
            if 0 < config.max_tokens <= counts["train"]["tokens"] + counts["val"]["tokens"]:
                break

    meta = {
        "format": 1,
        "source": source,
        "command": command(name, config),
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "val_fraction": val_fraction,
        "left_out": dict(left_out),
        "splits": {split: {**counts[split], "shards": writers[split].finished()} for split in writers},
    }
    for split, writer in writers.items():
        if not writer.shards:
            left = "".join(f", left out: {count:,} {what}" for what, count in left_out.items())
            raise UserError(
                f"{counts['train']['documents'] + counts['val']['documents']} documents of {source}{left}, with "
                f"val_fraction={val_fraction} leave the {split} split empty; change val_fraction or max_tokens, give more "
                "text, or join it into one file, which is split by position"
            )
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def make_tokenizer(name, start):
    """The tokenizer; a char tokenizer reads the whole corpus first, for its alphabet."""
    alphabet = set()
    if name == "char":
        for document in start(Counter()):
            for text, _ in pieces(document):
                alphabet.update(text)
    return tokenizers.load(name, alphabet)


def command(name, config):
    """The command line that prepares this again."""
    given = {key: value for key, value in dataclasses.asdict(config).items() if value != getattr(PrepareConfig, key)}
    if folder_of(config.out_dir or name) == folder_of(name):
        given.pop("out_dir", None)
    flags = [f"--{key}={value}" for key, value in given.items() if key not in ("overwrite", "jobs")]
    return shlex.join(["python", "-m", "data.prepare", name, *flags])


def num_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextmanager
def alone(folder):
    """Hold the lock of `folder`; a second process waits here. The kernel drops it when its holder dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    while True:
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that prepares {folder}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            # The holder we waited for has removed the file: a lock on it is worth nothing, take a new one.
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def prepare(name, config=PrepareConfig(), keep=False):
    """Prepare the folder, and return its Path. A folder that is there already is an error, or is kept if `keep`."""
    check_keys(name, config)
    out = folder_of(config.out_dir or name).resolve()
    partial_folder = out.parent / f".{out.name}.partial"
    try:
        with alone(out):
            if keep and (out / "meta.json").exists():
                return out
            check_replaceable(out, config.overwrite)
            shutil.rmtree(partial_folder, ignore_errors=True)  # what a killed run has left
            try:
                (partial_folder / "new").mkdir(parents=True)
                meta = write_folder(partial_folder / "new", name, config)
                if out.exists():
                    out.rename(partial_folder / "old")
                (partial_folder / "new").rename(out)
            finally:
                shutil.rmtree(partial_folder, ignore_errors=True)
    except BrokenProcessPool:
        raise UserError("a tokenising process was killed, perhaps for memory; run again with fewer --jobs") from None
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; nothing was prepared in {out}") from None
    report(out, meta)
    return out


def prepare_stdlib(folder):
    """For train.py when data/stdlib is missing. Several runs may call it at once: one prepares, the others wait."""
    return prepare("stdlib", PrepareConfig(out_dir=str(folder), jobs=1), keep=True)


def check_keys(name, config):
    if name not in DEFAULTS:
        raise UserError(f"cannot prepare {name!r}; there are: {', '.join(DEFAULTS)}")
    for key in ("input", "glob", "text_key", "dataset", "subset"):
        default = getattr(PrepareConfig, key)
        if getattr(config, key) != default and key not in DEFAULTS[name][2]:
            raise UserError(f"--{key}={getattr(config, key)} has no meaning for {name}; leave it out")


def check_replaceable(out, overwrite):
    """Never remove anything but what this program wrote."""
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    foreign = [name for name in names if not re.fullmatch(r"meta\.json|(train|val)-\d+\.bin", name)]
    if foreign:
        raise UserError(f"{out} exists and is not prepared data (it holds {foreign[0]}); choose another --out_dir")
    if names and not overwrite:
        raise UserError(f"{out} exists already; to prepare it again add --overwrite=true")


def report(out, meta):
    splits = meta["splits"]
    train, val = (c["documents"] for c in splits.values())  # that end there: a single one ends in val
    lines = [f"{split}: {c['tokens']:,} tokens" for split, c in splits.items()]
    lines.append(f"{train:,} and {val:,} documents" if train else "one document, split by position")
    lines += [f"left out: {count:,} {what}" for what, count in meta["left_out"].items()]
    replaced = sum(c["replaced"] for c in splits.values())
    if replaced:
        lines.append(f"{replaced:,} characters are U+FFFD, which also stands for bytes that are not UTF-8")
    print(f"{out}: " + "; ".join(lines), flush=True)


def main(argv):
    words, config = parse(argv, PrepareConfig, usage=__doc__)
    if len(words) != 1:
        raise UserError(f"name one of {', '.join(DEFAULTS)} to prepare, got {' '.join(words) or 'none'} (see --help)")
    prepare(words[0], config)


if __name__ == "__main__":
    run(main)
