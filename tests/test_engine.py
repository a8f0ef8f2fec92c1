"""The engine against recomputing everything, its scheduler with a model that counts, drawing against plain arithmetic."""

import dataclasses
import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import Engine, PageAllocator, Request, draw, generate, uniform
from kernels import reference
from model import GPT, ModelConfig

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


def held_pages(engine):
    return [page for sequence in engine.running for page in sequence.pages]


def check_invariant(engine):
    """free + held = all, and nothing is held twice."""
    allocator, held = engine.cache.allocator, held_pages(engine)
    assert sorted(allocator.free + held) == list(range(engine.num_pages))
    assert allocator.held == set(held)
    for sequence in engine.waiting:
        assert not sequence.pages and not sequence.num_cached
    for sequence in engine.running:
        assert len(sequence.pages) == engine.cache.pages_for(sequence.num_cached)


def poison(engine):
    """NaN in every slot that holds no token, and a new order of the free pages."""
    random.Random(0).shuffle(engine.cache.allocator.free)
    unused = torch.ones(engine.num_pages * engine.cache.page_size, dtype=torch.bool)
    for sequence in engine.running:
        for position in range(sequence.num_cached):
            page, offset = sequence.pages[position // engine.cache.page_size], position % engine.cache.page_size
            unused[page * engine.cache.page_size + offset] = False
    for pages in engine.cache.k + engine.cache.v:
        pages.flatten(0, 1)[unused] = math.nan


def finish_all(engine, arrivals=(), every=1):
    """Run to the end, a new request each `every` steps. Returns their sequences."""
    sequences, arrivals, steps = [], list(arrivals), 0
    while arrivals or engine.has_work():
        if arrivals and steps % every == 0:
            sequences.append(engine.add(arrivals.pop(0)))
        poison(engine)
        engine.step()
        check_invariant(engine)
        steps += 1
    assert len(engine.cache.allocator.free) == engine.num_pages
    return sequences


# Greedy text


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_pages, budget", [(40, 2048), (9, 2048), (40, 6), (9, 6)])
def test_greedy_text_is_that_of_recomputing_everything(variant, pos, num_pages, budget):
    """With room, and with pages so few that sequences are preempted; prompts whole, and in pieces of a few tokens."""
    model = make(**VARIANTS[variant], **POSITIONS[pos])
    texts = prompts(1, PAGE - 1, PAGE, PAGE + 1, 40)
    engine = Engine(model, num_pages, PAGE, budget)
    sequences = finish_all(engine, [Request(prompt, 20) for prompt in texts], every=3)
    want = [recompute(model, prompt, 20) for prompt in texts]
    assert [sequence.generated for sequence in sequences] == want
    assert len({tuple(text) for text in want}) == 5 and min(len(set(text)) for text in want) > 5
    assert (engine.stats.preemptions > 0) == (num_pages == 9)


def test_variants_and_positions_write_different_texts():
    """Otherwise the test above could not tell a window that is ignored."""
    (prompt,) = prompts(40)
    texts = {tuple(recompute(make(**v, **p), prompt, 20)) for v in VARIANTS.values() for p in POSITIONS.values()}
    assert len(texts) == len(VARIANTS) * len(POSITIONS)


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_any_page_size(page_size):
    model = make(**VARIANTS["hybrid"])
    texts = prompts(2, 20)
    engine = Engine(model, 130, page_size)
    sequences = finish_all(engine, [Request(prompt, 12) for prompt in texts])
    assert [sequence.generated for sequence in sequences] == [recompute(model, prompt, 12) for prompt in texts]


def test_generate_continues_all_prompts():
    model = make()
    texts = prompts(3, 17)
    want = [recompute(model, prompt, 10) for prompt in texts]
    assert generate(model, texts, 10) == want
    assert generate(model, texts, 10, stop_tokens=(want[0][4],))[0] == want[0][: want[0].index(want[0][4])]


def test_max_window_is_a_window_on_every_layer():
    keys = {"pos": "rope", "max_seq_len": 16}
    model, windowed = make(**keys), make(**keys, attention="swa", window=16)
    (prompt,) = prompts(30)
    sequences = finish_all(Engine(model, 20, PAGE, max_window=16), [Request(prompt, 20)])
    assert sequences[0].generated == recompute(windowed, prompt, 20) != recompute(model, prompt, 20)
    hybrid = make(**keys, **VARIANTS["hybrid"])  # a narrower window stays
    sequences = finish_all(Engine(hybrid, 20, PAGE, max_window=64), [Request(prompt, 20)])
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


# Scheduling, with a model that counts: after token t at position p comes (t + p) % 50


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(n_layer=1, n_kv_head=1, head_dim=1, vocab_size=50, max_seq_len=64, pos="learned")
        self.weight = nn.Parameter(torch.zeros(1))

    def features(self, tokens, attend, positions):
        return torch.stack([tokens[0], positions], dim=-1)[None]

    def logits(self, x):
        return nn.functional.one_hot(x.sum(dim=-1) % 50, 50).float()


def count(prompt, max_new_tokens):
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append((tokens[-1] + len(tokens) - 1) % 50)
    return tokens[len(prompt) :]


def test_random_operations_keep_the_invariant():
    generator = random.Random(0)
    engine = Engine(Counter(), num_pages=20, page_size=4, max_tokens_per_step=25)
    sequences = []
    for _ in range(5000):
        action = generator.random()
        if action < 0.3:
            prompt = [generator.randrange(50) for _ in range(generator.randrange(1, 40))]
            sequences.append(engine.add(Request(prompt, generator.randrange(1, 24))))
        elif action < 0.35 and sequences:
            engine.finish(generator.choice(sequences), "cancelled")
        else:
            engine.step()
        check_invariant(engine)
    while engine.has_work():
        engine.step()
    assert engine.stats.preemptions > 100 and len(sequences) > 1000
    assert len(engine.cache.allocator.free) == 20 and engine.stats.peak_pages == 20
    reasons = {"length": 0, "cancelled": 0}
    for sequence in sequences:
        reasons[sequence.finished] += 1
        whole = count(sequence.request.prompt, sequence.request.max_new_tokens)
        assert sequence.generated == whole[: len(sequence.generated)]
        assert sequence.finished == "cancelled" or sequence.generated == whole
    assert min(reasons.values()) > 50


def test_a_page_given_back_twice_is_an_error():
    allocator = PageAllocator(3)
    pages = allocator.take(2)
    allocator.give_back(pages)
    with pytest.raises(KeyError):
        allocator.give_back(pages[:1])


def test_first_come_first_served_and_the_latest_leaves_first():
    engine = Engine(Counter(), num_pages=8, page_size=4)
    sequences = [engine.add(Request([i] * 6, 20)) for i in range(5)]
    ended, cached = [], 0
    while engine.has_work():
        engine.step()
        waiting = list(engine.waiting)
        assert engine.running + waiting == [s for s in sequences if not s.finished]  # in order of arrival
        assert sequences[0].finished or sequences[0].num_cached > cached  # the oldest never loses a token
        cached = sequences[0].num_cached
        ended += [s for s in sequences if s.finished and s not in ended]
    assert ended == sequences and engine.stats.preemptions > 0


def test_a_long_prompt_comes_in_pieces_and_stalls_nobody():
    engine = Engine(Counter(), num_pages=100, page_size=4, max_tokens_per_step=10)
    first = engine.add(Request([1], 30))
    engine.step()
    long = engine.add(Request([2] * 50, 3))
    for step in range(1, 7):  # 9 tokens of the prompt a step, beside the first sequence's one
        news = engine.step()
        assert len(first.generated) == 1 + step
        assert long.num_cached == min(50, 9 * step)
        assert (long in dict(news)) == (step == 6)


def test_a_step_keeps_to_its_token_budget():
    engine = Engine(Counter(), num_pages=100, page_size=4, max_tokens_per_step=10)
    sequences = [engine.add(Request([1] * 6, 3)) for _ in range(3)]
    engine.step()
    assert [sequence.num_cached for sequence in sequences] == [6, 4, 0]
    engine.step()
    assert [sequence.num_cached for sequence in sequences] == [7, 6, 6]


def test_a_step_reports_what_is_new():
    engine = Engine(Counter(), num_pages=10, page_size=4)
    stop = count([3, 4], 3)[-1]
    stopped, other = engine.add(Request([3, 4], 9, stop_tokens=(stop,))), engine.add(Request([7], 2))
    assert engine.step() == [(stopped, [5]), (other, [7])]
    assert engine.step() == [(stopped, [count([3, 4], 2)[1]]), (other, [count([7], 2)[1]])]
    assert other.finished == "length"
    assert engine.step() == [(stopped, [])]
    assert stopped.finished == "stop" and stopped.generated == count([3, 4], 2)
    assert not engine.has_work() and engine.step() == []
    assert (engine.stats.prefill_tokens, engine.stats.decode_tokens) == (2, 3)


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    model = Counter()
    model.logits = lambda x: torch.arange(50.0).expand(len(x), 50)  # the likeliest is the last
    for temperature in (0.0, 100.0):
        engine = Engine(model, 20, vocab_size=20)
        sequence = finish_all(engine, [Request([3], 50, temperature=temperature, seed=1)])[0]
        assert max(sequence.generated) == 19


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, 50]}, r"token ids lie in \[0, 50\), got 50"),
        ({"prompt": [-1, 2]}, "got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens takes 1 or more, got 0"),
        ({"max_new_tokens": 63}, "2 prompt tokens and 63 new ones are more than the 64 learned positions"),
        ({"max_new_tokens": 32}, "2 prompt tokens and 32 new ones need 9 pages of 4; num_pages is 8"),
        ({"temperature": -0.5}, "temperature takes 0 .* got -0.5"),
        ({"temperature": math.nan}, "temperature takes 0"),
        ({"top_k": -1}, "top_k takes 0"),
        ({"top_p": 0.0}, "top_p takes a probability"),
        ({"top_p": 1.1}, "top_p takes a probability"),
    ],
)
def test_a_bad_request_is_refused_alone(keys, message):
    engine = Engine(Counter(), num_pages=8, page_size=4)
    good = engine.add(Request([1, 2], 31))  # 32 cached tokens: exactly the pool
    engine.step()
    with pytest.raises(ValueError, match=message) as error:
        engine.add(Request(**{"prompt": [1, 2], "max_new_tokens": 5, **keys}))
    assert "\n" not in str(error.value)
    while engine.has_work():
        engine.step()
    assert good.generated == count([1, 2], 31)


