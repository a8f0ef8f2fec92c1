"""The device's side: padding, who computes attention, compiled Blocks; on a GPU, graphs and two steps under way."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_engine import PAGE, POSITIONS, VARIANTS, check_engine, finish_all, make, prompts, recompute
from util import DEVICE, gpu

from engine import Engine, Request
from runner import Graph, Shape, StepInputs, bucket, layout, page_bytes
from sampling import ALTERNATIVES, Style


def texts_of(engine, requests, before_step=lambda: None):
    sequences = [engine.add(request) for request in requests]
    while engine.has_work():
        before_step()
        engine.step()
        check_engine(engine)
    return [sequence.generated for sequence in sequences]


def requests(*lengths, new=20):
    """Requests of all styles, that end at different times."""
    styles = [{}, {"temperature": 0.8, "top_k": 9}, {"temperature": 1.0}, {"temperature": 1.2, "top_p": 0.9}]
    return [Request(p, new - i % 7, seed=i, **styles[i % 4]) for i, p in enumerate(prompts(*lengths))]


def test_buckets_are_few_and_seldom_much_too_large():
    sizes = [bucket(n) for n in range(1, 257)]
    assert all(n <= size for n, size in enumerate(sizes, start=1)) and sizes == sorted(sizes)
    assert len(set(sizes)) == 23 and {1, 2, 4, 8, 64, 256} <= set(sizes)
    assert all(size - n < max(8, n / 4) for n, size in enumerate(sizes, start=1))


def test_the_views_of_a_block_are_aligned_and_do_not_overlap():
    shape = Shape(5, 3, 2, (4, 7), 2, 256, Style())
    buffer = torch.zeros(layout(shape)[1], dtype=torch.int32)
    block = StepInputs(shape, buffer, torch.float32)
    views = [block.tokens, block.positions, *block.slot_mapping, block.seq_lens, block.cu_seqlens, *block.page_tables]
    views += [block.last_rows, *block.limits]
    for view in views:
        assert (view.data_ptr() - buffer.data_ptr()) % 64 == 0
        view += 1
    assert buffer.view(torch.float32).max() == 1 and max(view.max() for view in views) == 1
    assert [view.numel() for view in views] == [5, 5, 5, 5, 3, 4, 12, 21, 2, 2, 2, 2, 2, 2]
    assert block.page_tables[1].shape == (3, 7) and block.limits.top_k.dtype == torch.int32


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("overlap", [False, True])
def test_padding_rows_change_nothing(variant, overlap):
    """The shapes that graphs have, on any device."""
    model, asked = make(**VARIANTS[variant], **POSITIONS["rope"]), requests(1, 7, 8, 9, 40)
    want = texts_of(Engine(model, 200, PAGE), asked)
    engine = Engine(model, 200, PAGE, overlap=overlap)
    engine.runner.pads = True
    shapes, pack = [], engine.runner.pack

    def watched(pieces, tables):
        shape, host = pack(pieces, tables)
        shapes.append(shape)
        return shape, host

    engine.runner.pack = watched
    assert texts_of(engine, asked) == want
    decoding = [shape for shape in shapes if shape.max_query_len == 1]
    assert {shape.num_seqs for shape in decoding} == {shape.num_tokens for shape in decoding} >= {1, 2, 4, 8}
    assert {shape.max_seq_len for shape in shapes} == {256}


def test_shapes_are_few_however_long_the_text():
    """Each is captured as a graph of its own."""
    runner = Engine(make(**VARIANTS["hybrid"], **POSITIONS["rope"]), 300, PAGE).runner
    runner.pads = True
    shapes = {runner.shape_of(np.array([1, 1]), longest) for longest in range(1, 5000)}
    assert {shape.max_seq_len for shape in shapes} == {256, 512, 1024, 2048, 4096, 8192} and len(shapes) == 6


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("window, width", [(1, 1), (2, 2), (PAGE, 2), (PAGE + 1, 2), (PAGE + 2, 3), (99, 9)])
def test_a_windowed_step_hands_over_only_the_pages_that_it_sees(window, width, overlap):
    """However long a step may be, and wherever in the ring of the table the window lies."""
    model, (prompt,) = make(attention="swa", window=window, **POSITIONS["rope"]), prompts(40)
    engine = Engine(model, 60, PAGE, 400, overlap=overlap)
    shapes, pack = [], engine.runner.pack
    engine.runner.pack = lambda *args: shapes.append(pack(*args)) or shapes[-1]
    assert texts_of(engine, [Request(prompt, 30)]) == [recompute(model, prompt, 30)]
    assert max(shape.widths for shape, _ in shapes if shape.max_query_len == 1) == (width,)
    assert shapes[0][0].widths == (5,) and engine.tables.tables[0].shape[1] > 50


@pytest.mark.parametrize("variant, num_pages", [("gqa", 200), ("gqa", 14), ("swa", 6), ("hybrid", 300), ("hybrid", 20)])
def test_replaying_into_the_same_buffers_changes_nothing(variant, num_pages):
    """As graphs do: inputs and outputs of a shape stay where they are, while two steps are under way."""
    model, asked = make(**VARIANTS[variant], **POSITIONS["rope"]), requests(1, 7, 8, 9, 30)
    asked = [dataclasses.replace(request, logprobs=3) for request in asked]
    want = texts_of(Engine(model, 200, PAGE), asked)
    engine = Engine(model, num_pages, PAGE, overlap=True)
    runner, replays = engine.runner, []
    runner.pads, runner.graphs = True, {}

    def capture(shape, buffer):
        n = shape.num_draws
        outputs = [
            torch.zeros(n).long(),
            torch.zeros(n),
            torch.zeros(n, ALTERNATIVES),
            torch.zeros(n, ALTERNATIVES).long(),
        ]

        def replay():
            replays.append(shape)
            for x, new in zip(outputs, runner.compute(shape, buffer, buffer), strict=True):
                x.copy_(new)

        return Graph(SimpleNamespace(replay=replay), buffer, outputs)

    runner.capture = capture
    assert texts_of(engine, asked) == want
    assert len(replays) > 10 and (engine.stats.preemptions > 0) == (num_pages < 200)
    assert all(shape.max_query_len == 1 for shape in runner.graphs)  # steps with prompts hardly ever come again


@pytest.mark.parametrize("variant", ["gqa", "swa", "hybrid"])
def test_triton_attention_writes_the_same_text(variant):
    """With padding rows, NaN in what is unused, and two steps under way."""
    model = make(**VARIANTS[variant], **POSITIONS["rope"], n_embd=64)
    asked = requests(5, 17, 20, new=9)
    want = texts_of(Engine(model, 100, 16, 12), asked)
    engine = Engine(model, 100, 16, 12, attention="triton", overlap=True)
    assert engine.runner.pads
    assert [sequence.generated for sequence in finish_all(engine, asked, every=2)] == want
    assert want[0] == recompute(model, asked[0].prompt, 9)


@pytest.mark.parametrize("asked, columns", [([None], ()), ([0, None], (0, 0)), ([0, 3, None], (ALTERNATIVES,) * 2)])
def test_alternatives_are_looked_for_only_when_somebody_asks_for_them(asked, columns):
    engine, outputs = Engine(make(), 40, PAGE), []
    compute = engine.runner.compute
    engine.runner.compute = lambda *args: outputs.append(compute(*args)) or outputs[-1]
    sequences = [engine.add(Request([1, 2, 3], 4, logprobs=logprobs)) for logprobs in asked]
    while engine.has_work():
        engine.step()
    assert {tuple(output.shape[1] for output in step[2:]) for step in outputs} == {columns}
    for sequence, logprobs in zip(sequences, asked):
        assert [len(best) for _, best in sequence.logprobs] == ([] if logprobs is None else [logprobs] * 4)


def test_compiled_blocks_write_the_same_text_and_are_compiled_once(monkeypatch):
    compilations = []

    def backend(graph, inputs, **options):
        compilations.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    asked = [Request(prompt, 20) for prompt in prompts(5, 17, 20)]
    keys = {**VARIANTS["hybrid"], **POSITIONS["rope"], "n_layer": 6}
    want = texts_of(Engine(make(**keys), 300, PAGE), asked)
    compiled = make(**keys)
    for _ in range(2):
        assert texts_of(Engine(compiled, 300, PAGE, 30, compile=True), asked) == want
    assert len(compilations) <= 7  # two halves of 6 Blocks, and drawing, for one token and for many


@pytest.mark.parametrize("head_dim, most", [(16, 128), (136, 64)])
def test_auto_leaves_a_model_with_too_many_query_heads_a_kv_head_to_sdpa(head_dim, most, monkeypatch):
    """Else its first step would fail."""
    monkeypatch.setattr("runner.triton_takes", lambda device, head_dim: True)  # as on a GPU
    for n_head, triton in ((most, True), (most + 1, False)):
        model = make(attention="mqa", n_head=n_head, head_dim=head_dim, n_layer=1, **POSITIONS["rope"]).to(DEVICE)
        engine = Engine(model, 4, 16)
        assert engine.runner.pads == triton
        sequence = engine.add(Request([1, 2], 2))
        engine.step()
        assert len(sequence.generated) == 1


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attention takes auto, triton, sdpa or reference, got flash"):
        Engine(make(), 10, attention="flash")


def test_a_page_takes_the_bytes_it_is_said_to_take():
    for variant in VARIANTS:
        model = make(**VARIANTS[variant])
        engine = Engine(model, 12, PAGE)
        groups = engine.tables.groups
        storage = sum(pages.numel() * pages.element_size() for pages in engine.runner.k + engine.runner.v)
        assert storage == 12 * page_bytes(model.config, groups, PAGE, torch.float32)
        whole = page_bytes(model.config, groups, PAGE, torch.float32) * len(groups)
        assert whole == PAGE * model.kv_bytes_per_token(4)


# On a GPU


def on_gpu(variant, **keys):
    return make(**VARIANTS[variant], **POSITIONS["rope"], n_embd=64, **keys).cuda()


@gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("overlap, graphs, compile", [(1, 1, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)])
def test_on_a_gpu_graphs_and_overlap_change_no_token(variant, overlap, graphs, compile):
    asked = requests(*range(1, 40), new=30)
    want = texts_of(Engine(on_gpu(variant), 600, 16, 64, attention="sdpa", overlap=False), asked)
    for num_pages in (600, 40):
        engine = Engine(on_gpu(variant), num_pages, 16, 64, overlap=overlap, graphs=graphs, compile=compile)
        assert texts_of(engine, asked) == want
        assert bool(engine.runner.graphs) == bool(graphs)
        assert (engine.stats.preemptions > 0) == (num_pages == 40)


@gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu_greedy_text_is_that_of_recomputing_everything(variant):
    model, texts = on_gpu(variant), prompts(1, 15, 16, 40)
    got = texts_of(Engine(model, 200, 16, 20), [Request(text, 30) for text in texts])
    assert got == [recompute(model.cpu(), text, 30) for text in texts]


@gpu
def test_on_a_gpu_log_probabilities_need_no_alternatives():
    (prompt,) = prompts(9)
    engine, rows = Engine(on_gpu("gqa"), 100, 16), []
    for logprobs in (0, 2):  # one after the other, each in steps of its own
        sequence = engine.add(Request(prompt, 12, logprobs=logprobs))
        while engine.has_work():
            engine.step()
        rows.append([chosen for chosen, _ in sequence.logprobs])
        assert {len(best) for _, best in sequence.logprobs} == {logprobs}
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)
