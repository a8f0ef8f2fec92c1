"""Decoding over a paged KV cache: token ids in, token ids out, many sequences at once.

    add -> waiting -> running -> finished      One step:  schedule     which sequences compute how many tokens
              ^          |                                run          pack them, forward pass, draw tokens
              +----------+                                postprocess  append what was drawn, let go what has ended
        preempted: out of pages

K and V of all tokens so far are kept, because every new token looks at them. They are kept in pages of a few tokens,
taken from one pool when they are needed, so that no memory is reserved for text that may never come (PagedAttention,
Kwon et al. 2023, section 4). Sequences enter and leave between any two steps, so none waits for another to end
(iteration-level scheduling: Yu et al. 2022, Orca, section 3).

The tokens of a step are packed into one row (1, N) without padding, some sequences giving one token and some a piece
of their prompt. Only attention can tell them apart, so the model runs as in training, with `PagedKVCache.attend` in
place of the dense kernel:

    model.features(tokens, attend, positions) -> layer: q, k, v -> k, v into slot_mapping -> attention over pages

`model` is anything with .config, .parameters(), .features and .logits. A chunk of prompt, the rest of a prompt after
a chunk, a decoded token and a preempted sequence that computes all its tokens again are one case: tokens whose K and V
are not cached yet.
"""

import hashlib
import time
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch

from kernels import paged_sdpa, reference


@dataclass(frozen=True)
class Request:
    """What to continue, and how to draw. `Engine.add` checks it."""

    prompt: list[int]  # token ids
    max_new_tokens: int
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # draw among the k likeliest tokens; 0: no limit
    top_p: float = 1.0  # draw among the fewest likeliest tokens that have this probability together
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()  # one of these ends the sequence and is not part of it


class Sequence:
    """A request on its way."""

    def __init__(self, request):
        self.request = request
        self.tokens = list(request.prompt)  # and what was generated
        self.pages = []  # page ids: pages[j] holds the positions j * page_size and following
        self.num_cached = 0  # tokens whose K and V are in the pages
        self.finished = ""  # why: "length", "stop" or "cancelled"

    @property
    def generated(self):
        return self.tokens[len(self.request.prompt) :]


