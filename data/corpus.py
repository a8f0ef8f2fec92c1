"""Where the text comes from: documents, each a str or the Path of a text file, for `data/prepare.py` to tokenise.

A file is a document; in .jsonl and .parquet a row is. The hub's data sets are streamed. Nothing here holds more than
a few hundred documents in memory.
"""

import hashlib
import json
import os
import platform
import sysconfig
import urllib.request
from functools import partial
from pathlib import Path

from config import UserError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Not the library proper: tests, installed packages, tables and an editor.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "turtledemo", "lib2to3"}
LONGEST_LINE = 1 << 26  # characters of a .jsonl line, which has to fit in memory


def open_corpus(name, config):
    """What to prepare: (start, size, source). `start(left_out)` begins a pass over the documents and counts in
    `left_out` what it leaves out; size is in bytes, or None if it cannot be told; source is for meta.json."""
    if name == "shakespeare":
        text = shakespeare_text(config)
        return lambda left_out: iter([text]), len(text), config.input or SHAKESPEARE_URL
    if name == "fineweb":
        source = f"{config.dataset} {config.subset}".strip()
        return partial(hub_documents, config), None, source
    if name == "stdlib":
        files, source = stdlib_files(), f"the standard library of Python {platform.python_version()}"
    else:
        files, source = input_files(config), config.input
    packed = any(file.suffix == ".parquet" for file in files)
    return partial(file_documents, files, config), None if packed else sum(f.stat().st_size for f in files), source


def stdlib_files():
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.rglob("*.py")) if not NOT_STDLIB & set(file.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{folder} holds no *.py; prepare other text: python -m data.prepare files --input=PATH")
    return files


def input_files(config):
    """The files that --input names, those of a folder sorted by path."""
    files = []
    for given in filter(None, config.input.split(",")):
        path = Path(os.path.expanduser(given))
        if path.is_dir():
            try:
                found = [file for file in sorted(path.rglob(config.glob)) if file.is_file()]
            except (ValueError, NotImplementedError) as error:
                raise UserError(f"--glob={config.glob} is not a pattern: {error}; e.g. --glob=*.txt") from None
            found = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
            if not found:
                raise UserError(f"no file in {path} matches --glob={config.glob}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--input={given} does not exist or is no file or folder")
    if not files:
        raise UserError("files needs --input=PATH, a text, .jsonl or .parquet file or a folder of them")
    return list(dict.fromkeys(files))


def file_documents(files, config, left_out):
    seen = set()  # hashes of the text files so far: packages carry copies of each other
    for file in files:
        if file.suffix == ".jsonl":
            yield from non_empty(jsonl_texts(file, config.text_key), left_out)
        elif file.suffix == ".parquet":
            yield from non_empty(parquet_texts(file, config.text_key), left_out)
        else:
            with open(file, "rb") as stream:
                start = stream.read(8192)
                stream.seek(0)
                content = None if b"\0" in start else hashlib.file_digest(stream, "sha256").digest()
            if not start:
                left_out["empty documents"] += 1
            elif b"\0" in start:
                left_out["binary files"] += 1
            elif content in seen:
                left_out["copies of other files"] += 1
            else:
                seen.add(content)
                yield file


def jsonl_texts(file, key):
    with open(file, encoding="utf-8-sig", errors="replace", newline="\n") as stream:
        for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE), ""), start=1):
            where = f"{file} line {number}"
            if len(line) == LONGEST_LINE:
                raise UserError(f"{where} is longer than {LONGEST_LINE} characters; is this JSON lines?")
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON: {error}; mend or remove the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{where} is no JSON object; each line takes the form {{{json.dumps(key)}: ...}}")
            yield text_of(row, key, where)


def parquet_texts(file, key):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs the package pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if key not in table.schema_arrow.names:
                raise missing_key(key, table.schema_arrow.names, file)
            for batch in table.iter_batches(batch_size=256, columns=[key]):
                for text in batch.column(0).to_pylist():
                    yield text_of({key: text}, key, file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {first_line(error)}") from None


def hub_documents(config, left_out):
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("fineweb needs the package datasets: pip install datasets") from None
    try:
        rows = load_dataset(config.dataset, name=config.subset or None, split="train", streaming=True)
        yield from non_empty((text_of(row, config.text_key, config.dataset) for row in rows), left_out)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 -- many kinds: no network, no such data set, no such subset, a broken file
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot stream {config.dataset} {config.subset} ({reason})") from None


def first_line(error):
    return (str(error).splitlines() or [""])[0]


def text_of(row, key, where):
    if key not in row:
        raise missing_key(key, row, where)
    if not isinstance(row[key], str | None):
        raise UserError(f"{where}: {key!r} holds a {type(row[key]).__name__}, expected text; name another --text_key")
    return row[key]


def missing_key(key, names, where):
    return UserError(f"{where} has no {key!r}, it has {', '.join(names) or 'nothing'}; name one with --text_key")


def non_empty(texts, left_out):
    for text in texts:
        if text:
            yield text
        else:
            left_out["empty documents"] += 1


def shakespeare_text(config):
    if config.input:
        content = Path(os.path.expanduser(config.input)).read_bytes()
    else:
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as answer:
                content = answer.read()
        except OSError as error:
            raise UserError(
                f"cannot download {SHAKESPEARE_URL} ({error}); fetch it elsewhere and give --input=FILE"
            ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise UserError(
            f"{config.input or SHAKESPEARE_URL} is not tinyshakespeare: sha256 {found}, expected {SHAKESPEARE_SHA256}; "
            "prepare other text with: python -m data.prepare files --input=PATH"
        )
    return content.decode()
