"""The paged decode kernel over the shapes that people serve, as a share of the bandwidth of a device copy.

A figure counts each visible K and V entry once. Every call is captured in a CUDA graph, and every contestant's graph takes its
turn with a copy on the device. Lengths are uniform in T/2..T unless a sequence is alone; pages are shuffled over the pool.
The caches of one graph together are larger than the GPU's L2 cache, so that no call finds its keys there.
"""

import math
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.measure import captured, copying, median_ms, write_results
from benchmarks.plots import pyplot
from kernels import reference
from kernels.paged_attention import paged_attention, write_pages

Shape = namedtuple("Shape", "B H H_kv T D page_size window")
SHAPES = [
    Shape(64, 32, 8, 4096, 128, 16, 0),
    Shape(64, 32, 8, 4096, 128, 64, 0),
    Shape(64, 32, 8, 4096, 128, 256, 0),
    Shape(16, 32, 32, 4096, 128, 64, 0),  # MHA
    Shape(128, 32, 1, 8192, 128, 64, 0),  # MQA
    Shape(64, 12, 12, 1024, 64, 64, 0),  # GPT-2
    Shape(64, 12, 4, 1024, 64, 64, 0),
    Shape(1, 32, 8, 32768, 128, 64, 0),
    Shape(1, 12, 12, 1024, 64, 64, 0),
    Shape(64, 32, 8, 8192, 128, 64, 1024),
]
WINDOWED = [Shape(64, 32, 8, T, 128, 64, 1024) for T in (2048, 4096, 8192, 16384, 32768, 65536, 131072)]
BATCHES = [Shape(B, 32, 8, 1024, 128, 64, 0) for B in range(1, 257)]
COLD_BYTES = 200 << 20  # four times an H100's L2 cache


def bench_decode(config):
    rows = []
    print(f"{'B, H, H_kv, T, D, page, window':36}{'peer':>6}{'us':>9}{'TB/s':>7}{'of copy':>9}")
    for shape in SHAPES + (WINDOWED + BATCHES if config.sweep else []):
        few = shape in BATCHES
        with torch.cuda.stream(torch.cuda.Stream()):
            timed = time_decode(shape, ["ours"] if few else config.peers.split(","), 5 if few else config.rounds)
        rows += timed
        for row in timed if not few else []:
            figures = f"{row['us']:9.1f}{row['tb_per_s']:7.2f}{row['of_copy']:9.2f}"
            print(f"{', '.join(map(str, shape)):36}{row['peer']:>6}{figures}", flush=True)
    folder = Path(config.out_dir)
    facts = {}
    if config.sweep:
        facts = {"largest_batch_step": largest_step(rows), "window_spread": window_spread(rows)}
        print("  ".join(f"{name} {value:.2f}" for name, value in facts.items()))
    write_results(folder / "decode.json", torch.device("cuda"), torch.bfloat16, **facts, rows=rows)
    if config.sweep:
        plot_decode(rows, folder / "decode.png")


def shape_of(row):
    return Shape(*(row[key] for key in Shape._fields))


def visible_bytes(shape, lengths):
    """K and V of the visible keys, each once, in bf16."""
    keys = sum(min(n, shape.window) if shape.window else n for n in lengths)
    return keys * 2 * shape.H_kv * shape.D * 2


