"""The loader against shards written by hand. Mostly a token's value is its position, so a row tells where it was read."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from data.loader import TokenData, folder_of, prepare_command


def write_folder(folder, train, val, shard_tokens=10**9, dtype="uint32", vocab_size=1 << 20):
    splits = {}
    for split, tokens in (("train", train), ("val", val)):
        shards = []
        for number, begin in enumerate(range(0, len(tokens), shard_tokens)):
            part = tokens[begin : begin + shard_tokens].astype({"uint16": "<u2", "uint32": "<u4"}[dtype])
            part.tofile(folder / f"{split}-{number:05d}.bin")
            shards.append({"file": f"{split}-{number:05d}.bin", "tokens": len(part)})
        splits[split] = {"shards": shards}
    meta = {
        "format": 1,
        "tokenizer": {"type": "byte"},
        "vocab_size": vocab_size,
        "dtype": dtype,
        "splits": splits,
        "command": "python -m data.prepare mine",
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def positions(tmp_path):
    """1,000 training and 777 validation tokens in shards of 7, shorter than a sequence."""
    return write_folder(tmp_path, np.arange(1000), np.arange(777), shard_tokens=7)


def check_windows(batch, seq_len):
    assert batch.dtype == np.int64
    np.testing.assert_array_equal(batch, batch[:, :1] + np.arange(seq_len + 1))


@pytest.mark.parametrize("seq_len", [1, 15, 16, 64, 333, 499, 500, 501, 998, 999])
def test_an_epoch_visits_each_chunk_once(tmp_path, seq_len):
    data = TokenData(write_folder(tmp_path, np.arange(1000), np.arange(1000), 7), seq_len, seed=3)
    n = data.num_chunks
    assert max(1, 1000 // seq_len - 1) == n
    offsets, orders = set(), set()
    for epoch in range(20):
        batch = data.train_batch(epoch, n)  # with batch_size = n a step is an epoch
        check_windows(batch, seq_len)
        starts = np.sort(batch[:, 0])
        np.testing.assert_array_equal(starts, starts[0] + seq_len * np.arange(n))
        offsets.add(int(starts[0]))
        orders.add(tuple(batch[:, 0] - starts[0]))
    assert len(orders) == 20 or n < 10
    assert len(offsets) > 6 or seq_len in (1, 998, 999), "chunk boundaries do not move"


def test_offsets_reach_every_token(positions):
    data = TokenData(positions, 16, seed=0)
    seen = np.unique(np.concatenate([data.train_batch(epoch, data.num_chunks).ravel() for epoch in range(300)]))
    np.testing.assert_array_equal(seen, np.arange(1000))


def test_a_batch_is_a_pure_function_of_seed_and_step(positions):
    steps = [0, 1, 57, 3, 1000, 0]
    once = {step: TokenData(positions, 16, seed=5).train_batch(step, 12) for step in steps}
    data = TokenData(positions, 16, seed=5)
    for step in steps:
        data.val_rows(500)
        np.testing.assert_array_equal(data.train_batch(step, 12), once[step])
    assert not np.array_equal(once[0], once[1])
    assert not np.array_equal(once[0], TokenData(positions, 16, seed=6).train_batch(0, 12))


def test_batches_of_every_size_cut_one_stream(positions):
    data = TokenData(positions, 16, seed=1)
    stream = np.concatenate([data.train_batch(step, 1) for step in range(360)])  # about six epochs
    assert data.num_chunks not in (60, 72, 90), "else no batch straddles two epochs"
    for batch_size in (5, 72, 180, 360):
        got = np.concatenate([data.train_batch(step, batch_size) for step in range(360 // batch_size)])
        np.testing.assert_array_equal(got, stream)


def test_rows_cut_the_global_batch(positions):
    data = TokenData(positions, 16, seed=1)
    whole = data.train_batch(4, 24)
    for rows in (slice(0, 6), slice(18, 24), slice(20, 30), slice(1, None, 2), slice(24, 24), np.array([3, 0])):
        np.testing.assert_array_equal(data.train_batch(4, 24, rows), whole[rows])
    whole = data.val_rows(400)
    for rows in (slice(0, 6), slice(20, 30), slice(99, 100)):
        np.testing.assert_array_equal(data.val_rows(400, rows), whole[rows])


def test_these_batches_never_change(positions):
    """Recorded. A change here means that older runs can neither be resumed nor compared."""
    data = TokenData(positions, 16, seed=1)
    assert data.train_batch(0, 6)[:, 0].tolist() == [845, 141, 749, 493, 189, 269]
    assert data.train_batch(100, 6)[:, 0].tolist() == [166, 662, 534, 310, 438, 182]


def test_validation_rows_are_fixed_disjoint_and_spread(positions):
    for eval_tokens in (1, 16, 100, 400, 767, 768, 10**9):
        data = TokenData(positions, 16, seed=1)
        rows = data.val_rows(eval_tokens)
        assert len(rows) == data.num_val_rows(eval_tokens) == min(max(1, eval_tokens // 16), 776 // 16)
        check_windows(rows, 16)
        starts = rows[:, 0]
        assert (starts % 16 == 0).all()
        assert (np.diff(starts) >= 16).all(), "rows overlap"
        # evenly: the gaps differ by one chunk at most, and the last one ends near the end
        assert np.ptp(np.diff([*starts, 776 // 16 * 16])) <= 16
        np.testing.assert_array_equal(rows, TokenData(positions, 16, seed=2).val_rows(eval_tokens))


def test_all_dtypes_and_large_ids(tmp_path):
    for dtype, top in (("uint16", 65535), ("uint32", 2**32 - 1)):
        tokens = np.arange(top - 99, top + 1)
        folder = tmp_path / dtype
        folder.mkdir()
        write_folder(folder, tokens, tokens, 7, dtype, vocab_size=top + 1)
        check_windows(TokenData(folder, 10, seed=0).train_batch(0, 9), 10)
        assert TokenData(folder, 99, seed=0).val_rows(1)[0, -1] == top


def test_a_bad_token_is_found_only_in_rows_that_are_read(tmp_path):
    tokens = np.arange(100) % 50
    tokens[57] = 50
    folder = write_folder(tmp_path, tokens, tokens, shard_tokens=40, vocab_size=50)
    data = TokenData(folder, 10, seed=0)
    data.val_rows(90, slice(0, 5))
    with pytest.raises(UserError, match=r"val-00001.bin holds token id 50 at position 17, expected ids below .* 50"):
        data.val_rows(90, slice(5, 6))
    with pytest.raises(UserError, match=r"train-00001.bin holds token id 50 at position 17"):
        data.train_batch(0, data.num_chunks)


def change_meta(**changes):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return change


def half_tokens(folder):
    text = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(text.replace('"tokens": 7}', '"tokens": 7.0}', 1))


def cut(folder):
    os.truncate(folder / "train-00001.bin", 27)


def lengthen(folder):
    with open(folder / "val-00000.bin", "ab") as file:
        file.write(b"\0\0\0\0")


DAMAGE = {
    "no meta": (lambda f: (f / "meta.json").unlink(), r"meta.json does not exist; .*python -m data.prepare files"),
    "meta cut": (lambda f: os.truncate(f / "meta.json", 50), r"meta.json is damaged"),
    "meta empty": (lambda f: (f / "meta.json").write_text(""), r"meta.json is damaged"),
    "meta binary": (lambda f: (f / "meta.json").write_bytes(b"\xff\x00"), r"meta.json is damaged"),
    "meta list": (lambda f: (f / "meta.json").write_text("[]"), r"meta.json is damaged"),
    "meta key": (change_meta(splits={}), r"meta.json is damaged \(KeyError: 'train'\)"),
    "meta type": (change_meta(vocab_size="many"), r"meta.json is damaged"),
    "meta deep": (lambda f: (f / "meta.json").write_text("[" * 5000), r"meta.json is damaged \(RecursionError"),
    "half a vocabulary": (change_meta(vocab_size=65.5), r"meta.json is damaged \(TypeError: 'float'"),
    "half tokens": (half_tokens, r"meta.json is damaged \(TypeError: 'float'"),
    "format": (change_meta(format=2), r"reads format 1, found .*'format': 2"),
    "dtype": (change_meta(dtype="uint16", vocab_size=999), r"28 bytes, expected 14 \(7 tokens of uint16\)"),
    "dtype unknown": (change_meta(dtype="float32"), r"found .*'dtype': 'float32'"),
    "dtype too small": (change_meta(dtype="uint16"), r"found .*'vocab_size': 1048576"),
    "shard gone": (lambda f: (f / "train-00002.bin").unlink(), r"train-00002.bin is missing"),
    "shard cut": (cut, r"train-00001.bin has 27 bytes, expected 28"),
    "shard longer": (lengthen, r"val-00000.bin has 32 bytes, expected 28"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(positions, case):
    damage, message = DAMAGE[case]
    damage(positions)
    with pytest.raises(UserError, match=message) as error:
        TokenData(positions, 16, seed=1)
    assert "python -m data.prepare" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "command, expected",
    [
        ("files --input=a", "files --input=a --out_dir={}"),
        ("files --out_dir=data/my --input='a b'", "files '--input=a b' --out_dir={}"),
        ("files --out_dir={} --input=a", "files --out_dir={} --input=a"),
        ("it's", "files --input=TEXT --out_dir={}"),
    ],
)
def test_a_copy_is_prepared_where_it_lies(tmp_path, command, expected):
    meta = {"command": f"python -m data.prepare {command}".format(tmp_path)}
    assert prepare_command(tmp_path, meta) == f"python -m data.prepare {expected}".format(tmp_path)


def test_the_usual_folder_needs_no_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = "python -m data.prepare stdlib"
    for meta in ({"command": command}, {}):
        assert prepare_command(folder_of("stdlib"), meta) == command
    assert prepare_command(Path("here"), {"command": command}) == f"{command} --out_dir={tmp_path}/here"  # "here" would be data/here


def test_too_few_tokens(positions):
    assert TokenData(positions, 776, seed=1).val_rows(1).shape == (1, 777)
    with pytest.raises(UserError, match="777 val tokens, a sequence needs 778"):
        TokenData(positions, 777, seed=1)
    with pytest.raises(UserError, match="1000 train tokens, a sequence needs 1001"):
        TokenData(positions, 1000, seed=1)


def test_names_and_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    repo_data = Path(__file__).resolve().parents[1] / "data"
    assert folder_of("stdlib") == repo_data / "stdlib"
    assert folder_of("some/where") == Path("some/where")
    assert folder_of(str(tmp_path)) == tmp_path
    assert folder_of("./here") == Path("here")
    with pytest.raises(UserError, match=r"python -m data.prepare stdlib --out_dir="):
        TokenData(tmp_path / "stdlib", 8, seed=1)
    with pytest.raises(UserError, match=rf"prepare files --input=TEXT --out_dir={repo_data}/nowhere"):  # else data/files
        TokenData(folder_of("nowhere"), 8, seed=1)


def test_fast_enough(tmp_path):
    tokens = np.arange(2_000_000) % 50000
    data = TokenData(write_folder(tmp_path, tokens, tokens[:9999], 300_000, "uint16", 50257), 1024, seed=1)
    small = TokenData(tmp_path, 64, seed=1)

    def best_ms(work):
        times = []
        for step in range(20):
            begin = time.perf_counter()
            work(step)
            times.append(time.perf_counter() - begin)
        return min(times) * 1000

    assert best_ms(lambda step: small.train_batch(step, 12)) < 2
    assert best_ms(lambda step: data.train_batch(step, 488)) < 30
