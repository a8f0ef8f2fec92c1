"""The device's side of the engine: K and V in pages, a step of the model over packed tokens, CUDA graphs.

    pieces of a step -> pack      one int32 buffer on the host: tokens, positions, slots, tables, lengths, how to draw
                     -> copy      of the buffer to the device
                     -> compute   the model with attention over pages, and drawing; or the replay of a graph of that
                     -> copy      of the drawn ids to the host, and an event behind it
                     -> read      waits for the event

The tokens of a step are packed into one row (1, N) without padding, some sequences giving one token and some a piece
of their prompt. Only attention can tell them apart, so the model runs as in training, with `attend` in place of the
dense kernel:

    model.features(tokens, attend, positions) -> layer: q, k, v -> k, v into their slots -> attention over pages

`launch` does all but the last and waits for nothing: the host may launch step n + 1 before it reads what step n drew.
A token that is not read yet stands in the buffer as -1 - i, for row i of `drawn`, which stays on the device.

On CUDA a step in which all sequences decode is padded to one of a few numbers of rows; a padding row has length 0 and
slot -1, which attention and writing skip. The first step of a shape runs as it is and is then captured as a graph, which
takes 0.1 to 0.3 s; the following ones replay it. The graphs share one pool of memory, because no two run at once.
"""

import os
from functools import lru_cache, partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from config import UserError
from kernels.choice import triton_takes
from paging import most_touched, pages_for
from sampling import Limits, Style, draw, logprobs, states_of, style_of, uniform

FLOAT32_MAX = float(np.finfo(np.float32).max)
SHORTEST_GRAPH = 256  # graphs are made for lengths up to this, twice this, four times this, ..


class Piece(NamedTuple):
    """A sequence's share of a step: its next tokens, and whether one is drawn behind them."""

    sequence: object  # its .row in the page tables, .request and .num_prompt
    start: int  # position of the first token
    tokens: list[int]  # ids, the last one perhaps as -1 - i
    draws: bool


class Shape(NamedTuple):
    """All that is fixed about a step when it is captured."""

    num_tokens: int
    num_seqs: int
    num_draws: int
    widths: tuple[int, ...]  # of the groups' page tables
    max_query_len: int
    max_seq_len: int
    style: Style


class StepInputs:
    """Named views of a step's buffer of int32 numbers: of a numpy array on the host, of a tensor on the device."""

    def __init__(self, shape, buffer, float_type):
        views = iter([buffer[place] for place in layout(shape)[0]])
        # N tokens, S sequences, R rows to draw
        self.tokens, self.positions = next(views), next(views)  # (N,)
        self.slot_mapping = [next(views) for _ in shape.widths]  # (N,) a group
        self.seq_lens, self.cu_seqlens = next(views), next(views)  # (S,), (S + 1,)
        self.page_tables = [next(views).reshape(shape.num_seqs, width) for width in shape.widths]
        self.last_rows = next(views)  # (R,) of the N, behind which a token is drawn
        limits = Limits(*views)
        self.limits = Limits(*(x.view(float_type) for x in limits))._replace(top_k=limits.top_k)


