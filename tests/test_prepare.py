"""Preparation: the token files against tokenising by hand; kills, damage and wrong input leave one line and no folder."""

import hashlib
import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from data import corpus as documents
from data import prepare as preparation
from data.loader import TokenData
from data.prepare import PrepareConfig, pieces, prepare, tokenise_all

REPO = Path(__file__).parents[1]
SHAKESPEARE = REPO.parent / "shared" / "data" / "tinyshakespeare.txt"
CODE = Path(preparation.__file__).read_text()


def tokens_of(folder, split):
    meta = json.loads((folder / "meta.json").read_text())
    dtype = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]
    return np.concatenate([np.fromfile(file, dtype) for file in sorted(folder.glob(f"{split}-*.bin"))]).tolist()


def is_val(text, val_fraction):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < val_fraction * 2**64


def by_hand(texts, val_fraction):
    """Byte tokens of (train, val)."""
    splits = [], []
    for text in texts:
        splits[is_val(text, val_fraction)].extend([*text.encode(), 256])
    return splits


def texts_in(tokens):
    return bytes(t if t < 256 else 0 for t in tokens).split(b"\0")[:-1]


def config(tmp_path, **keys):
    return PrepareConfig(**{"input": str(tmp_path / "in"), "out_dir": str(tmp_path / "out"), "jobs": 1, **keys})


@pytest.fixture
def corpus(tmp_path):
    """Forty documents in files of several kinds, and what they hold in the order they are to be read."""
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    texts = [f"text {i}\r\n naïve 日本\n" * (i + 1) for i in range(10)]
    for i, text in enumerate(texts):
        (folder / f"a{i}.txt").write_bytes(text.encode())
    rows = [f'row {i} "quoted"\n🙂' for i in range(15)]
    lines = [json.dumps({"text": row, "id": i}) for i, row in enumerate(rows)]
    (folder / "b" / "rows.jsonl").write_text("\n".join([*lines[:7], "", '{"text": ""}', *lines[7:]]) + "\r\n")
    (folder / "c.txt").write_bytes(b"bad \xff bytes \xe6\x97")
    (folder / "d.txt").write_bytes(b"")
    (folder / "e.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".hidden").write_text("not this")
    (folder / "b" / ".git").mkdir()
    (folder / "b" / ".git" / "config").write_text("nor this")
    return [*texts, *rows, "bad \ufffd bytes \ufffd"]


@pytest.mark.parametrize("piece", [100, 1 << 20])
def test_token_files_are_the_text(tmp_path, corpus, monkeypatch, capsys, piece):
    monkeypatch.setattr(preparation, "PIECE", piece)
    expected = [], []
    for text in corpus:
        start = next(pieces(text))[0]  # what decides; with the usual PIECE it is the whole text
        assert start == text or piece == 100
        expected[is_val(start, 0.3)].extend([*text.encode(), 256])
    out = prepare("files", config(tmp_path, tokenizer="byte", val_fraction=0.3, shard_tokens=101))
    meta = json.loads((out / "meta.json").read_text())
    assert tokens_of(out, "train") == expected[0]
    assert tokens_of(out, "val") == expected[1]
    assert meta["left_out"] == {"empty documents": 2, "binary files": 1}
    for split, tokens in zip(("train", "val"), expected):
        described = meta["splits"][split]
        assert described["tokens"] == len(tokens)
        assert described["documents"] == tokens.count(256)
        assert described["bytes"] == len(tokens) - tokens.count(256)
        assert [s["file"] for s in described["shards"]] == sorted(f.name for f in out.glob(f"{split}-*"))
        assert [s["tokens"] for s in described["shards"][:-1]] == [101] * (
            len(tokens) // 101 - (len(tokens) % 101 == 0)
        )
        for shard in described["shards"]:
            assert hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert sum(meta["splits"][split]["replaced"] for split in ("train", "val")) == 2
    train, val = (tokens.count(256) for tokens in expected)
    assert f" tokens; {train} and {val} documents; left out: " in capsys.readouterr().out


def test_the_loader_reads_what_prepare_writes(tmp_path, corpus):
    out = prepare("files", config(tmp_path, tokenizer="char", val_fraction=0.3, shard_tokens=50))
    data = TokenData(out, seq_len=8, seed=1)
    alphabet = sorted(set("".join(corpus)))
    assert data.tokenizer_spec == {"type": "char", "alphabet": "".join(alphabet)}
    assert data.vocab_size == len(alphabet)
    val = "".join(text for text in corpus if is_val(text, 0.3))
    rows = data.val_rows(10**9)
    assert "".join(alphabet[i] for i in rows[:, :8].ravel()) == val[: rows[:, :8].size]


@pytest.mark.parametrize("piece", [500, 1000])
def test_pieces_give_the_tokens_of_the_whole_text(monkeypatch, r50k, piece):
    monkeypatch.setattr(preparation, "PIECE", piece)
    parts = [text for text, _ in pieces(CODE)]
    assert len(parts) > len(CODE) / piece
    assert max(map(len, parts)) <= piece
    assert "".join(parts) == CODE
    assert [id for part in parts for id in r50k.encode(part)] == r50k.encode(CODE)


@pytest.mark.parametrize(
    "text", ["日本" * 5000, "a b" + "x" * 9999, " " * 4321, "x" * 1000, "x" * 1001, "a a" * 999, "\r\n\r" * 999]
)
def test_text_without_a_good_place_to_cut(monkeypatch, tmp_path, text):
    monkeypatch.setattr(preparation, "PIECE", 1000)
    (tmp_path / "file").write_bytes(text.encode())
    for document in (text, tmp_path / "file"):
        parts = list(pieces(document))
        assert "".join(part for part, _ in parts) == text
        assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]