@pytest.mark.parametrize("key", ["num_pages", "page_size", "max_tokens_per_step"])
def test_sizes_below_one_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} takes 1 or more, got 0"):
        Engine(Counter(), **{"num_pages": 1, key: 0})


# Drawing


@pytest.mark.parametrize("num_pages", [200, 12])
def test_neighbours_and_preemption_change_no_draw(num_pages):
    model = make(**VARIANTS["gqa"])
    texts = prompts(*range(1, 31))
    styles = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.5, "top_p": 0.8}, {}]
    requests = [Request(prompt, 16, seed=i, **styles[i % 4]) for i, prompt in enumerate(texts)]
    engine = Engine(model, num_pages, PAGE)
    together = [sequence.generated for sequence in finish_all(engine, requests)]
    assert (engine.stats.preemptions > 0) == (num_pages == 12)
    for request, text in zip(requests, together):
        alone = finish_all(Engine(model, 6, PAGE), [request])[0].generated
        assert text == alone
        if request.temperature:
            other = dataclasses.replace(request, seed=request.seed + 100)
            assert finish_all(Engine(model, 6, PAGE), [other])[0].generated != alone


def test_the_number_of_a_draw_is_that_of_its_seed_and_place():
    model = Counter()
    model.logits = lambda x: torch.zeros(len(x), 50)  # all alike: u alone decides
    sequence = finish_all(Engine(model, 20), [Request([3, 4], 40, temperature=1.0, seed=7)])[0]
    assert sequence.generated == [int(uniform(7, index) * 50) for index in range(40)]


LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0, 2.0, -math.inf, 1.5])


def shares(n=4000, **style):
    """How often each token is drawn when u runs over the unit interval in equal steps."""
    request = Request([0], 1, **style)
    tokens = draw(LOGITS.expand(n, -1), [request] * n, [(i + 0.5) / n for i in range(n)])
    return torch.bincount(tokens, minlength=len(LOGITS)) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 1e-6])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_k, top_p):
    weights = [math.exp(logit / temperature) for logit in LOGITS.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    kept, mass = [], 0.0
    for i in order:  # the fewest that reach top_p of what top_k leaves
        if mass < top_p * sum(weights[j] for j in order):
            kept.append(i)
        mass += weights[i]
    want = [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(weights))]
    got = shares(temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=2 / 4000)


def test_rows_of_a_batch_keep_their_own_limits():
    styles = [{}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.7}, {"temperature": 0.0}, {"temperature": 9.0}]
    requests = [Request([0], 1, **{"temperature": 1.0, **style}) for style in styles]
    for u in torch.linspace(0, 0.999, 50).tolist():
        together = draw(LOGITS.expand(len(requests), -1), requests, [u] * len(requests)).tolist()
        assert together == [draw(LOGITS[None], [request], [u]).item() for request in requests]


def test_temperature_0_is_greedy_and_the_extremes_hold():
    for style in ({}, {"top_k": 3}, {"top_p": 0.1}):
        assert shares(temperature=0.0, **style)[1] == 1
    assert shares(temperature=1e-30)[1] == 1
    logits = torch.cat([LOGITS, LOGITS * 1e20, LOGITS])[None]  # huge ones, and ends that top_k cuts off
    for temperature in (1e-30, 1.0, 1e30):
        for u in (0.0, 1 - 2**-23):
            assert draw(logits, [Request([0], 1, temperature=temperature, top_k=3)], [u]).item() in (9, 11, 13)


def test_the_highest_uniform_never_reaches_the_total():
    highest = torch.tensor(1 - 2**-23)
    totals = torch.cat([torch.linspace(0.9, 2.1, 100_001), torch.tensor([1.0, 1 + 2**-23, 1 - 2**-24, 2 - 2**-23])])
    assert (highest * totals < totals).all()


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_index():
    numbers = torch.tensor([[uniform(seed, index) for index in range(200)] for seed in range(-100, 100)])
    assert numbers.min() >= 0 and numbers.max() < 1 and (numbers.double() * 2**23 % 1 == 0).all()
    counts = torch.histc(numbers, bins=64, min=0, max=1)
    expected = numbers.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 103.4  # chi-square, 63 degrees of freedom: 0.1%
    assert abs(torch.corrcoef(numbers[:, :2].T)[0, 1]) < 0.25 and abs(torch.corrcoef(numbers[:2])[0, 1]) < 0.25
    assert uniform(1, 23) != uniform(12, 3)