class PageAllocator:
    """Page ids 0 to num_pages - 1, each of them free or held, never both."""

    def __init__(self, num_pages):
        self.free = list(range(num_pages))
        self.held = set()

    def take(self, count):
        """`count` free pages; the caller has made sure that there are so many."""
        pages = [self.free.pop() for _ in range(count)]
        self.held.update(pages)
        return pages

    def give_back(self, pages):
        for page in pages:
            self.held.remove(page)  # a page that is given back twice is a KeyError here
            self.free.append(page)


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, packed: sequence i has the rows cu_seqlens[i] up to cu_seqlens[i + 1]."""

    tokens: torch.Tensor  # (1, N) ids
    positions: torch.Tensor  # (N,) in their sequences
    slot_mapping: torch.Tensor  # (N,) where their K and V go
    page_table: torch.Tensor  # (num_seqs, max_pages) int32
    seq_lens: torch.Tensor  # (num_seqs,) int32 on the host: tokens in the cache, those of this step included
    cu_seqlens: torch.Tensor  # (num_seqs + 1,) int32 on the host


class PagedKVCache:
    """K and V of all layers in one pool of pages, and who holds which page.

    num_pages x page_size tokens; each takes 2 * n_kv_head * head_dim * bytes a layer. max_window as for `Engine`.
    """

    def __init__(self, config, num_pages, page_size, max_window, dtype, device):
        self.page_size = page_size
        self.max_window = max_window
        shape = (num_pages, page_size, config.n_kv_head, config.head_dim)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.allocator = PageAllocator(num_pages)

    def pages_for(self, num_tokens):
        return -(-num_tokens // self.page_size)

    def reserve(self, sequence, num_tokens):
        """Let the sequence hold pages for its first num_tokens tokens. Returns False when there are too few."""
        missing = self.pages_for(num_tokens) - len(sequence.pages)
        if missing > len(self.allocator.free):
            return False
        sequence.pages += self.allocator.take(missing)
        return True

    def release(self, sequence):
        self.allocator.give_back(sequence.pages)
        sequence.pages = []
        sequence.num_cached = 0

    def batch(self, scheduled):
        """Pack [(sequence, n), ...]: the next n tokens of each, whose pages are reserved."""
        device = self.k[0].device
        tokens, positions, slots, seq_lens, cu_seqlens = [], [], [], [], [0]
        for sequence, n in scheduled:
            span = range(sequence.num_cached, sequence.num_cached + n)
            tokens += sequence.tokens[span.start : span.stop]
            positions += span
            slots += [sequence.pages[p // self.page_size] * self.page_size + p % self.page_size for p in span]
            seq_lens.append(span.stop)
            cu_seqlens.append(len(tokens))
        max_pages = max(len(sequence.pages) for sequence, _ in scheduled)
        table = [sequence.pages + [0] * (max_pages - len(sequence.pages)) for sequence, _ in scheduled]
        return Batch(
            tokens=torch.tensor([tokens], device=device),
            positions=torch.tensor(positions, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            page_table=torch.tensor(table, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        )

    def attend(self, batch, layer, q, k, v, window):
        """The `attend` of a step, once it is bound to its batch: q (1, N, H, D), k and v (1, N, H_kv, D) to (1, N, H, D)."""
        if self.max_window:
            window = min(window or self.max_window, self.max_window)
        pages = self.k[layer], self.v[layer]
        reference.write_pages(k[0], v[0], *pages, batch.slot_mapping)
        lengths = batch.seq_lens, batch.cu_seqlens
        return paged_sdpa.paged_attention(q[0], *pages, batch.page_table, *lengths, window)[None]


@dataclass
class Stats:
    """What the engine did since it was made. A step with any piece of a prompt in it counts as prefill."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    preemptions: int = 0
    peak_pages: int = 0