@pytest.mark.parametrize("piece", [7, 1 << 20])
@pytest.mark.parametrize("length", [2, 9, 10, 11, 1000])
def test_a_single_document_is_split_by_position(tmp_path, monkeypatch, capsys, length, piece):
    monkeypatch.setattr(preparation, "PIECE", piece)
    text = ("ab cd é\n" * 125)[:length]
    (tmp_path / "in").write_bytes(text.encode())
    out = prepare("files", config(tmp_path, tokenizer="byte", val_fraction=0.25))
    cut = int(length * 0.75)
    assert tokens_of(out, "train") == list(text[:cut].encode())
    assert tokens_of(out, "val") == [*text[cut:].encode(), 256]
    assert capsys.readouterr().out.endswith(" tokens; one document, split by position\n")


def test_shakespeare_is_nanogpts(tmp_path):
    if not SHAKESPEARE.is_file():
        pytest.skip("no tinyshakespeare.txt")
    out = prepare("shakespeare", config(tmp_path, input=str(SHAKESPEARE)))
    data = SHAKESPEARE.read_text()  # from here on nanoGPT's data/shakespeare_char/prepare.py
    chars = sorted(set(data))
    stoi = {ch: i for i, ch in enumerate(chars)}
    n = len(data)
    assert tokens_of(out, "train") == [stoi[c] for c in data[: int(n * 0.9)]]
    assert tokens_of(out, "val") == [stoi[c] for c in data[int(n * 0.9) :]]
    assert json.loads((out / "meta.json").read_text())["vocab_size"] == 65


def test_adding_files_moves_nothing_twins_stay_together_and_copies_are_left_out(tmp_path, corpus):
    keys = {"tokenizer": "byte", "val_fraction": 0.3}
    before = prepare("files", config(tmp_path, out_dir=str(tmp_path / "before"), **keys))
    for i in range(30):
        (tmp_path / "in" / f"0{i}.txt").write_text(f"new {i}")
        (tmp_path / "in" / f"copy{i}.txt").write_text(corpus[i % 10])
    (tmp_path / "in" / "twins.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus[:10]))
    after = prepare("files", config(tmp_path, out_dir=str(tmp_path / "after"), **keys))
    texts = {(f, s): texts_in(tokens_of(f, s)) for f in (before, after) for s in ("train", "val")}
    assert set(texts[before, "train"]) <= set(texts[after, "train"])
    assert set(texts[before, "val"]) <= set(texts[after, "val"])
    assert not set(texts[after, "train"]) & set(texts[after, "val"])
    assert sum(map(len, texts.values())) == 2 * 26 + 40, "nothing else is lost"
    assert json.loads((after / "meta.json").read_text())["left_out"]["copies of other files"] == 30


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, corpus, r50k, monkeypatch):
    monkeypatch.setattr(preparation, "PIECE", 100)
    keys = {"val_fraction": 0.3, "shard_tokens": 99}
    one = prepare("files", config(tmp_path, out_dir=str(tmp_path / "one"), jobs=1, **keys))
    two = prepare("files", config(tmp_path, out_dir=str(tmp_path / "two"), jobs=2, **keys))
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in two.iterdir())
    assert len(names) > 8
    for name in names[1:]:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    meta_one, meta_two = (json.loads((out / "meta.json").read_text()) for out in (one, two))
    assert meta_one == {**meta_two, "command": meta_one["command"]}  # it names out_dir


