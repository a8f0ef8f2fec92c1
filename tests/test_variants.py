"""The table of what the attention type buys, at a size that takes seconds."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import variants

SHAPE = {"n_layer": 4, "n_embd": 64, "n_head": 8, "mlp_hidden": 64, "vocab_size": 64, "max_seq_len": 64}


def test_the_table_counts_bytes_sequences_and_tokens(tmp_path, monkeypatch, capsys):
    sizes = variants.Sizes(SHAPE, tokens=64, cache_bytes=2**19, batches=(1, 9), steps=4)
    monkeypatch.setattr(variants, "SIZES", {"cpu": sizes, "cuda": sizes})
    monkeypatch.setattr(variants, "pick_device", lambda name: torch.device("cpu"))
    variants.bench_variants(SimpleNamespace(out_dir=tmp_path, rounds=1))
    rows = {row["variant"]: row for row in json.loads((tmp_path / "variants-cpu.json").read_text())["rows"]}
    assert list(rows) == ["mha", "gqa-2", "mqa", "swa-w16", "swa-w16-LLLG"]
    assert [row["kv_bytes_per_token"] for row in rows.values()] == [2048, 512, 256, 2048, 2048]
    assert [row["largest_batch"] for row in rows.values()] == [4, 16, 32, 15, 8]
    assert [row["decode_tokens_per_s"]["9"] is None for row in rows.values()] == [True, False, False, False, True]
    assert all(row["decode_tokens_per_s"]["1"] > 0 for row in rows.values())
    assert (tmp_path / "variants-cpu.png").stat().st_size > 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_memory_that_is_not_what_the_formula_says_is_an_error(monkeypatch):
    model = variants.random_model({**SHAPE, **variants.PARTS}, "cpu", torch.float32)
    engine = variants.Engine(model, 20, variants.PAGE_SIZE)
    assert variants.fill(engine, 64) == 5
    monkeypatch.setattr(engine.tables, "page_size", 8)  # as if pages were taken for fewer tokens than they hold
    with pytest.raises(RuntimeError, match="sequences of 64 tokens hold"):
        variants.fill(engine, 64)


def test_text_that_does_not_follow_the_model_is_an_error():
    sizes = variants.Sizes(SHAPE, tokens=64, cache_bytes=2**19, batches=(2,), steps=4)
    model = variants.random_model({**SHAPE, **variants.PARTS}, "cpu", torch.float32)
    engine = variants.Engine(model, 20, variants.PAGE_SIZE)
    assert variants.decode_speed(engine, sizes, 2, check=True) > 0
    engine.model = copy.deepcopy(model)  # that of the check, not of the runner
    engine.model.norm.weight.data.neg_()
    with pytest.raises(RuntimeError, match="does not follow the model"):
        variants.decode_speed(engine, sizes, 2, check=True)