class Engine:
    """Continues requests, as many at once as the pool of pages takes, first come, first served.

    model:               in evaluation mode; its parameters give dtype and device of the cache
    num_pages:           the pool, in pages of page_size tokens
    max_tokens_per_step: a longer prompt is computed in pieces, beside the sequences that already decode
    vocab_size:          ids from here on are neither taken nor drawn (padding of the vocabulary); 0: the model's
    max_window:          keys that any layer sees at most; 0: as the layer says

    With RoPE, text may outgrow max_seq_len. Windowed layers do not notice, but a global layer then sees distances that
    it was never trained on, and the text falls apart; max_window = max_seq_len keeps it in shape by forgetting what is
    farther away. With learned positions such a request is refused.
    """

    def __init__(self, model, num_pages, page_size=16, max_tokens_per_step=2048, vocab_size=0, max_window=0):
        sizes = {"num_pages": num_pages, "page_size": page_size, "max_tokens_per_step": max_tokens_per_step}
        for key, value in sizes.items():
            if value < 1:
                raise ValueError(f"{key} takes 1 or more, got {value}")
        self.model = model
        self.num_pages = num_pages
        self.max_tokens_per_step = max_tokens_per_step
        self.vocab_size = vocab_size or model.config.vocab_size
        weight = next(model.parameters())
        self.cache = PagedKVCache(model.config, num_pages, page_size, max_window, weight.dtype, weight.device)
        self.waiting = deque()
        self.running = []  # in order of arrival; all of them came before those who wait
        self.stats = Stats()

    def add(self, request):
        """Queue a request. Returns its Sequence; raises ValueError, with one line, when it could never be served."""
        self.check(request)
        sequence = Sequence(request)
        self.waiting.append(sequence)
        return sequence

    def check(self, request):
        config, prompt = self.model.config, request.prompt
        if not prompt:
            raise ValueError("the prompt is empty; it takes at least one token")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < self.vocab_size)
            raise ValueError(f"token ids lie in [0, {self.vocab_size}), got {wrong}")
        for key, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if not getattr(request, key) >= least:  # NaN is not
                raise ValueError(f"{key} takes {least} or more, got {getattr(request, key)}")
        if not 0 < request.top_p <= 1:
            raise ValueError(f"top_p takes a probability in (0, 1], got {request.top_p}")
        total = len(prompt) + request.max_new_tokens
        lengths = f"{len(prompt)} prompt tokens and {request.max_new_tokens} new ones"
        if config.pos == "learned" and total > config.max_seq_len:
            raise ValueError(f"{lengths} are more than the {config.max_seq_len} learned positions (max_seq_len)")
        pages = self.cache.pages_for(total - 1)  # nobody looks at the last token, so it is never cached
        if pages > self.num_pages:
            raise ValueError(f"{lengths} need {pages} pages of {self.cache.page_size}; num_pages is {self.num_pages}")

    def has_work(self):
        return bool(self.waiting or self.running)

    def step(self):
        """One pass of the model. Returns [(sequence, its new tokens), ...] for the sequences that drew a token; the
        new tokens are empty when that was a stop token. A sequence that has ended says why in `.finished`."""
        start = time.perf_counter()
        scheduled = self.schedule()
        if not scheduled:
            return []
        self.stats.peak_pages = max(self.stats.peak_pages, len(self.cache.allocator.held))
        news = self.postprocess(scheduled, self.run(scheduled))
        seconds = time.perf_counter() - start
        prompt_tokens = sum(n for _, n in scheduled if n > 1)
        if prompt_tokens:
            self.stats.prefill_tokens += prompt_tokens
            self.stats.prefill_s += seconds
        else:
            self.stats.decode_tokens += len(news)
            self.stats.decode_s += seconds
        return news

    def schedule(self):
        """Choose this step's work, [(sequence, number of tokens), ...], and reserve its pages.

        Running sequences go first. When pages run out, the one that came last gives all of its pages back and waits,
        to compute its tokens again later: so the oldest always gets on, and every sequence is the oldest some day.
        """
        scheduled, budget, index = [], self.max_tokens_per_step, 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            n = min(len(sequence.tokens) - sequence.num_cached, budget)
            if self.cache.reserve(sequence, sequence.num_cached + n):
                scheduled.append((sequence, n))
                budget -= n
                index += 1
            else:
                self.preempt_latest()  # perhaps this very sequence: then the loop ends
        while self.waiting and budget:
            sequence = self.waiting[0]
            if self.cache.pages_for(len(sequence.tokens)) > len(self.cache.allocator.free):
                break  # nobody overtakes: those behind need not starve the first
            n = min(len(sequence.tokens), budget)
            self.cache.reserve(sequence, n)
            self.running.append(self.waiting.popleft())
            scheduled.append((sequence, n))
            budget -= n
        return scheduled

    def preempt_latest(self):
        sequence = self.running.pop()
        self.cache.release(sequence)
        self.waiting.appendleft(sequence)
        self.stats.preemptions += 1

    @torch.inference_mode()
    def run(self, scheduled):
        """Compute the scheduled tokens. Returns one drawn id for each sequence that has no more tokens to compute."""
        batch = self.cache.batch(scheduled)
        complete = [s.num_cached + n == len(s.tokens) for s, n in scheduled]
        x = self.model.features(batch.tokens, partial(self.cache.attend, batch), batch.positions)  # (1, N, n_embd)
        if not any(complete):
            return []
        last_rows = batch.cu_seqlens[1:][torch.tensor(complete)] - 1  # only their logits are needed
        logits = self.model.logits(x[0, last_rows.to(x.device)])[:, : self.vocab_size].float()
        drawing = [s for (s, _), is_complete in zip(scheduled, complete) if is_complete]
        uniforms = [uniform(s.request.seed, len(s.generated)) for s in drawing]
        return draw(logits, [s.request for s in drawing], uniforms).tolist()

    def postprocess(self, scheduled, drawn):
        """Append the drawn tokens in order and let go of the sequences that have ended."""
        news, drawn = [], iter(drawn)
        for sequence, n in scheduled:
            sequence.num_cached += n
            if sequence.num_cached < len(sequence.tokens):
                continue  # a piece of a prompt; the rest comes in the next step
            token, request = next(drawn), sequence.request
            if token in request.stop_tokens:
                news.append((sequence, []))
                self.finish(sequence, "stop")
                continue
            news.append((sequence, [token]))
            sequence.tokens.append(token)
            if len(sequence.generated) == request.max_new_tokens:
                self.finish(sequence, "length")
        return news

    def finish(self, sequence, why):
        """Take a sequence out, waiting or running, between steps: "cancelled" is for callers. No-op when it has ended."""
        if sequence.finished:
            return
        sequence.finished = why
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.cache.release(sequence)


