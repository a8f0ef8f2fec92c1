"""The claims: each experiment runs in a tiny size and finds what has to be so on any machine."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.claims import TINY, bench_claims
from benchmarks.claims_serving import (
    cache_objection,
    decoding_objection,
    grouping_shrinks_the_cache,
    mixes,
    serve,
    waste_objection,
    wasted,
)
from benchmarks.claims_training import (
    attention_costs_n2d_and_nd2,
    bytes_made,
    cost_objection,
    flash_objection,
    linear_objection,
    receptive_field,
    training_objection,
    travel_objection,
)
from engine import Engine, Request
from kernels import reference, sdpa
from model import GPT, ModelConfig

CPU = torch.device("cpu")


def test_all_claims_are_measured_written_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.claims.pick_device", lambda name: CPU)
    bench_claims(SimpleNamespace(out_dir=str(tmp_path), rounds=1))
    written = json.loads((tmp_path / "claims-cpu.json").read_text())
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == written
    assert len(written["rows"]) == 8 and (tmp_path / "claims-cpu.png").stat().st_size > 10_000
    for row in written["rows"]:
        assert row["verdict"] == "holds" or row["verdict"].startswith("no, because ")
        assert row["claim"] in printed and row["measured"] in printed
    verdicts = {row["claim"]: row["verdict"] for row in written["rows"]}
    for exact in (
        "MQA and GQA shrink the KV cache to n_kv_head / n_head",
        "Information travels window - 1 tokens a layer",
    ):
        assert verdicts[exact] == "holds"
    assert "counts exactly so at 6 of 6 shapes" in written["rows"][0]["measured"]


QUARTER = {"mha": 1, "gqa": 0.25}
WASTE = {"chat": (0.8, 0.039), "uniform": (0.6, 0.01), "full": (0.25, 0.0)}
HELD = {512: 1, 1024: 100, 4096: 440}


@pytest.mark.parametrize(
    "objection, measured, reason",
    [
        (cache_objection, ({"mha": 1, "gqa": 0.2524}, QUARTER), ""),
        (cache_objection, ({"mha": 1, "gqa": 0.2476}, QUARTER), ""),
        (cache_objection, ({"mha": 1, "gqa": 0.2526}, QUARTER), "gqa takes 0.2526"),
        (cache_objection, ({"mha": 1, "gqa": 0.2474}, QUARTER), "gqa takes 0.2474"),
        (decoding_objection, ({1: 0.99, 64: 0.8},), ""),
        (decoding_objection, ({1: 0.99, 16: 0.7, 64: 0.79},), "with 16 sequences it decodes at 70.0% of MQA's speed, though with 1 at 80% or more"),
        (decoding_objection, ({1: 0.799, 64: 0.9},), "with 1 sequences it decodes at 79.9% of MQA's speed, though with 64 at"),
        (waste_objection, (WASTE, (1, 2), (10, 11)), ""),
        (waste_objection, (WASTE | {"chat": (0.801, 0)}, (1, 2), (10, 11)), "contiguous caches waste depends on the lengths: 80.1% on chat ones"),
        (waste_objection, (WASTE | {"uniform": (0.599, 0)}, (1, 2), (10, 11)), "contiguous caches waste depends on the lengths: 59.9% on uniform ones"),
        (waste_objection, (WASTE | {"full": (0, 0.04)}, (1, 2), (10, 11)), "pages waste 4.0% on full"),
        (waste_objection, (WASTE, (2, 2), (10, 11)), "pages run no more sequences"),
        (waste_objection, (WASTE, (1, 2), (10, 10)), "pages are no faster"),
        (cost_objection, ([], {(1, 2): 0.1, (3, 4): -0.1}, (0, 1)), ""),
        (cost_objection, ([(1, 2)], {(1, 2): 0}, (1, 1)), "the counted operations differ at n, d = (1, 2)"),
        (cost_objection, ([], {(1, 2): 0.1, (3, 4): -0.101}, (1, 1)), "the best fit is -10.1% off at n, d = (3, 4)"),
        (cost_objection, ([], {(1, 2): 0}, (-0.1, 1)), "the best a and b are -0.1 and 1"),
        (cost_objection, ([], {(1, 2): 0}, (1, -0.1)), "the best a and b are 1 and -0.1"),
        (training_objection, (0.95,), ""),
        (training_objection, (0.949,), "it trains at 94.9% of MQA's speed"),
        (linear_objection, (0.9,), ""),
        (linear_objection, (1.1,), ""),
        (linear_objection, (0.899,), "the exponent is 0.899"),
        (linear_objection, (1.101,), "the exponent is 1.101"),
        (travel_objection, ({1: 5, 2: 9}, 5), ""),
        (travel_objection, ({1: 5, 2: 10}, 5), "depth 2 sees 10 tokens"),
        (travel_objection, ({1: 4, 2: 9}, 5), "depth 1 sees 4 tokens"),
        (flash_objection, (HELD, 99, 100), ""),
        (flash_objection, (HELD | {4096: 441}, 99, 100), "memory grows by 4.41 from 1024 to 4096 tokens"),
        (flash_objection, (HELD, 100, 100), "in the time it took at n 4096, 1e-07 GB could have been moved, more than the 1e-07 GB"),
    ],
)
def test_a_verdict_follows_from_what_was_measured(objection, measured, reason):
    found = objection(*measured)
    assert found == "" if not reason else reason in found


def test_times_that_follow_the_formula_are_fitted(monkeypatch):
    def exact(calls, rounds, device):
        return {(n, d): max(TINY.lengths) / n * (2e-6 * n * n * d + 3e-6 * n * d * d + 4e-6 * n * d) for n, d in calls}

    monkeypatch.setattr("benchmarks.claims_training.milliseconds", exact)
    answer = attention_costs_n2d_and_nd2(TINY, CPU, torch.float32, 1)
    assert [answer["data"][key] for key in "abc"] == pytest.approx([2e-6, 3e-6, 4e-6])
    assert answer["because"] == "" and "to within 0.0%" in answer["measured"]


@pytest.mark.parametrize("layers, window", [(1, 1), (2, 3), (3, 4)])
def test_the_receptive_field(layers, window):
    assert receptive_field(layers, window) == layers * (window - 1) + 1


def test_the_cache_is_measured_and_not_computed():
    measured = grouping_shrinks_the_cache(TINY, CPU, torch.float32, 1)["data"]["bytes_per_token"]
    assert measured == {"mha": 2 * 2 * 8 * 64 * 4, "gqa": 2 * 2 * 2 * 64 * 4, "mqa": 2 * 2 * 1 * 64 * 4}


def test_the_definition_makes_n_by_n_and_sdpa_does_not():
    q, k, v = torch.randn(3, 1, 64, 2, 16)
    assert bytes_made(lambda: reference.attention(q, k, v), CPU) == 2 * 64 * 64 * 4
    assert bytes_made(lambda: sdpa.attention(q, k, v), CPU) == q.nbytes


def tiny_model():
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=16, max_seq_len=64, vocab_size=256))
    model.init_weights(1)
    return model.eval()


def test_serving_counts_tokens_and_never_exceeds_its_limit():
    engine = Engine(tiny_model(), num_pages=20)
    speed, together = serve(engine, [Request([1] * 3, 4), Request([2] * 5, 2), Request([3] * 7, 3)], at_once=2)
    assert speed > 0 and not engine.has_work()
    assert together == 9 / 5, "two and two, then the third beside the first for two more, and alone"


def test_the_waste_of_full_sequences_is_that_of_growing():
    """16 of 64 tokens as prompt, then one more each step: reserved is 64, cached 16 to 63, and in whole pages."""
    contiguous, pages = wasted(tiny_model(), [Request([1] * 16, 48)], at_once=1)
    cached = range(16, 64)
    assert contiguous == pytest.approx(1 - sum(cached) / (48 * 64))
    assert pages == pytest.approx(1 - sum(cached) / sum(-(-n // 16) * 16 for n in cached))


def test_mixes_fit_the_context():
    for lengths in mixes(TINY).values():
        assert all(prompt >= 1 and new >= 1 and prompt + new <= TINY.max_seq_len for prompt, new in lengths)