def test_work_under_way_is_bounded():
    taken = []
    todo = (taken.append(i) or "x" * i for i in range(100))
    lengths = tokenise_all(len, todo, jobs=2)
    assert next(lengths) == 0
    assert len(taken) <= 4
    assert list(lengths) == list(range(1, 100))


def test_parquet_is_read_like_text(tmp_path, corpus):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"id": range(len(corpus) + 2), "body": [*corpus, "", None]}), file)
    out = prepare("files", config(tmp_path, input=str(file), text_key="body", tokenizer="byte", val_fraction=0.3))
    assert [tokens_of(out, "train"), tokens_of(out, "val")] == list(by_hand(corpus, 0.3))
    with pytest.raises(UserError, match="has no 'text', it has id, body; name one with --text_key"):
        prepare("files", config(tmp_path, input=str(file), out_dir=str(tmp_path / "o2")))
    with pytest.raises(UserError, match="'id' holds a int, expected text"):
        prepare(
            "files", config(tmp_path, input=str(file), out_dir=str(tmp_path / "o2"), text_key="id", tokenizer="byte")
        )
    os.truncate(file, 300)
    with pytest.raises(UserError, match="rows.parquet cannot be read as parquet"):
        prepare("files", config(tmp_path, input=str(file), out_dir=str(tmp_path / "o2"), tokenizer="byte"))


def test_fineweb_streams_through_datasets(tmp_path, corpus):
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    (tmp_path / "hub").mkdir()
    for number, texts in enumerate((corpus[:12], corpus[12:])):
        table = pyarrow.table({"text": texts, "id": [f"<urn:{i}>" for i in range(len(texts))]})
        parquet.write_table(table, tmp_path / "hub" / f"train-{number:05d}-of-00002.parquet")
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    flags = [
        f"--dataset={tmp_path / 'hub'}",
        "--subset=",
        "--tokenizer=byte",
        "--val_fraction=0.3",
        f"--out_dir={tmp_path / 'out'}",
    ]
    result = command("fineweb", *flags, "--jobs=2", env=env)
    assert result.returncode == 0, result.stderr
    assert [tokens_of(tmp_path / "out", "train"), tokens_of(tmp_path / "out", "val")] == list(by_hand(corpus, 0.3))


def test_the_hub_out_of_reach(tmp_path, monkeypatch):
    def offline(*arguments, **keys):
        raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    message = r"cannot stream HuggingFaceFW/fineweb-edu sample-10BT \(ConnectionError: no route to host\)"
    with pytest.raises(UserError, match=message):
        prepare("fineweb", config(tmp_path, input="", tokenizer="byte"))
    monkeypatch.setitem(sys.modules, "datasets", None)  # import raises ImportError
    with pytest.raises(UserError, match="pip install datasets"):
        prepare("fineweb", config(tmp_path, input="", tokenizer="byte"))
    assert not list(tmp_path.iterdir())


