"""The engine against recomputing everything; its scheduler with a device that keeps tokens in place of K and V."""

import dataclasses
import math
import random
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_paging import check_tables
from torch import nn
from util import DEVICE

from config import UserError
from engine import Engine, Request, generate
from kernels import reference
from model import GPT, ModelConfig
from sampling import states_of, uniform
from sequence import Sequence

PAGE = 8
WINDOW = 5
VARIANTS = {
    "mha": {"attention": "mha"},
    "mqa": {"attention": "mqa"},
    "gqa": {"attention": "gqa", "n_kv_head": 2},
    "swa": {"attention": "swa", "window": WINDOW},
    "hybrid": {"attention": "swa", "window": WINDOW, "window_pattern": "LG", "n_kv_head": 2},
}
POSITIONS = {
    "learned": {"pos": "learned", "max_seq_len": 80},
    "rope": {"pos": "rope", "max_seq_len": 16, "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "bias": False},
}


def make(**keys):
    """A small model with weights so large that its greedy text is varied."""
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 61, "tie_embeddings": False}
    model = GPT(ModelConfig(**{**shape, "max_seq_len": 80, **keys})).eval()
    model.init_weights(seed=1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 12
    return model


def prompts(*lengths, vocab=61, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(vocab) for _ in range(length)] for length in lengths]


def recompute(model, prompt, max_new_tokens):
    """Greedy text without a cache: the dense definition over all tokens, for each new one."""
    tokens = list(prompt)

    def attend(layer, q, k, v, window):
        return reference.attention(q, k, v, window)

    with torch.no_grad():
        for _ in range(max_new_tokens):
            features = model.features(torch.tensor([tokens]), attend)
            tokens.append(model.logits(features[0, -1]).argmax().item())
    return tokens[len(prompt) :]


@cache
def recomputed(variant, pos, prompt, max_new_tokens):
    return recompute(make(**VARIANTS[variant], **POSITIONS[pos]), prompt, max_new_tokens)


