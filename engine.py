"""Decoding over a paged KV cache: token ids in, token ids out, many sequences at once.

    add -> waiting -> running -> finished      One step:  schedule     which sequences compute how many tokens
              ^          |                                launch       the device packs, computes and draws them
              +----------+                                postprocess  append what was drawn, let go what has ended
        preempted: out of pages

K and V of all tokens so far are kept, because every new token looks at them. They are kept in pages of a few tokens,
taken from one pool when they are needed, so that no memory is reserved for text that may never come (PagedAttention,
Kwon et al. 2023, section 4). Sequences enter and leave between any two steps, so none waits for another to end
(iteration-level scheduling: Yu et al. 2022, Orca, section 3), and a long prompt is computed in pieces beside those that
decode, so none waits for a prompt either.

A piece of prompt, the rest of one behind what was found in the cache, a decoded token and a preempted sequence that
computes all its tokens again are one case: tokens whose K and V are not cached yet.

On a GPU two steps are under way: step n + 1 is scheduled and launched while step n runs, before anyone knows what it
draws. So a sequence may have a token `pending`: drawn, but read only after the next step is launched, which finds it on
the device. Whoever turns out to have ended has computed one token too many, which is thrown away.

`paging` says who holds which page, `runner` computes, `sampling` draws. The model is anything with .config,
.parameters(), .features and .logits, and .compile_for_decoding for `compile`.
"""

import time
from collections import deque
from dataclasses import dataclass
from numbers import Integral, Real

from config import UserError
from paging import PageTables, most_pages, page_groups, pages_for
from runner import Piece, Runner, free_memory, page_bytes
from sampling import ALTERNATIVES
from sequence import Request, Sequence

STEP_TOKENS = 2048  # that a step computes at most, unless an Engine is told otherwise