def generate(model, prompts, max_new_tokens, page_size=16, vocab_size=0, stop_tokens=(), seed=0, **drawing):
    """Continue lists of ids, all at once. Returns the lists of new ids.

    drawing: temperature, top_k, top_p of `Request`; prompt i draws with seed + i

    The model must be in evaluation mode, and autocast off. Raises ValueError as `Engine.add` does.
    """
    num_pages = sum(-(-(len(prompt) + max_new_tokens) // page_size) for prompt in prompts)
    engine = Engine(model, num_pages, page_size, vocab_size=vocab_size)
    sequences = [
        engine.add(Request(prompt, max_new_tokens, seed=seed + i, stop_tokens=stop_tokens, **drawing))
        for i, prompt in enumerate(prompts)
    ]
    while engine.has_work():
        engine.step()
    return [sequence.generated for sequence in sequences]


# Drawing tokens. One uniform number a token decides, and it depends on nothing but the request's seed and how many
# tokens it has generated: neither neighbours nor preemption can change a draw.


def uniform(seed, index):
    """A number in [0, 1): a hash of (seed, index), with 23 bits, so that u * x < x in float32 for every x > 0."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") >> 9) / 2**23


def draw(logits, requests, uniforms):
    """Draw one token a row by inverting the cumulative distribution.

    logits: (n, vocab) float32; requests, uniforms: lists of n

    Returns (n,) ids. Tokens exactly as likely as the last one that top_k or top_p lets in are let in too.
    """
    greedy = logits.argmax(dim=-1)
    if not any(r.temperature for r in requests):
        return greedy
    temperature = torch.tensor([[r.temperature] for r in requests], device=logits.device)  # (n, 1)
    logits = logits / temperature.clamp(min=1e-6)  # below that it is as good as greedy, and would overflow
    if any(r.top_k or r.top_p < 1 for r in requests):
        logits = logits.masked_fill(logits < least_logit(logits, requests), float("-inf"))
    cdf = logits.softmax(dim=-1).cumsum(dim=-1)
    target = torch.tensor(uniforms, device=logits.device)[:, None] * cdf[:, -1:]  # rounding keeps the last from being 1
    drawn = torch.searchsorted(cdf, target, right=True)  # the first token whose cumulative probability is above it
    return torch.where(temperature == 0, greedy[:, None], drawn)[:, 0]


def least_logit(logits, requests):
    """The smallest logit let in by top_k, and by top_p of what top_k leaves: (n, vocab) to (n, 1), -inf without limits.

    Source of top_p: Holtzman et al. 2020, section 3.1.
    """
    vocab = logits.shape[1]
    top_k = [min(r.top_k or vocab, vocab) for r in requests]
    limited = [k < vocab or r.top_p < 1 for k, r in zip(top_k, requests)]
    width = max((k for k, row_is_limited in zip(top_k, limited) if row_is_limited), default=1)
    best = logits.topk(width).values  # (n, width), descending: no more are put in order than some row needs

    def column(values):
        return torch.tensor(values, device=logits.device)[:, None]

    kept = torch.arange(width, device=logits.device) < column(top_k)
    probs = best.masked_fill(~kept, float("-inf")).softmax(dim=-1)
    kept &= probs.cumsum(dim=-1) - probs < column([r.top_p for r in requests])  # those before are not yet top_p
    least = best.gather(1, kept.sum(dim=-1, keepdim=True) - 1)
    return least.masked_fill(~column(limited), float("-inf"))