@lru_cache(maxsize=1024)  # steps that decode come again and again, those with prompts seldom
def layout(shape):
    """(where the views of a step's buffer are, how long it is)"""
    N, S, R, widths = shape.num_tokens, shape.num_seqs, shape.num_draws, shape.widths
    sizes = [N, N, *(N for _ in widths), S, S + 1, *(S * width for width in widths), R, *(R for _ in Limits._fields)]
    places, end = [], 0
    for size in sizes:
        places.append(slice(end, end + size))
        end += -(-size // 16) * 16  # views begin at multiples of 64 bytes, so kernels are compiled for one alignment
    return places, end


def bucket(num_seqs):
    """The number of rows that a decode step is padded to: 1, 2, 4, 8, then multiples of 8, from 64 on of 16."""
    if num_seqs <= 8:
        return 1 << (num_seqs - 1).bit_length()
    step = 8 if num_seqs <= 64 else 16
    return -(-num_seqs // step) * step


class Graph(NamedTuple):
    graph: object
    buffer: torch.Tensor  # that it reads
    outputs: tuple[torch.Tensor, ...]


class Runner:
    """Runs pieces of sequences through the model.

    groups:    `paging.PageGroup`s: which layers share page ids
    num_pages: pages of K and V to allocate, of page_size tokens and as many layers as a group has
    attention: "triton", "sdpa" or "reference": who computes attention; "auto": triton on CUDA where it can, else sdpa
    graphs:    capture decode steps; for triton on CUDA only
    compile:   fuse, with torch.compile, the parts of the model's Blocks around attention, and drawing
    """

    def __init__(self, model, groups, num_pages, page_size, max_num_seqs, vocab_size, attention, graphs, compile):
        weight, config = next(model.parameters()), model.config
        self.model, self.groups, self.page_size, self.vocab_size = model, groups, page_size, vocab_size
        self.device = weight.device
        self.on_cuda = weight.device.type == "cuda"
        if attention == "auto":
            attention = "triton" if triton_pages(self.device, config) else "sdpa"
        self.write_pages, self.attention = paged_attention(attention)
        self.pads = attention == "triton"  # the others read lengths on the host, so they gain nothing
        self.graphs = {} if graphs and self.pads and self.on_cuda else None
        self.place = {layer: (g, i) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)}
        shape = (num_pages, page_size, config.n_kv_head, config.head_dim)
        layers = range(len(groups[0].layers))
        try:
            self.k = [torch.empty(shape, dtype=weight.dtype, device=self.device) for _ in layers]
            self.v = [torch.empty(shape, dtype=weight.dtype, device=self.device) for _ in layers]
        except (RuntimeError, TypeError):  # memory is out; nobody has so much: more than 64 bits can count
            need = num_pages * page_bytes(config, groups, page_size, weight.dtype) // 2**20
            raise UserError(
                f"no memory for a cache of {num_pages} pages, {need:,} MiB; ask for fewer tokens, "
                "or give a smaller num_pages or page_size"
            ) from None
        self.drawn = torch.zeros(bucket(max_num_seqs), dtype=torch.int32, device=self.device)  # by the step before
        self.drawing = Drawing([], vocab_size)  # of the step before
        self.draw = torch.compile(draw) if compile else draw
        if compile:
            torch._dynamo.config.recompile_limit = 64  # beyond, it would run uncompiled: there are five ways to draw
            model.compile_for_decoding()

    def launch(self, pieces, tables):
        """Set a step going, with the page tables as they are now. Returns what it will have drawn, a row for each piece
        that draws, in order."""
        shape, host = self.pack(pieces, tables.tables)
        graph = self.graphs.get(shape) if self.graphs else None
        if graph:
            graph.buffer.copy_(host, non_blocking=True)
            graph.graph.replay()
            return Drawn(graph.outputs)
        buffer = host.to(self.device, non_blocking=True)
        outputs = self.compute(shape, buffer, buffer if self.pads else host)
        drawn = Drawn(outputs)
        decodes = shape.max_query_len == 1 and shape.num_draws == shape.num_seqs
        if decodes and self.graphs is not None:
            self.graphs[shape] = self.capture(shape, buffer)
        return drawn

    def pack(self, pieces, tables):
        """The Shape of a step and its buffer, a tensor on the host."""
        page_size = self.page_size
        counts = np.array([len(piece.tokens) for piece in pieces])
        starts = np.array([piece.start for piece in pieces])
        rows = np.array([piece.sequence.row.index for piece in pieces])
        draws = np.array([piece.draws for piece in pieces])
        seq_lens = starts + counts
        drawing = [piece.sequence for piece in pieces if piece.draws]
        if drawing != self.drawing.sequences:
            self.drawing = Drawing(drawing, self.vocab_size)
        shape = self.shape_of(counts, int(seq_lens.max()))

        # memory of its own for every step: torch does not hand it out again before the copy to the device is over
        host = torch.zeros(layout(shape)[1], dtype=torch.int32, pin_memory=self.on_cuda)
        inputs = StepInputs(shape, host.numpy(), np.float32)
        n = int(counts.sum())
        inputs.tokens[:n] = list(chain.from_iterable(piece.tokens for piece in pieces))
        cu_seqlens = np.arange(shape.num_seqs + 1)  # padding has one query token a row
        cu_seqlens[1 : len(pieces) + 1] = counts.cumsum()
        inputs.cu_seqlens[:] = cu_seqlens
        inputs.positions[:n] = positions = np.arange(n) + np.repeat(starts - cu_seqlens[: len(pieces)], counts)
        inputs.seq_lens[: len(pieces)] = seq_lens
        rows_of_tokens = np.repeat(rows, counts)
        last_pages = (seq_lens - 1)[:, None] // page_size
        for group, table, slots, view in zip(self.groups, tables, inputs.slot_mapping, inputs.page_tables):
            columns = positions // page_size % table.shape[1]
            slots[:n] = table[rows_of_tokens, columns] * page_size + positions % page_size
            slots[n:] = -1
            width = view.shape[1]
            if group.window:  # what this step sees: column j has the last page whose index is j, modulo the width
                indices = last_pages - (last_pages - np.arange(width)) % width
                view[: len(pieces)] = table[rows[:, None], indices % table.shape[1]]
            else:
                width = min(width, table.shape[1])
                view[: len(pieces), :width] = table[rows, :width]
        last_rows = cu_seqlens[1 : len(pieces) + 1] - 1
        inputs.last_rows[: len(drawing)] = last_rows[draws]
        if shape.style.draws:
            self.drawing.fill(inputs.limits, seq_lens[draws])
        return shape, host

    def shape_of(self, counts, longest):
        num_tokens, num_seqs, num_draws = int(counts.sum()), len(counts), len(self.drawing.sequences)
        if self.pads:
            longest = max(SHORTEST_GRAPH, 1 << (longest - 1).bit_length())
            if num_tokens == num_seqs == num_draws:
                num_tokens = num_seqs = num_draws = bucket(num_seqs)
        longest_query = int(counts.max())
        widths = [pages_for(longest, self.page_size)] * len(self.groups)
        for g, group in enumerate(self.groups):
            if group.window:  # the first query token sees window - 1 positions before those of the queries
                widths[g] = min(widths[g], most_touched(group.window - 1 + longest_query, self.page_size))
        return Shape(num_tokens, num_seqs, num_draws, tuple(widths), longest_query, longest, self.drawing.style)

    @torch.inference_mode()
    def compute(self, shape, buffer, lengths):
        """The step itself, in operations that a graph can hold. Returns (ids,) or ids and `sampling.logprobs`."""
        inputs = StepInputs(shape, buffer, torch.float32)
        lengths = StepInputs(shape, lengths, torch.float32)  # of the host, for those who read them there
        waiting = self.drawn.index_select(0, (-1 - inputs.tokens).clamp(min=0))
        tokens = torch.where(inputs.tokens < 0, waiting, inputs.tokens)
        attend = partial(self.attend, shape, inputs, lengths)
        x = self.model.features(tokens[None], attend, inputs.positions)  # (1, N, n_embd)
        if not shape.num_draws:
            return ()
        x = x[0].index_select(0, inputs.last_rows)  # only their logits are needed
        logits = self.model.logits(x)[:, : self.vocab_size]
        ids = self.draw(logits, inputs.limits, shape.style)
        tokens = ids.clamp(min=0)  # -1 has neither embedding nor logit
        self.drawn[: shape.num_draws] = tokens
        alternatives = shape.style.logprobs
        return (ids,) if alternatives is None else (ids, *logprobs(logits, tokens, alternatives))

    def attend(self, shape, inputs, lengths, layer, q, k, v, window):
        """The `attend` of a step, once it is bound to it: q (1, N, H, D), k and v (1, N, H_kv, D) to (1, N, H, D)."""
        group, index = self.place[layer.index]
        pages = self.k[index], self.v[index]
        self.write_pages(k[0], v[0], *pages, inputs.slot_mapping[group])
        window = self.groups[group].window  # that of the layer, or the engine's max_window
        bounds = {"max_query_len": shape.max_query_len, "max_seq_len": shape.max_seq_len}
        where = inputs.page_tables[group], lengths.seq_lens, lengths.cu_seqlens
        return self.attention(q[0], *pages, *where, window, **bounds)[None]

    def capture(self, shape, buffer):
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).graph.pool() if self.graphs else None
        # thread_local: what other threads do meanwhile, such as a loader that pins memory, is no business of the graph
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = self.compute(shape, buffer, buffer)
        return Graph(graph, buffer, outputs)