@dataclass
class Stats:
    """What the engine did since it was made. A step in which a sequence computes several tokens counts as prefill.

    The time of a step ends when it is read. It begins when the one before it was read, or, where no step was under way
    any more, with its own launch: so the times of all steps add up to that on the clock, but for pauses without work.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    preemptions: int = 0
    found_tokens: int = 0  # of prompts and preempted sequences, found in the cache instead of computed
    peak_pages: int = 0
    # A slot takes K and V of a token, for one group of layers. Slots are summed over steps.
    held_slots: int = 0  # of held pages; sequences that share a page hold it once
    unused_slots: int = 0  # those of them that hold no token
    reserved_slots: int = 0  # had each running sequence max_seq_len in each group, or its length if that is more

    @property
    def filled_slots(self):
        """Held ones with a token in them."""
        return self.held_slots - self.unused_slots

    @property
    def unused_share(self):
        """The share of held cache memory that no token used, over all steps."""
        return self.unused_slots / max(1, self.held_slots)

    @property
    def unused_share_of_reserving(self):
        """The same, had each running sequence reserved memory for max_seq_len tokens."""
        return 1 - self.filled_slots / max(1, self.reserved_slots)

    def __str__(self):
        rates = (("prefill", self.prefill_tokens, self.prefill_s), ("decode", self.decode_tokens, self.decode_s))
        parts = [f"{name} {count} tokens, {count / seconds:,.0f} tokens/s" for name, count, seconds in rates if count]
        parts.append(f"at most {self.peak_pages} page{'s' * (self.peak_pages != 1)} held")
        unused = f"{self.unused_share:.1%} of the cache memory held was empty"
        parts.append(f"{unused} ({self.unused_share_of_reserving:.1%} if each sequence reserved max_seq_len)")
        parts += [f"{self.found_tokens} tokens found in the cache"] if self.found_tokens else []
        parts += [f"{self.preemptions} preemptions"] if self.preemptions else []
        return "; ".join(parts)


class Engine:
    """Continues requests, as many at once as the pool of pages takes, first come, first served. Several samples of a prompt
    are as many requests with other seeds, which share its full pages.

    model:               in evaluation mode; its parameters give dtype and device of the cache
    num_pages:           the pool, in pages of page_size tokens of a group of layers (one group, unless windowed and
                         global layers mix: see `paging`); None: what fits into memory_fraction of the free memory
    max_tokens_per_step: a longer prompt is computed in pieces, beside the sequences that already decode
    vocab_size:          ids from here on are neither taken nor drawn (padding of the vocabulary); 0: the model's
    max_window:          keys that any layer sees at most; 0: as the layer says
    max_num_seqs:        sequences that run at once, at most
    decode:              ids to bytes of text; only stop strings and `Sequence.text` need it
    attention:           "auto", "triton", "sdpa" or "reference", as in `runner.Runner`
    overlap:             launch a step before the one before it is read; None: on CUDA
    graphs:              replay decode steps as CUDA graphs, where attention is Triton's
    compile:             fuse what lies around attention, and drawing; half a minute at first, for each shape of model

    With RoPE, text may outgrow max_seq_len. Windowed layers do not notice, but a global layer then sees distances that
    it was never trained on, and the text falls apart; max_window = max_seq_len keeps it in shape by forgetting what is
    farther away. With learned positions such a request is refused.
    """

    def __init__(
        self,
        model,
        num_pages=None,
        page_size=16,
        max_tokens_per_step=STEP_TOKENS,
        vocab_size=0,
        max_window=0,
        *,
        max_num_seqs=256,
        memory_fraction=0.8,
        decode=None,
        attention="auto",
        overlap=None,
        graphs=True,
        compile=False,
    ):
        sizes = {"num_pages": num_pages, "page_size": page_size, "max_tokens_per_step": max_tokens_per_step}
        for key, value in (sizes | {"max_num_seqs": max_num_seqs}).items():
            if value is not None and value < 1:
                raise ValueError(f"{key} takes 1 or more, got {value}")
        if not 0 <= vocab_size <= model.config.vocab_size:
            raise ValueError(f"vocab_size takes 0 to the model's {model.config.vocab_size}, got {vocab_size}")
        if max_window < 0:
            raise ValueError(f"max_window takes 0 or more, got {max_window}")
        if not 0 < memory_fraction <= 1:
            raise ValueError(f"memory_fraction takes a share in (0, 1], got {memory_fraction}")
        self.model, self.decode = model, decode
        self.max_tokens_per_step = max_tokens_per_step
        self.vocab_size = vocab_size or model.config.vocab_size
        weight = next(model.parameters())
        groups = groups_of(model.config, max_window)
        if num_pages is None:
            size = page_bytes(model.config, groups, page_size, weight.dtype)
            num_pages = int(free_memory(weight.device) * memory_fraction) // size
            if num_pages < 1:
                raise ValueError(f"memory_fraction={memory_fraction} of the free memory holds no page of {size} bytes")
        self.num_pages = num_pages
        pool = {"groups": groups, "num_pages": num_pages, "page_size": page_size, "max_num_seqs": max_num_seqs}
        how = {"attention": attention, "graphs": graphs, "compile": compile}
        self.runner = Runner(model, **pool, vocab_size=self.vocab_size, **how)
        self.tables = PageTables(**pool, max_tokens_per_step=max_tokens_per_step, max_seq_len=model.config.max_seq_len)
        self.depth = 1 + (weight.device.type == "cuda" if overlap is None else overlap)  # steps under way
        self.waiting = deque()
        self.running = []  # in order of arrival; all of them came before those who wait
        self.launched = deque()  # steps: (their pieces, what they draw)
        self.read_at = 0.0  # when the last step was read
        self.stepping = False  # True within `step`, and for good after one has failed
        self.stats = Stats()

    def add(self, request):
        """Queue a request. Returns its Sequence; raises ValueError, with one line, when it could never be served."""
        self.check(request)
        sequence = Sequence(request)
        self.waiting.append(sequence)
        return sequence

    def check(self, request):
        """Raise ValueError, with one line, unless the request can be served. Whatever passes may fail no step: that would
        end all the others, too."""
        config, prompt = self.model.config, request.prompt
        if not isinstance(prompt, (list, tuple)) or not whole(prompt):
            raise ValueError("prompt takes a list of token ids, which are whole numbers")
        if not prompt:
            raise ValueError("the prompt is empty; it takes at least one token")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < self.vocab_size)
            raise ValueError(f"token ids of a prompt lie in [0, {self.vocab_size}), got {wrong}")
        for key in ("max_new_tokens", "top_k", "seed"):
            if not whole([getattr(request, key)]):
                raise ValueError(f"{key} takes a whole number, got {getattr(request, key)!r}")
        for key in ("temperature", "top_p", "min_p"):
            real = isinstance(getattr(request, key), Real)
            if not real:
                raise ValueError(f"{key} takes a number, got {getattr(request, key)!r}")
        for key, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if not getattr(request, key) >= least:  # NaN is not
                raise ValueError(f"{key} takes {least} or more, got {getattr(request, key)}")
        if not 0 < request.top_p <= 1:
            raise ValueError(f"top_p takes a probability in (0, 1], got {request.top_p}")
        if not 0 <= request.min_p <= 1:
            raise ValueError(f"min_p takes a share in [0, 1], got {request.min_p}")
        if request.logprobs is not None and not (whole([request.logprobs]) and 0 <= request.logprobs <= ALTERNATIVES):
            raise ValueError(f"logprobs takes None or a whole number from 0 to {ALTERNATIVES}, got {request.logprobs!r}")
        stops, kinds = request.stop_strings, (tuple, list, set, frozenset)
        if not isinstance(request.stop_tokens, kinds) or not whole(request.stop_tokens):
            raise ValueError("stop_tokens takes a tuple of token ids, which are whole numbers")
        if not isinstance(stops, kinds) or not all(isinstance(stop, bytes) and stop for stop in stops):
            raise ValueError("stop_strings takes a tuple of bytes that are not empty")
        if stops and not self.decode:
            raise ValueError("stop_strings needs an Engine that was given decode")
        total = len(prompt) + int(request.max_new_tokens)  # a number of numpy's might overflow
        lengths = f"{len(prompt)} prompt tokens and {request.max_new_tokens} new ones"
        if config.pos == "learned" and total > config.max_seq_len:
            most = f"the {config.max_seq_len} learned positions (max_seq_len)"
            raise ValueError(f"{lengths} are more than {most}; take fewer of either")
        page_size = self.tables.page_size
        pages = most_pages(self.tables.groups, page_size, total - 1)  # nobody looks at the last token
        if pages > self.num_pages:
            short = f"num_pages is {self.num_pages}; give more, or take fewer tokens"
            raise ValueError(f"{lengths} need {pages} pages of {page_size}; {short}")

    def has_work(self):
        return bool(self.waiting or self.running)

    def step(self):
        """Launch steps until as many as may be are under way, and wait for the oldest. Returns [(sequence, its new
        tokens), ...] for the sequences that drew a token in it; the new tokens are empty when a stop token or string
        ended the sequence. A sequence that has ended says why in `.finished`.

        Raises UserError when the model's logits are not finite. After an error, an interrupt by the user too, the
        engine takes no more steps: it raises RuntimeError. What the sequences have generated until then is right."""
        if self.stepping:
            raise RuntimeError("a step has failed or still runs: what the pages hold is not known; make a new Engine")
        self.stepping = True  # for good if anything below raises: what is scheduled counts as computed
        if not (self.running and self.launched):  # else the device has worked since the last one was read
            self.read_at = time.perf_counter()
        while len(self.launched) < self.depth and (pieces := self.schedule()):
            self.launched.append((pieces, self.runner.launch(pieces, self.tables)))
        news = self.read() if self.launched else []
        self.stepping = False
        return news

    def read(self):
        """Wait for the oldest step under way. Returns what `step` does."""
        pieces, drawn = self.launched.popleft()
        news = self.postprocess(pieces, *drawn.read())
        before, self.read_at = self.read_at, time.perf_counter()
        prompt_tokens = sum(len(piece.tokens) for piece in pieces if len(piece.tokens) > 1)
        if prompt_tokens:
            self.stats.prefill_tokens += prompt_tokens
            self.stats.prefill_s += self.read_at - before
        else:
            self.stats.decode_tokens += len(news)
            self.stats.decode_s += self.read_at - before
        return news

    def schedule(self):
        """Choose a step's work, with pages for it. Returns its Pieces.

        Running sequences go first. When pages run out, the one that came last gives all of its pages back and waits,
        to compute its tokens again later: so the oldest always gets on, and every sequence is the oldest some day.
        """
        pieces, budget, index = [], self.max_tokens_per_step, 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            if todo := sequence.todo:
                n = self.tables.reserve(sequence, min(todo, budget))
                if not n:
                    self.preempt_latest()  # perhaps this very sequence: then the loop ends
                    continue
                pieces.append(self.advance(sequence, n, draws=n == todo))
                budget -= n
            index += 1
        while self.waiting and budget:
            sequence = self.waiting[0]
            # pending: preempted with a token drawn whose id is not read yet
            if sequence.pending or not self.tables.admit(sequence):
                break  # nobody overtakes: those behind need not starve the first
            self.running.append(self.waiting.popleft())
            self.stats.found_tokens += sequence.num_computed
            todo = sequence.todo
            n = self.tables.reserve(sequence, min(todo, budget))
            pieces.append(self.advance(sequence, n, draws=n == todo))
            budget -= n
        if pieces:
            self.count_pages()
        for piece in pieces:
            self.tables.slide(piece.sequence)
        for i, sequence in enumerate(drawing_of(pieces)):
            sequence.drawn_at = i
        return pieces

    def advance(self, sequence, n, draws):
        """The next n tokens of the sequence as a Piece; from now on they count as computed."""
        start = sequence.num_computed
        tokens = sequence.tokens[start : start + n]
        if len(tokens) < n:
            tokens.append(-1 - sequence.drawn_at)  # its id is not known yet: the row of what the last step drew
        sequence.num_computed += n
        sequence.pending += draws
        if n > 1 or start % self.tables.page_size == 0:  # else no page has filled since the last time
            self.tables.remember(sequence)
        return Piece(sequence, start, tokens, draws)

    def preempt_latest(self):
        sequence = self.running.pop()
        self.tables.remember(sequence)
        self.tables.release(sequence)
        self.waiting.appendleft(sequence)
        self.stats.preemptions += 1

    def count_pages(self):
        """Take stock while all pages of the step are held."""
        stats, page_size, reserved = self.stats, self.tables.page_size, self.model.config.max_seq_len
        held, num_groups = self.tables.allocator.num_held, len(self.tables.groups)
        stats.peak_pages = max(stats.peak_pages, held)
        stats.held_slots += held * page_size
        lengths = [sequence.num_computed for sequence in self.running]
        # only a sequence's last page has unused slots: it has them in every group, and shares it with nobody
        slots = page_size * sum([sequence.row.end for sequence in self.running])
        stats.unused_slots += (slots - sum(lengths)) * num_groups
        longer = sum([n - reserved for n in lengths if n > reserved])
        stats.reserved_slots += (reserved * len(lengths) + longer) * num_groups

    def postprocess(self, pieces, ids=(), *logprobs):
        """Append the drawn tokens in order and let go of the sequences that have ended."""
        news = []
        for i, (sequence, token) in enumerate(zip(drawing_of(pieces), ids)):
            if sequence.finished:
                continue  # it ended while this step was under way
            if token < 0:
                raise UserError(
                    f"the model's logits for token {len(sequence.tokens) + 1} of a text are not finite: its weights are "
                    f"broken, or too large for {next(self.model.parameters()).dtype}; take float32 or another checkpoint"
                )
            request = sequence.request
            sequence.pending -= 1
            if token in request.stop_tokens:
                news.append((sequence, []))
                self.finish(sequence, "stop")
                continue
            sequence.tokens.append(token)
            if request.logprobs is not None:
                chosen, best, best_ids = (column[i] for column in logprobs)
                sequence.logprobs.append((chosen, dict(list(zip(best_ids, best))[: request.logprobs])))
            if request.stop_strings and sequence.ends_in_stop_string(self.decode):
                news.append((sequence, []))
                self.finish(sequence, "stop")
                continue
            news.append((sequence, [token]))
            if len(sequence.tokens) == sequence.longest:
                self.finish(sequence, "length")
        return news

    def cancel(self, sequence):
        """Take a sequence out, between steps; it keeps what it has generated. Does nothing to one that has ended, and raises
        ValueError for one that another engine has."""
        if not sequence.finished:
            self.finish(sequence, "cancelled")

    def finish(self, sequence, why):
        if sequence.row:
            self.running.remove(sequence)  # ValueError before anything has changed, if it is not there
            self.tables.remember(sequence)
            self.tables.release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.finished = why
        if self.decode:
            sequence.make_text(self.decode)


def whole(numbers):
    """Whether all of them are whole numbers. Looks at each kind once: a prompt may have 100,000."""
    return all(issubclass(kind, Integral) for kind in set(map(type, numbers)))


def drawing_of(pieces):
    """The sequences of a step that draw a token in it, in the order of the drawn ids."""
    return [piece.sequence for piece in pieces if piece.draws]


def groups_of(config, max_window=0):
    """The page groups of a model whose layers see at most max_window keys, 0: as they say."""
    return page_groups([min(window or max_window, max_window) if max_window else window for window in config.windows])


def pages_of_prompts(groups, page_size, num_tokens):
    """What windowed groups hold beside their windows while prompts of so many tokens are computed: a step's pieces of them.
    With less room prompts take more steps, at worst one a page."""
    return sum(group.window > 0 for group in groups) * pages_for(min(STEP_TOKENS, num_tokens), page_size)


def generate(model, prompts, max_new_tokens, page_size=16, vocab_size=0, stop_tokens=(), seed=0, **drawing):
    """Continue lists of ids, all at once. Returns the lists of new ids.

    drawing: temperature, top_k, top_p, min_p of `Request`; prompt i draws with seed + i

    The model must be in evaluation mode, and autocast off. Raises ValueError as `Engine.add` does. No CUDA graphs: they
    pay off over thousands of tokens, and their memory is missing elsewhere, as in training.
    """
    groups = groups_of(model.config)
    num_pages = sum(most_pages(groups, page_size, len(prompt) + max_new_tokens) for prompt in prompts)
    num_pages += pages_of_prompts(groups, page_size, sum(map(len, prompts)))
    engine = Engine(model, max(1, num_pages), page_size, vocab_size=vocab_size, graphs=False)
    sequences = [
        engine.add(Request(prompt, max_new_tokens, seed=seed + i, stop_tokens=stop_tokens, **drawing))
        for i, prompt in enumerate(prompts)
    ]
    while engine.has_work():
        engine.step()
    return [sequence.generated for sequence in sequences]