def draw_lengths(shape):
    """Uniform in T/2..T, those of a smaller batch among those of a larger one; a sequence alone has T tokens."""
    if shape.B == 1:
        return [shape.T]
    random = torch.Generator().manual_seed(0)
    return torch.randint(shape.T // 2, shape.T + 1, (shape.B,), generator=random).tolist()


def make_caches(shape, lengths):
    """[(k_pages, v_pages, page_table)], as many as keep the L2 cache cold. Under a window the table is a ring."""
    keys = shape.window + shape.page_size if shape.window else shape.T
    max_pages = math.ceil(keys / shape.page_size) + 1
    needed = [min(math.ceil(n / shape.page_size), max_pages) for n in lengths]
    caches = []
    for seed in range(max(1, math.ceil(COLD_BYTES / visible_bytes(shape, lengths)))):
        torch.manual_seed(seed)
        ids = torch.randperm(sum(needed), device="cuda", dtype=torch.int32).split(needed)
        table = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
        sizes = (2, sum(needed), shape.page_size, shape.H_kv, shape.D)
        caches.append((*torch.randn(sizes, device="cuda", dtype=torch.bfloat16), table))
    return caches


def time_decode(shape, peers, rounds):
    """A row for each peer that can do this shape: time a call and its bandwidth."""
    lengths = draw_lengths(shape)
    caches = make_caches(shape, lengths)
    q = torch.randn(shape.B, shape.H, shape.D, device="cuda", dtype=torch.bfloat16)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    calls = {}
    for peer in peers:
        attend = contestants(shape).get(peer)
        if attend:
            validate(peer, shape, attend(q, *caches[0], seq_lens), q, caches[0], lengths)
            calls[peer] = captured(lambda attend=attend: [attend(q, *cache, seq_lens) for cache in caches])
    moved = visible_bytes(shape, lengths)
    copy, copied = copying(q.device)
    times = median_ms(calls | {"copy": captured(copy)}, rounds)
    copy_rate = copied / times.pop("copy") / 1e9  # TB/s
    rows = []
    for peer, ms in times.items():
        rate = moved * len(caches) / ms / 1e9
        figures = {"us": 1e3 * ms / len(caches), "tb_per_s": rate, "copy_tb_per_s": copy_rate, "of_copy": rate / copy_rate}
        rows.append({**shape._asdict(), "peer": peer, "caches": len(caches), **figures})
    return rows


def contestants(shape):
    """{name: attend(q, k_pages, v_pages, page_table, seq_lens)} of those that are installed and can do this shape."""
    cu_seqlens = torch.arange(shape.B + 1, dtype=torch.int32, device="cuda")
    bounds = {"max_query_len": 1, "max_seq_len": shape.T}
    able = {"ours": lambda *given: paged_attention(*given, cu_seqlens, shape.window, **bounds)}
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError:
        return able
    if shape.window == 0:  # it has no rings

        def fa3(q, k_pages, v_pages, page_table, seq_lens):
            tables = {"page_table": page_table, "cache_seqlens": seq_lens}
            return flash_attn_with_kvcache(q[:, None], k_pages, v_pages, causal=True, **tables)[:, 0]

        able["fa3"] = fa3
    return able


def validate(peer, shape, out, q, cache, lengths):
    """The last four sequences against the definition in float32, and a token that write_pages puts into a page."""
    k_pages, v_pages, table = cache
    rows = range(max(0, shape.B - 4), shape.B)
    for i in rows:
        pages = table[i : i + 1].long()
        k, v = k_pages[pages[0]].float(), v_pages[pages[0]].float()
        one = torch.arange(pages.shape[1], dtype=torch.int32)[None]
        bounds = torch.tensor(lengths[i : i + 1]), torch.tensor([0, 1])
        expected = reference.paged_attention(q[i : i + 1].float(), k, v, one.cuda(), *bounds, shape.window)
        error = ((out[i : i + 1].float() - expected).norm() / expected.norm()).item()
        if not error < 0.01:  # bf16 rounds to 0.004; a wrong page, head or split is off by far more
            raise RuntimeError(f"{peer} at {shape}: relative error {error:.3g} of sequence {i}, not below 0.01")
    pages = torch.zeros(2, 2, *k_pages.shape[1:], device="cuda", dtype=q.dtype)
    write_pages(k_pages[0], v_pages[0], *pages, torch.arange(len(k_pages[0]), device="cuda") + len(k_pages[0]))
    if not (torch.equal(pages[0, 1], k_pages[0]) and torch.equal(pages[1, 1], v_pages[0])) or pages[:, 0].any():
        raise RuntimeError(f"write_pages at {shape}: a page differs from what was written")


def largest_step(rows):
    """The largest ratio of the times of a batch and of the batch that is one smaller."""
    times = [row["us"] for row in rows if shape_of(row) in BATCHES]
    return max(b / a for a, b in pairwise(times))


def window_spread(rows):
    """Fastest over slowest bandwidth of a fixed window over growing texts."""
    rates = [row["tb_per_s"] for row in rows if shape_of(row) in WINDOWED and row["peer"] == "ours"]
    return max(rates) / min(rates)


def plot_decode(rows, path):
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    ours = {shape_of(row): row for row in rows if row["peer"] == "ours"}
    names = [", ".join(map(str, shape)) for shape in SHAPES]
    axes[0].barh(names, [ours[shape]["of_copy"] for shape in SHAPES])
    axes[0].invert_yaxis()
    axes[0].set(xlabel="share of a copy's bandwidth", title="B, H, H_kv, T, D, page, window")
    axes[1].plot([s.B for s in BATCHES], [ours[s]["us"] for s in BATCHES])
    axes[1].set(xlabel="batch", ylabel="µs", title="T 1024, 32 heads of 128, 8 KV heads", ylim=0)
    axes[2].plot([s.T for s in WINDOWED], [ours[s]["us"] for s in WINDOWED], marker="o")
    axes[2].set(xscale="log", xlabel="T", ylabel="µs", title="window 1024, batch 64", ylim=(0, 1.1 * axes[2].dataLim.ymax))
    figure.savefig(path, dpi=120)
