"""The README's tables of speeds, made from the files in results/ and from nothing else."""

from pathlib import Path

from benchmarks import markdown
from benchmarks.plots import NAMES
from benchmarks.runs import read_json
from config import UserError


def write_tables(config):
    text = section(Path(config.out_dir))
    if not text:
        raise UserError(f"{config.out_dir} holds no results; python bench.py attention is one of the programs that write some")
    markdown.put_into(Path("README.md"), "bench.py tables", text)
    print(f"{text}\n\nREADME.md: tables replaced")


def section(folder):
    """A table for each measurement that has left its results in the folder, with where and how it was made."""
    parts = []
    for name, (command, title, make) in MAKERS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            facts = read_json(path)
            try:
                versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items() if key in ("torch", "triton"))
                where = f"{facts['threads']} CPU threads" if facts["device"] == "cpu" else facts["device"]
                on = f"{where}, {facts['dtype']}, {versions}, commit {facts['git_commit'][:10]}{facts['git_commit'][40:]}"
                table = markdown.table(make(facts))
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                why = f"{type(error).__name__}: {error}"
                raise UserError(f"{path} is not what bench.py writes ({why}); run python bench.py {command} again") from None
            parts.append("\n".join([f"{title} (`python bench.py {command}`; {on}):", "", *table]))
    return "\n\n".join(parts)


def attention(facts):
    from benchmarks.attention import SHAPES, SWEEP, shape_of

    shapes = [*SHAPES, *SWEEP]

    def cell(shape, peer):
        row = next((row for row in facts["rows"] if shape_of(row) == shape and row["peer"] == peer), None)
        return f"{row['forward_ms']:.3f} / {row['backward_ms']:.3f}" if row else ""

    columns = {"B, H, H_kv, T, D, window": [", ".join(map(str, shape)) for shape in shapes]}
    return columns | {name: [cell(shape, peer) for shape in shapes] for peer, name in NAMES.items()}


def train(facts):
    rows = {(row["attention"], row["peer"]): row for row in facts["rows"]}
    kinds = list(dict.fromkeys(kind for kind, _ in rows))

    def cell(kind, peer):
        return f"{rows[kind, peer]['tokens_per_s']:,.0f}" if (kind, peer) in rows else ""

    shares = [rows[kind, "ours"]["mfu"] if (kind, "ours") in rows else None for kind in kinds]
    columns = {"attention": kinds, "MFU, ours": [f"{share:.1%}" if share else "" for share in shares]}
    return columns | {name: [cell(kind, peer) for kind in kinds] for peer, name in NAMES.items()}


def decode(facts):
    from benchmarks.decode import SHAPES, shape_of

    ours = {shape_of(row): row for row in facts["rows"] if row["peer"] == "ours"}
    rows = [ours[shape] for shape in SHAPES if shape in ours]
    return {
        "B, H, H_kv, T, D, page, window": [", ".join(map(str, shape_of(row))) for row in rows],
        "us": [f"{row['us']:.1f}" for row in rows],
        "of the copy's bandwidth": [f"{row['of_copy']:.2f}" for row in rows],
    }


def engine(facts):
    rows = facts["rows"]
    return {
        "load": [row["load"] for row in rows],
        "prompts": [f"{row['prompt_tokens']:,} tokens" for row in rows],
        "new": [f"{row['new_tokens']:,} tokens" for row in rows],
        "tokens/s": [f"{row['tokens_per_s']:,.0f}" for row in rows],
        "prefill": [f"{row['prefill_tokens_per_s']:,.0f}" for row in rows],
        "decoding": [f"{row['decode_tokens_per_s']:,.0f}" for row in rows],
        "unused cache": [f"{row['unused_share']:.1%}" for row in rows],
        "if max_seq_len were reserved": [f"{row['unused_share_of_reserving']:.1%}" for row in rows],
    }


def beside_transformers(facts):
    speeds = {(row["batch"], row["engine"]): f"{row['decode_tokens_per_s']:,.1f}" for row in facts["rows"]}
    batches = sorted({batch for batch, _ in speeds})
    columns = {"batch": [str(batch) for batch in batches]}
    return columns | {NAMES[name]: [speeds[batch, name] for batch in batches] for name in dict.fromkeys(n for _, n in speeds)}


def variants(facts):
    rows = facts["rows"]
    columns = {
        "attention": [row["variant"] for row in rows],
        "KV bytes/token": [f"{row['kv_bytes_per_token']:,}" for row in rows],
        f"sequences in {facts['cache_bytes'] / 2**30:.3g} GiB": [f"{row['largest_batch']:,}" for row in rows],
    }
    for batch in rows[0]["decode_tokens_per_s"]:
        speeds = [row["decode_tokens_per_s"][batch] for row in rows]
        columns[f"tokens/s, batch {batch}"] = [f"{speed:,.0f}" if speed else "too many" for speed in speeds]
    return columns


def claims(facts):
    return {name: [row[name] for row in facts["rows"]] for name in ("claim", "formula", "measured", "verdict")}


MAKERS = {
    "attention": ("attention", "Attention in training, ms forward / backward", attention),
    "train": ("train", "A training step of GPT-2 124M, tokens/s by who computes attention", train),
    "decode": ("decode", "Decoding over pages, one token for each of B sequences of T/2 to T tokens (alone: T)", decode),
    "engine-cuda": ("engine", "Whole runs of the engine, compiled, with random weights", engine),
    "variants": ("variants", "What the attention type buys in decoding", variants),
    "claims": ("claims", "What introductions say of these methods", claims),
    "engine-cpu": ("engine", "GPT-2 124M decoding on a CPU, tokens/s", beside_transformers),
}