def check_engine(engine):
    """The invariants of the pages, and that those who run came before those who wait."""
    check_tables(engine.tables, [*engine.running, *engine.waiting])
    assert all(sequence.row for sequence in engine.running)
    assert not any(sequence.row or sequence.num_computed for sequence in engine.waiting)
    for sequence in engine.running:
        assert sequence.row.end == -(-sequence.num_computed // engine.tables.page_size)
        for group, first in zip(engine.tables.groups, sequence.row.first):
            held = (sequence.row.end - first) * engine.tables.page_size
            assert not group.window or held <= group.window + 2 * engine.tables.page_size


def poison(engine):
    """NaN in every slot that holds nothing anyone could still look at, and in every page that is taken from now on."""
    tables, size = engine.tables, engine.tables.page_size
    keep = torch.zeros(engine.num_pages, size, dtype=torch.bool)
    for page, content in enumerate(tables.contents):
        keep[page] = content is not None
    for sequence in engine.running:
        for g, group in enumerate(tables.groups):
            for position in range(group.first_seen(sequence.num_computed), sequence.num_computed):
                keep[tables.page(sequence.row, g, position // size), position % size] = True
    for pages in engine.runner.k + engine.runner.v:
        pages[~keep] = math.nan


def poisoned(engine):
    """The engine, whose free pages come in any order, full of NaN."""
    pages = list(engine.tables.allocator.free)
    random.Random(0).shuffle(pages)
    for page in pages:
        engine.tables.allocator.free.move_to_end(page)
    forget = engine.tables.forget

    def forget_and_poison(page):
        forget(page)
        for storage in engine.runner.k + engine.runner.v:
            storage[page] = math.nan

    engine.tables.forget = forget_and_poison
    return engine


def finish_all(engine, arrivals=(), every=1):
    """Run to the end, a new request each `every` steps. Returns their sequences."""
    sequences, arrivals, steps = [], list(arrivals), 0
    poisoned(engine)
    while arrivals or engine.has_work():
        if arrivals and steps % every == 0:
            sequences.append(engine.add(arrivals.pop(0)))
        poison(engine)
        engine.step()
        check_engine(engine)
        steps += 1
    assert engine.tables.allocator.num_held == 0
    return sequences


# Greedy text


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plenty", [True, False])
@pytest.mark.parametrize("budget", [2048, 6])
@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_text_is_that_of_recomputing_everything(variant, pos, plenty, budget, overlap):
    """With room, and with pages so few that sequences are preempted; prompts whole, and in pieces of a few tokens,
    longer than the window, found in the cache in part and whole; several samples; one cancelled in the middle."""
    texts = prompts(1, PAGE - 1, PAGE, 2 * PAGE, 40)
    texts += [texts[3], texts[4][:-3] + [7], texts[4] + [5], texts[3]]
    groups = 3 if variant == "hybrid" else 1
    num_pages = 99 * groups if plenty else {"swa": 6, "hybrid": 15}.get(variant, 9)
    engine = Engine(make(**VARIANTS[variant], **POSITIONS[pos]), num_pages, PAGE, budget, overlap=overlap)
    sequences, steps = [], 0
    poisoned(engine)
    while len(sequences) < len(texts) or engine.has_work():
        if steps % 3 == 0 and len(sequences) < len(texts):
            request = Request(texts[len(sequences)], 20)
            sequences.append(engine.add(request))
            if steps == 9:
                texts.insert(3, texts[3])
                sequences.append(engine.add(request))  # two samples of that one
        if steps == 16:
            cancelled = engine.running[-1]
            assert cancelled.row and cancelled.num_computed > 0
            engine.cancel(cancelled)
        poison(engine)
        engine.step()
        check_engine(engine)
        steps += 1
    assert engine.tables.allocator.num_held == 0
    want = [recomputed(variant, pos, tuple(text), 20) for text in texts]
    assert [s.generated for s in sequences] == [text[: len(s.generated)] for s, text in zip(sequences, want)]
    assert [s.finished for s in sequences] == ["cancelled" if s is cancelled else "length" for s in sequences]
    assert all(len(s.generated) == 20 for s in sequences if s.finished == "length")
    assert (engine.stats.preemptions > 0) == (not plenty)
    assert engine.stats.found_tokens > 0


def test_the_texts_are_varied():
    texts = prompts(1, PAGE - 1, PAGE, 2 * PAGE, 40)
    for variant, pos in [(variant, pos) for variant in VARIANTS for pos in POSITIONS]:
        want = [recomputed(variant, pos, tuple(text), 20) for text in texts]
        assert len({tuple(text) for text in want}) == 5 and min(len(set(text)) for text in want) > 5


def test_variants_and_positions_write_different_texts():
    """Otherwise the tests above could not tell a window that is ignored."""
    (prompt,) = prompts(40)
    texts = {tuple(recomputed(variant, pos, tuple(prompt), 20)) for variant in VARIANTS for pos in POSITIONS}
    assert len(texts) == len(VARIANTS) * len(POSITIONS)


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_any_page_size(page_size, attention):
    model = make(**VARIANTS["hybrid"])
    texts = prompts(2, 20)
    engine = Engine(model, 130, page_size, attention=attention)
    sequences = finish_all(engine, [Request(prompt, 12) for prompt in texts])
    assert [sequence.generated for sequence in sequences] == [recompute(model, prompt, 12) for prompt in texts]


def test_generate_continues_all_prompts():
    model = make()
    texts = prompts(3, 17)
    want = [recompute(model, prompt, 10) for prompt in texts]
    assert generate(model, texts, 10) == want
    assert generate(model, texts, 10, stop_tokens=(want[0][4],))[0] == want[0][: want[0].index(want[0][4])]


def test_generate_continues_no_prompts_at_all():
    assert generate(make(), [], 10) == []


def test_what_the_caller_does_with_the_prompt_later_is_no_concern_of_the_sequence():
    engine, prompt = Engine(counter(), 20, 4), [3, 4]
    sequence = engine.add(Request(prompt, 9))
    engine.step()
    prompt += sequence.generated  # as in a conversation
    while engine.has_work():
        engine.step()
    assert sequence.generated == count([3, 4], 9)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("why", ["length", "stop", "cancelled"])
def test_a_conversation_finds_all_full_pages_of_its_last_turn(overlap, why):
    """The last of them too, which the last token that was computed filled."""
    engine = Engine(counter(), 20, 4, overlap=overlap)
    whole = count([3] * 6, 7)
    first = engine.add(Request([3] * 6, 7 if why == "length" else 30, stop_tokens=whole[-1:] if why == "stop" else ()))
    while not first.finished and len(first.generated) < 7:
        engine.step()
    engine.cancel(first)
    assert first.finished == why
    second = engine.add(Request([3] * 6 + whole[:6] + [9], 3))
    while engine.has_work():
        engine.step()
    assert engine.stats.found_tokens == 12
    assert second.generated == count([3] * 6 + whole[:6] + [9], 3)


def test_max_window_is_a_window_on_every_layer():
    keys = {"pos": "rope", "max_seq_len": 16}
    model, windowed = make(**keys), make(**keys, attention="swa", window=16)
    (prompt,) = prompts(30)
    sequences = finish_all(Engine(model, 20, PAGE, max_window=16), [Request(prompt, 20)])
    assert sequences[0].generated == recompute(windowed, prompt, 20) != recompute(model, prompt, 20)
    hybrid = make(**keys, **VARIANTS["hybrid"])  # a narrower window stays
    sequences = finish_all(Engine(hybrid, 30, PAGE, max_window=64), [Request(prompt, 20)])
    assert sequences[0].generated == recompute(hybrid, prompt, 20)


def test_receptive_field():
    """n_layer windowed layers see n_layer * (window - 1) + 1 tokens and not one more."""
    model = make(attention="swa", window=4)
    field = 3 * (4 - 1) + 1
    logits = []
    real = model.logits
    model.logits = lambda x: logits.append(real(x)) or logits[-1]
    texts = prompts(30, 30)
    for changed in (None, 30 - field - 1, 30 - field):
        prompt = list(texts[0])
        if changed is not None:
            prompt[changed] = texts[1][changed]
        engine = Engine(model, 20, PAGE, max_tokens_per_step=11)
        engine.add(Request(prompt, 2))
        for _ in range(3):
            engine.step()
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_windowed_model_with_rope_writes_without_end_in_constant_memory(overlap):
    model = make(**VARIANTS["swa"], **POSITIONS["rope"])
    (prompt,) = prompts(20)
    engine = poisoned(Engine(model, 4, PAGE, 8, overlap=overlap))
    sequence = engine.add(Request(prompt, 10**9))
    while len(sequence.generated) < 400:
        poison(engine)
        engine.step()
        check_engine(engine)
    field = 3 * (WINDOW - 1) + 1
    end = sequence.tokens[-field - 1 : -1]  # all that the last token depends on; RoPE looks at distances only
    assert recompute(model, end, 1) == sequence.tokens[-1:]
    assert engine.stats.peak_pages <= 4 and engine.tables.tables[0].shape[1] <= 4
    engine.cancel(sequence)


# Scheduling. The model counts: after token t at position p comes (t + p) % 50


def counter(windows=(0,), pos="learned"):
    model = Counter()
    shape = {"n_layer": len(windows), "n_kv_head": 1, "head_dim": 1, "vocab_size": 50, "max_seq_len": 64}
    model.config = SimpleNamespace(**shape, pos=pos, windows=windows)
    return model


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def features(self, tokens, attend, positions):
        return torch.stack([tokens[0], positions], dim=-1)[None]

    def logits(self, x):
        return nn.functional.one_hot(x.sum(dim=-1).long() % 50, 50).float()


def count(prompt, max_new_tokens):
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append((tokens[-1] + len(tokens) - 1) % 50)
    return tokens[len(prompt) :]


class Device:
    """In place of a Runner: each slot keeps which token lies in it, and all that a query sees is checked."""

    def __init__(self):
        self.slots, self.drawn = {}, []

    def launch(self, pieces, tables):
        size, written = tables.page_size, set()
        pieces = [(p, [t if t >= 0 else self.drawn[-1 - t] for t in p.tokens]) for p in pieces]
        for piece, tokens in pieces:  # a layer writes all of the step's K and V ..
            for group in range(len(tables.groups)):
                for position, token in enumerate(tokens, start=piece.start):
                    page = tables.page(piece.sequence.row, group, position // size)
                    assert tables.allocator.holders[page] <= 1 or tables.contents[page]
                    assert (page, position % size) not in written
                    written.add((page, position % size))
                    self.slots[page, position % size] = token, position
        for piece, tokens in pieces:  # .. before it looks at any
            text = piece.sequence.tokens[: piece.start] + tokens
            for g, group in enumerate(tables.groups):
                for position in range(group.first_seen(piece.start), len(text)):
                    page = tables.page(piece.sequence.row, g, position // size)
                    assert self.slots[page, position % size] == (text[position], position)
        self.drawn = [(tokens[-1] + p.start + len(tokens) - 1) % 50 for p, tokens in pieces if p.draws]
        return SimpleNamespace(read=lambda drawn=self.drawn: [drawn])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("windows, num_pages", [((0,), 20), ((6,), 9), ((6, 0), 26)])
def test_17000_random_operations_keep_the_invariant(windows, num_pages, overlap):
    """100,000 together: requests that share beginnings, samples, cancels, stops, preemption."""
    generator = random.Random(0)
    engine = Engine(counter(windows), num_pages, 4, 25, max_num_seqs=8, overlap=overlap)
    engine.runner = Device()
    beginnings = [[generator.randrange(50) for _ in range(30)] for _ in range(3)]
    sequences = []
    for _ in range(17_000):
        action = generator.random()
        if action < 0.15 and len(engine.waiting) < 20:
            prompt = generator.choice(beginnings)[: generator.randrange(31)]
            prompt += [generator.randrange(50) for _ in range(generator.randrange(0 if prompt else 1, 9))]
            stop = tuple(generator.sample(range(50), 2))
            request = Request(prompt, generator.randrange(1, 24), stop_tokens=stop)
            sequences += [engine.add(request) for _ in range(generator.choice((1, 1, 1, 3)))]
        elif action < 0.2 and sequences:
            engine.cancel(generator.choice(sequences[-30:]))
        else:
            running = engine.running + list(engine.waiting)
            engine.step()
            in_order = [sequence for sequence in running if not sequence.finished]
            assert engine.running + list(engine.waiting) == in_order
        check_engine(engine)
    while engine.has_work():
        engine.step()
    assert engine.tables.allocator.num_held == 0 and len(engine.tables.rows) == 8
    assert engine.stats.preemptions > 100 and engine.stats.found_tokens > 1000 and len(sequences) > 1000
    reasons = {"length": 0, "cancelled": 0, "stop": 0}
    for sequence in sequences:
        reasons[sequence.finished] += 1
        whole = count(sequence.request.prompt, sequence.request.max_new_tokens)
        if sequence.finished == "stop":
            whole = whole[: next(i for i, token in enumerate(whole) if token in sequence.request.stop_tokens)]
        assert sequence.generated == (whole[: len(sequence.generated)] if sequence.finished == "cancelled" else whole)
    assert min(reasons.values()) > 50


def test_preemption_together_with_a_prefix_hit():
    """Sequences that share pages lose and find them again, and no page is counted twice."""
    engine = Engine(counter(), 9, 4)
    engine.runner = Device()
    sequences = [engine.add(Request([3] * 10, 20)) for _ in range(3)]
    while engine.has_work():
        engine.step()
        check_engine(engine)
    assert engine.stats.preemptions > 0 and engine.stats.found_tokens > 2 * 8
    assert all(sequence.generated == count([3] * 10, 20) for sequence in sequences)


@pytest.mark.parametrize("overlap", [False, True])
def test_no_token_is_dropped_after_re_prefill(overlap):
    """A preempted sequence keeps every token, that which was drawn but not yet read too, and repeats none."""
    engine = Engine(counter(), 8, 4, overlap=overlap)
    sequences = [engine.add(Request([i] * 6, 20)) for i in range(5)]
    told = {sequence: [] for sequence in sequences}
    while engine.has_work():
        for sequence, news in engine.step():
            told[sequence] += news
    assert engine.stats.preemptions > 3
    assert all(told[s] == s.generated == count(s.request.prompt, 20) for s in sequences)


def test_samples_of_a_prompt_share_its_pages_and_compute_it_once_and_have_texts_of_their_own():
    model, (prompt,) = make(), prompts(22)
    engine, request = Engine(model, 40, 4), Request(prompt, 12, temperature=1.0)
    samples = [engine.add(dataclasses.replace(request, seed=5 + i)) for i in range(4)]
    engine.step()
    assert engine.stats.prefill_tokens == 22 + 3 * 2 and engine.stats.found_tokens == 3 * 20
    assert engine.tables.allocator.num_held == 5 + 4
    while engine.has_work():
        engine.step()
    for i, sample in enumerate(samples):
        assert sample.generated == generate(model, [prompt], 12, seed=5 + i, temperature=1.0)[0]
    assert len({tuple(sample.generated) for sample in samples}) == 4


@pytest.mark.parametrize("overlap", [False, True])
def test_a_preempted_sequence_finds_all_of_its_full_pages(overlap):
    """The last of them too, which its last token filled."""
    engine = Engine(counter(), 20, 4, overlap=overlap)
    sequence = engine.add(Request([3] * 6, 9))
    while sequence.num_computed < 8:
        engine.step()
    assert sequence.num_computed == 8
    engine.preempt_latest()
    while engine.has_work():
        engine.step()
    assert engine.stats.found_tokens == 8 and sequence.generated == count([3] * 6, 9)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_windowed_conversation_longer_than_the_cache_finds_the_end_of_its_last_turn(overlap):
    """And so does a sequence that is preempted there."""
    engine = Engine(counter((6,), pos="rope"), 8, 4, overlap=overlap)
    engine.runner = Device()
    text = [3] * 10
    for found in (0, 56, 56 + 108):
        sequence = engine.add(Request(text, 50))
        while engine.has_work():
            engine.step()
            check_engine(engine)
        assert sequence.generated == count(text, 50) and engine.stats.found_tokens == found
        text = sequence.tokens + [7]
    sequence = engine.add(Request(text, 50))
    while sequence.num_computed < 200:
        engine.step()
    engine.preempt_latest()
    before = engine.stats.found_tokens
    while engine.has_work():
        engine.step()
    assert engine.stats.found_tokens - before >= 196 and sequence.generated == count(text, 50)


def test_first_come_first_served_and_the_latest_leaves_first():
    engine = Engine(counter(), num_pages=8, page_size=4)
    sequences = [engine.add(Request([i] * 6, 20)) for i in range(5)]
    ended, cached = [], 0
    while engine.has_work():
        engine.step()
        assert engine.running + list(engine.waiting) == [s for s in sequences if not s.finished]  # in order of arrival
        assert sequences[0].finished or sequences[0].num_computed > cached  # the oldest never loses a token
        cached = sequences[0].num_computed
        ended += [s for s in sequences if s.finished and s not in ended]
    assert ended == sequences and engine.stats.preemptions > 0


def test_a_long_prompt_comes_in_pieces_and_stalls_nobody():
    engine = Engine(counter(), num_pages=100, page_size=4, max_tokens_per_step=10)
    first = engine.add(Request([1], 30))
    engine.step()
    long = engine.add(Request([2] * 50, 3))
    for step in range(1, 7):  # 9 tokens of the prompt a step, beside the first sequence's one
        news = engine.step()
        assert len(first.generated) == 1 + step
        assert long.num_computed == min(50, 9 * step)
        assert (long in dict(news)) == (step == 6)


def test_a_step_keeps_to_its_token_budget():
    engine = Engine(counter(), num_pages=100, page_size=4, max_tokens_per_step=10)
    sequences = [engine.add(Request([i] * 6, 3)) for i in range(3)]
    engine.step()
    assert [sequence.num_computed for sequence in sequences] == [6, 4, 0]
    engine.step()
    assert [sequence.num_computed for sequence in sequences] == [7, 6, 6]


def test_no_more_sequences_run_at_once_than_allowed():
    engine = Engine(counter(), num_pages=100, max_num_seqs=2)
    sequences = [engine.add(Request([i], 3 + i)) for i in range(5)]
    while engine.has_work():
        engine.step()
        assert len(engine.running) <= 2
    assert [s.generated for s in sequences] == [count([i], 3 + i) for i in range(5)]


def test_a_step_reports_what_is_new():
    engine = Engine(counter(), num_pages=10, page_size=4)
    stop = count([3, 4], 3)[-1]
    stopped, other = engine.add(Request([3, 4], 9, stop_tokens=(stop,))), engine.add(Request([7], 2))
    assert engine.step() == [(stopped, [5]), (other, [7])]
    assert engine.step() == [(stopped, [count([3, 4], 2)[1]]), (other, [count([7], 2)[1]])]
    assert other.finished == "length"
    assert engine.step() == [(stopped, [])]
    assert stopped.finished == "stop" and stopped.generated == count([3, 4], 2)
    assert not engine.has_work() and engine.step() == []
    assert (engine.stats.prefill_tokens, engine.stats.decode_tokens) == (2, 3)


# Two steps under way


def test_the_next_step_is_launched_before_the_last_one_is_read():
    engine = Engine(counter(), 10, 4, overlap=True)
    order, device = [], Device()

    def launch(pieces, tables):
        order.append(("launch", [piece.tokens for piece in pieces]))
        drawn = device.launch(pieces, tables)
        return SimpleNamespace(read=lambda: order.append("read") or drawn.read())

    engine.runner = SimpleNamespace(launch=launch)
    sequence = engine.add(Request([3, 4], 4))
    while engine.has_work():
        engine.step()
    pending = ("launch", [[-1]])
    assert order == [("launch", [[3, 4]]), pending, "read", pending, "read", pending, "read", "read"]
    assert sequence.generated == count([3, 4], 4)


@pytest.mark.parametrize("why", ["stop", "cancelled"])
def test_a_sequence_that_has_ended_under_way_computes_one_token_in_vain(why):
    engine = Engine(counter(), 12, 4, overlap=True)
    engine.runner = Device()
    stop = (count([3, 4], 5)[-1],) if why == "stop" else ()
    first, other = engine.add(Request([3, 4], 30, stop_tokens=stop)), engine.add(Request([9] * 5, 30))
    for _ in range(5):
        engine.step()
    engine.cancel(first)  # nothing happens to one that has ended by itself
    assert first.finished == why and len(engine.launched) == 1
    third = engine.add(Request([8] * 20, 9))  # takes pages into which the step under way still writes
    while engine.has_work():
        for sequence, _ in engine.step():
            assert sequence is not first
        check_engine(engine)
    assert first.generated == count([3, 4], 4 if why == "stop" else 5)
    assert other.generated == count([9] * 5, 30) and third.generated == count([8] * 20, 9)


class Slow(Device):
    """A device on a clock of its own: a step takes a second for each of its tokens."""

    def __init__(self):
        super().__init__()
        self.now = self.idle_at = 0.0

    def launch(self, pieces, tables):
        drawn = super().launch(pieces, tables)
        self.idle_at = end = max(self.now, self.idle_at) + sum(len(piece.tokens) for piece in pieces)

        def read():
            self.now = max(self.now, end)
            return drawn.read()

        return SimpleNamespace(read=read)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pause", [0, 0.25, 1])  # of the caller, between steps
def test_the_speeds_are_those_of_the_device(overlap, pause, monkeypatch):
    engine = Engine(counter(), 20, 4, overlap=overlap)
    engine.runner = device = Slow()
    monkeypatch.setattr("engine.time.perf_counter", lambda: device.now)
    for prompt in ([3] * 6, [4] * 7):
        stop = count(prompt, 5)[-1]
        sequence = engine.add(Request(prompt, 30, stop_tokens=(stop,)))
        while engine.has_work():
            engine.step()
            device.now += pause
        assert sequence.generated == count(prompt, 4)
        device.now += 1000  # with overlap, a step of the sequence that has ended is still under way
    stats = engine.stats
    assert (stats.prefill_tokens, stats.prefill_s) == (6 + 7, 6 + 7)
    assert (stats.decode_tokens, stats.decode_s) == (2 * 4, 2 * 4)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["launch", "read"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_no_step_follows_one_that_failed(overlap, where, error):
    """Its tokens count as computed and are not: text that went on would be wrong."""
    engine, device = Engine(counter(), 20, 4, overlap=overlap), Device()
    launched = []

    def launch(pieces, tables):
        launched.append(device.launch(pieces, tables))
        fail(when=where == "launch")
        drawn = launched[-1]
        return SimpleNamespace(read=lambda: fail(when=where == "read") or drawn.read())

    def fail(when):
        if when and len(launched) == 5:
            raise error

    engine.runner = SimpleNamespace(launch=launch)
    sequences = [engine.add(Request([i] * 6, 20)) for i in range(3)]
    with pytest.raises(error):
        while engine.has_work():
            engine.step()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="a step has failed .* make a new Engine") as refusal:
            engine.step()
        assert "\n" not in str(refusal.value)
    for i, sequence in enumerate(sequences):  # what is known may go on in another engine
        assert 3 <= len(sequence.generated) <= 4 and not sequence.finished
        (rest,) = generate(counter(), [sequence.tokens], 20 - len(sequence.generated))
        assert sequence.generated + rest == count([i] * 6, 20)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_nan_is_said_in_a_line(overlap, compile, temperature, monkeypatch):
    """On a GPU in the replay of a graph. What was drawn until then is right."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="inductor" if DEVICE == "cuda" else "eager"))
    model, texts = make(**POSITIONS["learned"], n_embd=64).to(DEVICE), prompts(5, 5, 5)
    asked = [Request(text, 9, temperature=temperature, seed=i, logprobs=1) for i, text in enumerate(texts)]
    want = generate(model, texts, 3, temperature=temperature)
    model.pos_emb.weight.data[7] = math.nan
    engine = Engine(model, 40, PAGE, overlap=overlap, compile=compile)
    sequences = [engine.add(request) for request in asked]
    with pytest.raises(UserError, match="logits for token 9 .* not finite: .* torch.float32") as error:
        while engine.has_work():
            engine.step()
    assert "\n" not in str(error.value)
    assert [sequence.generated for sequence in sequences] == want


# Stop strings: tokens are letters, three a token for those above 25


def letters(ids):
    return b"".join(bytes([97 + id]) if id < 26 else 3 * bytes([39 + id]) for id in ids)


def stopped(prompt, stops, decode=letters, overlap=False):
    engine = Engine(counter(), 40, 4, decode=decode, overlap=overlap)
    sequence = engine.add(Request(prompt, 30, stop_strings=stops, logprobs=0))
    told = []
    while engine.has_work():
        for _, news in engine.step():
            told += news
    assert len(sequence.logprobs) == len(sequence.generated)
    assert told[: len(sequence.generated)] == sequence.generated
    return sequence


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_begin(overlap):
    whole = count([3, 4], 30)
    text = letters(whole)
    for start in range(0, 40, 3):
        for length in (1, 2, 5, 8):
            stop = text[start : start + length]
            sequence = stopped([3, 4], (stop, stop + stop), overlap=overlap)
            kept = text[: text.index(stop)]
            assert sequence.finished == "stop" and sequence.text == kept
            ids = sequence.generated
            assert ids == whole[: len(ids)] and letters(ids).startswith(kept)
            assert not ids or not letters(ids[:-1]).startswith(kept)  # no token that only belongs to the stop string


def test_the_first_of_two_stop_strings_in_one_token_ends_the_text():
    for stops in ((b"b", b"c"), (b"c", b"b")):
        sequence = Sequence(Request([3, 4], 5, stop_strings=stops))
        sequence.tokens.append(5)
        sequence.make_text(lambda ids: b"abcd" * len(ids))
        assert sequence.text == b"a" and sequence.generated == [5]


def test_a_stop_string_is_found_across_tokens_that_decode_to_nothing():
    def decode(ids):
        return bytes(97 + id % 26 for id in ids if id % 4 == 1)

    whole = count([3, 4], 30)
    stop = decode(whole)[2:5]
    assert len(stop) == 3
    sequence = stopped([3, 4], (stop,), decode)
    assert sequence.finished == "stop" and sequence.text == decode(whole)[: decode(whole).index(stop)]


@pytest.mark.parametrize("seed", range(5))
def test_the_first_token_that_completes_a_stop_string_is_found_however_many_bytes_tokens_have(seed):
    """Against a search of all of the text behind each token; most tokens are empty, or few are."""
    generator, ended = random.Random(seed), 0
    for _ in range(300):
        share = generator.choice((0.1, 0.5, 0.9))
        letter = [bytes(generator.choices(b"ab", k=generator.randrange(1, 4))) for _ in range(9)]
        letter = [b"" if generator.random() < share else text for text in letter]

        def decode(ids, letter=letter):
            return b"".join(letter[id] for id in ids)

        stops = tuple(bytes(generator.choices(b"ab", k=generator.randrange(1, 9))) for _ in range(generator.randrange(1, 4)))
        sequence = Sequence(Request([0, 1, 2, 3], 40, stop_strings=stops))
        for _ in range(40):
            sequence.tokens.append(generator.randrange(9))
            text = decode(sequence.generated)
            ends = sequence.ends_in_stop_string(decode)
            assert ends == any(stop in text for stop in stops)
            if ends:
                ended += 1
                break
    assert 100 < ended < 300


def test_looking_for_a_stop_string_decodes_only_the_end_of_the_text():
    decoded = []
    sequence = Sequence(Request([1, 2], 10**5, stop_strings=(b"zzzz", b"yy")))
    sequence.tokens += [3] * 50_000
    assert not sequence.ends_in_stop_string(lambda ids: decoded.append(len(ids)) or letters(ids))
    assert sum(decoded) == 3 + 4


def test_text_without_the_stop_string_is_whole():
    sequence = stopped([3, 4], (b"0",))
    assert sequence.finished == "length" and sequence.text == letters(count([3, 4], 30))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stop_string_that_was_half_generated_when_its_sequence_was_preempted(overlap):
    for length in range(2, 9):
        stop = letters(count([1] * 6, 20))[12 : 12 + length]
        engine = Engine(counter(), 8, 4, decode=letters, overlap=overlap)
        sequences = [engine.add(Request([1] * 6, 20, stop_strings=(stop,), seed=i)) for i in range(4)]
        while engine.has_work():
            engine.step()
            if engine.stats.preemptions < 3 and len(engine.running) > 1:
                engine.preempt_latest()
        assert engine.stats.preemptions >= 3
        text = letters(count([1] * 6, 20))
        assert [s.text for s in sequences] == [text[: text.index(stop)]] * 4


# Log-probabilities, drawing, refusals


@pytest.mark.parametrize("alternatives", [0, 2])
def test_log_probabilities_are_those_of_the_text(alternatives):
    model = make(**VARIANTS["gqa"])
    (prompt,) = prompts(9)
    engine = Engine(model, 40, PAGE)
    plain = engine.add(Request(prompt, 12, temperature=0.8, top_k=4, seed=3))
    asked = engine.add(Request(prompt, 12, temperature=0.8, top_k=4, seed=3, logprobs=alternatives))
    while engine.has_work():
        engine.step()
    assert plain.generated == asked.generated and plain.logprobs == []
    tokens = torch.tensor([prompt + asked.generated])
    with torch.no_grad():
        x = model.features(tokens, lambda layer, q, k, v, window: reference.attention(q, k, v, window))
        want = model.logits(x)[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    for row, token, (chosen, best) in zip(want, asked.generated, asked.logprobs, strict=True):
        assert chosen == pytest.approx(row[token].item(), abs=1e-3)
        assert list(best) == row.topk(alternatives).indices.tolist()
        assert list(best.values()) == pytest.approx(row.topk(alternatives).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_pages", [300, 12])
def test_a_seeded_request_draws_the_same_alone_and_among_64_others(num_pages, overlap):
    model = make(**VARIANTS["gqa"])
    texts = prompts(*(1 + i % 30 for i in range(65)))
    styles = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.5, "top_p": 0.8}]
    styles += [{}, {"temperature": 1.2, "min_p": 0.1, "top_k": 40}]
    requests = [Request(prompt, 16, seed=i, **styles[i % 5]) for i, prompt in enumerate(texts)]
    engine = Engine(model, num_pages, PAGE, overlap=overlap)
    together = [engine.add(request) for request in requests]
    while engine.has_work():
        engine.step()
    assert (engine.stats.preemptions > 0) == (num_pages == 12)
    for request, sequence in list(zip(requests, together))[:: 1 if num_pages == 300 else 13]:
        alone = finish_all(Engine(model, 6, PAGE), [request])[0].generated
        assert sequence.generated == alone
        if request.temperature:
            other = dataclasses.replace(request, seed=request.seed + 100)
            assert finish_all(Engine(model, 6, PAGE), [other])[0].generated != alone


def test_greedy_decoding_is_not_refused_and_stays_greedy_beside_drawing():
    """Greedy rows of a batch that draws stay greedy."""
    model = make()
    texts = prompts(9, 9)
    engine = Engine(model, 40, PAGE)
    greedy, _ = engine.add(Request(texts[0], 15)), engine.add(Request(texts[1], 15, temperature=1.0, top_p=0.9))
    while engine.has_work():
        engine.step()
    assert greedy.generated == recompute(model, texts[0], 15)


def test_the_number_of_a_draw_is_that_of_its_seed_and_place():
    model = counter()
    model.logits = lambda x: torch.zeros(len(x), 50)  # all alike: u alone decides
    for overlap in (False, True):
        engine = Engine(model, 20, overlap=overlap)
        sequence = finish_all(engine, [Request([3, 4], 40, temperature=1.0, seed=7)])[0]
        numbers = uniform(states_of([7] * 40), np.arange(40, dtype=np.uint64))
        assert sequence.generated == (numbers * np.float32(50)).astype(int).tolist()


@pytest.mark.parametrize("style", [{"top_k": 2**31}, {"top_k": 2**70, "top_p": 1e-300}, {"temperature": 1e300}])
@pytest.mark.filterwarnings("error")
def test_numbers_too_large_for_the_device_are_as_good_as_the_largest(style):
    model, (prompt,) = make(), prompts(10)
    largest = {"top_k": 61} if "top_k" in style else {"temperature": 1e38}
    want = generate(model, [prompt], 12, **{"temperature": 1.0, **style, **largest})
    assert generate(model, [prompt], 12, **{"temperature": 1.0, **style}) == want


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    model = counter()
    model.logits = lambda x: torch.arange(50.0).expand(len(x), 50)  # the likeliest is the last
    for temperature in (0.0, 100.0):
        engine = Engine(model, 20, vocab_size=20)
        sequence = finish_all(engine, [Request([3], 50, temperature=temperature, seed=1)])[0]
        assert max(sequence.generated) == 19


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, 50]}, r"token ids of a prompt lie in \[0, 50\), got 50"),
        ({"prompt": [-1, 2]}, "got -1"),
        ({"prompt": [1, math.nan]}, "prompt takes a list of token ids, which are whole numbers"),
        ({"prompt": [1.5, 2]}, "prompt takes a list"),
        ({"prompt": None}, "prompt takes a list"),
        ({"prompt": "ab"}, "prompt takes a list"),
        ({"prompt": np.array([1, 2])}, "prompt takes a list"),
        ({"max_new_tokens": 0}, "max_new_tokens takes 1 or more, got 0"),
        ({"max_new_tokens": 63}, "2 prompt tokens and 63 new ones are more than the 64 learned positions"),
        ({"max_new_tokens": 32}, "2 prompt tokens and 32 new ones need 9 pages of 4; num_pages is 8"),
        ({"temperature": -0.5}, "temperature takes 0 .* got -0.5"),
        ({"temperature": math.nan}, "temperature takes 0"),
        ({"temperature": "1"}, "temperature takes a number, got '1'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens takes a whole number, got 2.5"),
        ({"top_k": -1}, "top_k takes 0"),
        ({"max_new_tokens": None}, "max_new_tokens takes a whole number, got None"),
        ({"top_k": 2.5}, "top_k takes a whole number, got 2.5"),
        ({"seed": 0.5}, "seed takes a whole number, got 0.5"),
        ({"top_p": 0.0}, "top_p takes a probability"),
        ({"top_p": 1.1}, "top_p takes a probability"),
        ({"top_p": None}, "top_p takes a number, got None"),
        ({"min_p": "0"}, "min_p takes a number, got '0'"),
        ({"min_p": 1.1}, r"min_p takes a share in \[0, 1\], got 1.1"),
        ({"min_p": math.nan}, "min_p takes a share"),
        ({"logprobs": 21}, "logprobs takes None or a whole number from 0 to 20, got 21"),
        ({"logprobs": 1.5}, "logprobs takes None or a whole number from 0 to 20, got 1.5"),
        ({"stop_tokens": 5}, "stop_tokens takes a tuple of token ids"),
        ({"stop_tokens": None}, "stop_tokens takes"),
        ({"stop_tokens": (id for id in (5, 6))}, "stop_tokens takes"),
        ({"stop_tokens": b"x"}, "stop_tokens takes"),
        ({"stop_tokens": (1, np.arange(2))}, "stop_tokens takes"),
        ({"stop_strings": (b"x",)}, "stop_strings needs an Engine that was given decode"),
    ],
)
def test_a_bad_request_is_refused_alone(keys, message):
    engine = Engine(counter(), num_pages=8, page_size=4)
    good = engine.add(Request([1, 2], 31))  # 32 cached tokens: exactly the pool
    engine.step()
    with pytest.raises(ValueError, match=message) as error:
        engine.add(Request(**{"prompt": [1, 2], "max_new_tokens": 5, **keys}))
    assert "\n" not in str(error.value)
    while engine.has_work():
        engine.step()
    assert good.generated == count([1, 2], 31)


@pytest.mark.parametrize("stops", [(b"y", "x"), (b"y", b""), b"yx", b"", None, 5, (stop for stop in (b"y",))])
def test_a_wrong_stop_string_is_refused_before_it_stops_the_others(stops):
    engine = Engine(counter(), 8, 4, decode=letters)
    with pytest.raises(ValueError, match="stop_strings takes a tuple of bytes that are not empty"):
        engine.add(Request([1, 2], 5, stop_strings=stops))


@pytest.mark.filterwarnings("error")
def test_numbers_of_numpy_are_as_good_as_those_of_python():
    """The smallest kinds too, which the length of the prompt does not fit into."""
    drawing = {"max_new_tokens": 12, "top_k": 9, "seed": 3, "logprobs": 2}
    shares = {"temperature": 1.0, "top_p": 0.9, "min_p": 0.0625}
    (prompt,), texts = prompts(250), []
    for numbers in (
        {"prompt": prompt, **drawing, **shares, "stop_tokens": (60,)},
        {
            "prompt": [np.int64(id) for id in prompt],
            **{key: np.uint8(value) for key, value in drawing.items()},
            **{key: np.float64(value) for key, value in shares.items()},
            "stop_tokens": [np.int16(60)],
        },
    ):
        engine = Engine(make(**POSITIONS["rope"]), 40, PAGE)
        texts.append(finish_all(engine, [Request(**numbers)])[0].generated)
    assert texts[0] == texts[1] != []


def test_a_sequence_of_another_engine_is_left_to_its_owner():
    owner, other = Engine(counter(), 20, 4), Engine(counter(), 20, 4)
    sequences = [owner.add(Request([3, 4], 9))]
    owner.step()
    sequences.append(owner.add(Request([5], 9)))
    for sequence in sequences:  # running, and waiting
        with pytest.raises(ValueError):
            other.cancel(sequence)
    while owner.has_work():
        owner.step()
    assert [s.finished for s in sequences] == ["length"] * 2 and owner.tables.allocator.num_held == 0


@pytest.mark.parametrize(
    "keys, message", [({"vocab_size": 51}, "0 to the model's 50, got 51"), ({"vocab_size": -1}, "got -1")]
)
def test_a_vocabulary_that_the_model_lacks_is_refused(keys, message):
    with pytest.raises(ValueError, match=f"vocab_size takes .*{message}"):
        Engine(counter(), 8, **keys)


def test_a_window_below_zero_is_refused():
    with pytest.raises(ValueError, match="max_window takes 0 or more, got -1"):
        Engine(counter(), 8, max_window=-1)


def test_a_request_that_fits_exactly_is_served_whatever_the_window():
    for windows in ((0,), (1,), (4,), (5,), (6, 0), (3, 9)):
        model = counter(windows, pos="rope")
        for total in (9, 33, 60):
            pages = next(n for n in range(1, 99) if accepts(Engine(model, n, 4), total))
            engine = Engine(model, pages, 4)
            engine.runner = Device()
            sequence = engine.add(Request([1] * 7, total - 7))
            while engine.has_work():
                engine.step()
            assert sequence.generated == count([1] * 7, total - 7) and engine.stats.preemptions == 0


def accepts(engine, total):
    try:
        engine.check(Request([1] * 7, total - 7))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("key", ["num_pages", "page_size", "max_tokens_per_step", "max_num_seqs"])
def test_sizes_below_one_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} takes 1 or more, got 0"):
        Engine(counter(), **{"num_pages": 1, key: 0})


# Reports


def test_the_pool_may_be_a_share_of_the_free_memory(monkeypatch):
    monkeypatch.setattr("engine.free_memory", lambda device: 10_000)
    engine = Engine(counter((0, 0)), page_size=4, memory_fraction=0.5)
    assert engine.num_pages == 5000 // (2 * 4 * 4 * 2)  # K and V of 4 tokens, float32, 2 layers
    with pytest.raises(ValueError, match="memory_fraction=0.001 of the free memory holds no page"):
        Engine(counter(), memory_fraction=0.001)
    with pytest.raises(ValueError, match="memory_fraction takes a share"):
        Engine(counter(), memory_fraction=1.5)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_unused_share_counts_slots_without_a_token(overlap):
    engine = Engine(counter(), num_pages=20, page_size=4, overlap=overlap)
    engine.add(Request([1] * 6, 3))  # 6, 7 and 8 tokens in 2 pages
    while engine.has_work():
        engine.step()
    stats = engine.stats
    assert stats.unused_share == (2 + 1 + 0) / (3 * 8) and stats.peak_pages == 2
    assert stats.unused_share_of_reserving == 1 - (6 + 7 + 8) / (3 * 64)
    assert "prefill 6 tokens" in str(stats) and "at most 2 pages held; 12.5% of the cache" in str(stats)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("windows", [(0,), (6,), (6, 0)])
def test_counted_slots_are_those_of_the_pages(windows, overlap):
    """Behind windows, shared by samples, in texts longer than max_seq_len."""
    engine = Engine(counter(windows, pos="rope"), 200, 4, 25, overlap=overlap)
    tables, counts, count_pages = engine.tables, [], engine.count_pages

    def watched():
        filled = {
            (tables.page(sequence.row, group, position // 4), position % 4)
            for sequence in engine.running
            for group in range(len(windows))
            for position in range(sequence.row.first[group] * 4, sequence.num_computed)
        }
        held = 4 * sum(n > 0 for n in tables.allocator.holders)
        counts.append((len(filled), held, sum(max(64, s.num_computed) * len(windows) for s in engine.running)))
        count_pages()

    engine.count_pages = watched
    for prompt, new in [([5] * 22, 60)] * 3 + [([7] * 30, 9)]:
        engine.add(Request(prompt, new))
    while engine.has_work():
        engine.step()
    tokens, held, reserved = map(sum, zip(*counts))
    stats = engine.stats
    assert (stats.filled_slots, stats.held_slots, stats.reserved_slots) == (tokens, held, reserved)
    assert stats.unused_share == pytest.approx(1 - tokens / held)
    assert stats.unused_share_of_reserving == pytest.approx(1 - tokens / reserved)
    assert stats.found_tokens == 2 * 20


def test_the_peak_is_that_of_all_steps_and_not_the_last_one():
    engine = Engine(counter(), num_pages=40, page_size=4)
    for prompt, new in (([3] * 30, 3), ([4], 12)):
        engine.add(Request(prompt, new))
    held = []
    while engine.has_work():
        engine.step()
        held.append(engine.tables.allocator.num_held)
    assert engine.stats.peak_pages == 8 + 1 and held[-2] == 3


def test_windowed_layers_leave_their_pages_to_others():
    """A hybrid holds, between steps, a window for its windowed layers, and everything for the others."""
    engine = Engine(counter((6, 6, 6, 0), pos="rope"), 200, 4, overlap=False)
    engine.runner = Device()
    engine.add(Request([1] * 50, 50))
    for _ in range(45):
        engine.step()
        check_engine(engine)
    assert engine.tables.allocator.num_held == 3 * 2 + 24