def test_max_tokens_stops_early(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(preparation, "PIECE", 100)
    out = prepare("files", config(tmp_path, tokenizer="byte", val_fraction=0.3, max_tokens=1500))
    meta = json.loads((out / "meta.json").read_text())
    assert 1500 <= sum(meta["splits"][split]["tokens"] for split in ("train", "val")) < 1500 + 400


def test_stdlib_prepared_by_two_runs_at_once(tmp_path):
    out = tmp_path / "stdlib"
    program = f"from data.prepare import prepare_stdlib; prepare_stdlib({str(out)!r})"
    line = [sys.executable, "-c", program]
    runs = [subprocess.Popen(line, cwd=REPO, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted(text.count("train: ") for text in said) == [0, 1], "one prepares, the other waits and keeps"
    assert [path.name for path in tmp_path.iterdir()] == ["stdlib"], "leftovers"

    data = TokenData(out, seq_len=1024, seed=1)
    assert data.tokenizer_spec == {"type": "byte"}
    assert data.train.size > 4_000_000
    assert 0.02 < data.val.size / data.train.size < 0.3
    documents = set()
    for split in ("train", "val"):
        tokens = np.fromfile(out / f"{split}-00000.bin", "<u2")
        ends = np.flatnonzero(tokens == 256)
        documents |= {part.astype(np.uint8).tobytes() for part in np.split(tokens, ends + 1)}
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "json/decoder.py"):
        assert (library / name).read_bytes() in {document[:-1] for document in documents}
    for test_file in library.glob("test/test_a*.py"):
        assert test_file.read_bytes() not in {document[:-1] for document in documents}


def command(*arguments, env=None, **keys):
    line = [sys.executable, "-m", "data.prepare", *map(str, arguments)]
    return subprocess.run(
        line,
        cwd=REPO,
        env={**os.environ, **(env or {})},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        **keys,
    )


def check_refused(result, message, out):
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert not out.exists()
    assert not list(out.parent.glob(".*")), "leftovers"


WRONG = {
    "nothing": ([], "name one of stdlib, shakespeare, files, fineweb"),
    "two names": (["stdlib", "files"], "got stdlib files"),
    "unknown": (["stdlb"], "cannot prepare 'stdlb'; there are: stdlib"),
    "unknown key": (["stdlib", "--seed=1"], "unknown key 'seed'"),
    "useless key": (["stdlib", "--input=x"], "--input=x has no meaning for stdlib"),
    "fraction": (["stdlib", "--val_fraction=1"], "val_fraction lies between 0 and 1, got 1.0"),
    "jobs": (["stdlib", "--jobs=-1"], "jobs from 0"),
    "many jobs": (["stdlib", f"--jobs={2**62}"], "to 1024"),
    "tokenizer": (["stdlib", "--tokenizer=bite"], "the nearest is 'byte'"),
    "no input": (["files"], "files needs --input=PATH"),
    "missing input": (["files", "--input={}/nowhere"], "nowhere does not exist"),
    "no match": (["files", "--input={}", "--glob=*.nope"], "matches --glob=*.nope"),
    "bad glob": (["files", "--input={}", "--glob=/x"], "--glob=/x is not a pattern"),
    "empty": (["files", "--input={}/empty.txt"], "left out: 1 empty documents, with val_fraction"),
    "no val": (
        ["files", "--input={0}/empty.txt,{0}/good.jsonl", "--val_fraction=0.000001"],
        "leave the val split empty",
    ),
    "bad json": (["files", "--input={}/bad.jsonl"], "bad.jsonl line 3 is not JSON"),
    "no object": (["files", "--input={}/list.jsonl"], "list.jsonl line 1 is no JSON object"),
    "no key": (["files", "--input={}/good.jsonl", "--text_key=body"], "line 1 has no 'body', it has text, n"),
    "no text": (["files", "--input={}/good.jsonl", "--text_key=n"], "line 1: 'n' holds a int"),
    "checksum": (["shakespeare", "--input={}/good.jsonl"], "is not tinyshakespeare: sha256"),
    "folder": (["shakespeare", "--input={}"], "Is a directory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(tmp_path, case):
    arguments, message = WRONG[case]
    source = tmp_path / "in"
    source.mkdir()
    (source / "empty.txt").touch()
    (source / "good.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n')
    (source / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    (source / "list.jsonl").write_text("[1]\n")
    (tmp_path / "work").mkdir()
    out = tmp_path / "work" / "out"
    flags = ["--tokenizer=byte", "--jobs=1"] if "files" in arguments else []
    check_refused(command(*(a.format(source) for a in arguments), *flags, f"--out_dir={out}"), message, out)


def test_help_names_every_key():
    result = command("--help")
    assert result.returncode == 0
    assert all(f"--{key}=" in result.stdout for key in PrepareConfig.__dataclass_fields__)


def test_existing_folders(tmp_path, corpus):
    out = tmp_path / "out"
    keys = {"tokenizer": "byte", "val_fraction": 0.3}
    out.mkdir()  # empty: may be filled
    prepare("files", config(tmp_path, **keys, shard_tokens=10))
    first = sorted(file.name for file in out.iterdir())
    with pytest.raises(UserError, match="out exists already; .* --overwrite=true"):
        prepare("files", config(tmp_path, **keys))
    with pytest.raises(UserError, match="nowhere"):
        prepare("files", config(tmp_path, **keys, input="nowhere", overwrite=True))
    assert sorted(file.name for file in out.iterdir()) == first, "a failed preparation keeps the old folder"
    prepare("files", config(tmp_path, **keys, overwrite=True))
    assert sorted(file.name for file in out.iterdir()) == ["meta.json", "train-00000.bin", "val-00000.bin"]

    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not prepared data \(it holds thesis.txt\)"):
        prepare("files", config(tmp_path, **keys, overwrite=True))
    assert (out / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"], "leftovers"


def test_the_command_in_meta_prepares_the_same(tmp_path, corpus):
    out = prepare("files", config(tmp_path, tokenizer="byte", val_fraction=0.3))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    line = json.loads(before["meta.json"])["command"] + " --overwrite=true"
    result = subprocess.run(
        line.replace("python", sys.executable, 1), shell=True, cwd=REPO, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_command_does_not_name_the_usual_folder():
    usual = PrepareConfig(out_dir=str(REPO / "data" / "stdlib"), jobs=3, val_fraction=0.2)
    assert preparation.command("stdlib", usual) == "python -m data.prepare stdlib --val_fraction=0.2"


def test_sigkill_leaves_nothing_and_the_next_run_clears_up(tmp_path):
    source, out = tmp_path / "big.txt", tmp_path / "work" / "out"
    source.write_text(CODE * (20_000_000 // len(CODE)))
    line = [
        sys.executable,
        "-m",
        "data.prepare",
        "files",
        f"--input={source}",
        f"--out_dir={out}",
        "--tokenizer=byte",
        "--jobs=2",
    ]
    process = subprocess.Popen(line, cwd=REPO, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: list(out.parent.glob(".out.partial/new/train-*.bin")))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    wait_for(lambda: not group_members(process.pid))  # its workers end with it

    source.write_text("short text")
    assert command("files", f"--input={source}", f"--out_dir={out}", "--tokenizer=byte", "--jobs=1").returncode == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def group_members(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_full_disk(tmp_path):
    source, out = tmp_path / "big.txt", tmp_path / "work" / "out"
    source.write_text(CODE * 20)
    out.parent.mkdir()

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    flags = [f"--input={source}", f"--out_dir={out}", "--tokenizer=byte", "--jobs=1"]
    check_refused(command("files", *flags, preexec_fn=limit_file_size), "File too large; nothing was prepared in", out)


class DyingTokenizer:
    vocab_size, eot, spec = 2, None, {}

    def encode(self, text):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "in").write_text("text")
    monkeypatch.setattr(preparation.tokenizers, "load", lambda name, alphabet: DyingTokenizer())
    with pytest.raises(UserError, match="a tokenising process was killed"):
        prepare("files", config(tmp_path, jobs=2))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_memory_does_not_grow_with_the_input(tmp_path):
    # not from getrusage: its ru_maxrss counts what the process that started this one held
    peaks = []
    texts = [f"{i}" + "a line of text\n" * 10_000 for i in range(20)]
    for size in (30_000_000, 90_000_000):
        rows = [json.dumps({"text": text}) + "\n" for text in texts] * (size // 2 // 3_000_000)
        (tmp_path / "file.jsonl").write_text("".join(rows))
        (tmp_path / "file.txt").write_text(texts[0] * (size // 2 // 150_000))
        code = (
            "import sys; from data.prepare import main; main(sys.argv[1:])\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        flags = [
            f"--input={tmp_path / 'file.txt'},{tmp_path / 'file.jsonl'}",
            "--tokenizer=byte",
            "--val_fraction=0.5",
            "--jobs=1",
        ]
        out = f"--out_dir={tmp_path / str(size)}"
        result = subprocess.run(
            [sys.executable, "-c", code, "files", *flags, out], cwd=REPO, check=False, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 12, f"peak MiB for 30 MB and 90 MB of text: {peaks}"


class Handler(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *arguments):
        pass


def test_download(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(documents, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(Handler, "content", b"to be or not to be")
    with pytest.raises(UserError, match="input.txt is not tinyshakespeare: sha256"):
        prepare("shakespeare", config(tmp_path, input=""))
    monkeypatch.setattr(documents, "SHAKESPEARE_SHA256", hashlib.sha256(Handler.content).hexdigest())
    out = prepare("shakespeare", config(tmp_path, input=""))
    assert len(tokens_of(out, "train")) == 16
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot download .*; fetch it elsewhere and give --input=FILE"):
        prepare("shakespeare", config(tmp_path, input="", out_dir=str(tmp_path / "o2")))