class Drawing:
    """How the sequences of a step draw. Looked up once for as many steps as the same ones go on."""

    def __init__(self, sequences, vocab_size):
        self.sequences = sequences
        requests = [sequence.request for sequence in sequences]
        self.style = style_of(requests, vocab_size)
        self.limits = {
            "temperature": np.array([min(r.temperature, FLOAT32_MAX) for r in requests], dtype=np.float32),
            "top_k": np.array([min(r.top_k, vocab_size) for r in requests], dtype=np.int32),
            "top_p": np.array([r.top_p for r in requests], dtype=np.float32),
            "min_p": np.array([r.min_p for r in requests], dtype=np.float32),
        }
        self.states = states_of([r.seed for r in requests])
        self.prompts = np.array([sequence.num_prompt for sequence in sequences], dtype=np.int64)

    def fill(self, limits, seq_lens):
        """The first rows of a step's Limits; padding stays at 0, which is greedy."""
        n = len(self.sequences)
        for name, values in self.limits.items():
            getattr(limits, name)[:n] = values
        limits.uniform[:n] = uniform(self.states, (seq_lens - self.prompts).astype(np.uint64))


class Drawn:
    """What a step draws, on its way to the host: copies, because the next replay of a graph writes into its outputs."""

    def __init__(self, outputs):
        on_cuda = bool(outputs) and outputs[0].is_cuda
        hosts = [torch.empty(x.shape, dtype=x.dtype, pin_memory=on_cuda) for x in outputs]
        self.outputs = [host.copy_(x, non_blocking=on_cuda) for host, x in zip(hosts, outputs)]
        self.event = torch.cuda.Event() if on_cuda else None
        if self.event:
            self.event.record()

    def read(self):
        """Lists of ids and, if asked for, of log-probabilities; waits until they are there."""
        if self.event:
            self.event.synchronize()
        return [x.tolist() for x in self.outputs]


def triton_pages(device, config):
    """Whether the Triton kernels can compute a model's attention over pages."""
    if not triton_takes(device, config.head_dim):
        return False
    from kernels.paged_tiles import MAX_ROWS, padded  # imports triton, which is there

    return config.n_head <= MAX_ROWS[padded(config.head_dim)] * config.n_kv_head


def paged_attention(attention):
    """(write_pages, paged_attention) of an implementation."""
    if attention == "triton":
        from kernels import paged_attention as kernels

        return kernels.write_pages, kernels.paged_attention
    from kernels import paged_sdpa, reference

    if attention not in ("sdpa", "reference"):
        raise ValueError(f"attention takes auto, triton, sdpa or reference, got {attention}")
    return reference.write_pages, (paged_sdpa if attention == "sdpa" else reference).paged_attention


def page_bytes(config, groups, page_size, dtype):
    """Bytes of K and V in one page."""
    return 2 * page_size * config.n_kv_head * config.head_dim * dtype.itemsize * len(groups[0].layers)


def free_memory(device):
    """Bytes that nobody uses, on the device; an error where that cannot be told."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    raise ValueError(f"free memory of {device} cannot be told; give num_pages instead of memory_fraction")
