"""Continue prompts with a trained model.

    python sample.py out/quickstart
    python sample.py out/gqa --prompt="ROMEO:" --num_samples=4 --max_new_tokens=200 --temperature=0.8 --top_k=50
    python sample.py out/gqa --prompts_file=prompts.txt --temperature=0 --stop=$'\\n\\n'

The text goes to stdout: a single sample as it comes, several ones each when it is finished. Speed goes to stderr.
"""

import codecs
import math
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import checkpoint
from config import UserError, parse, run
from data.tokenizer import from_spec
from device import pick_device, pick_dtype
from engine import Engine, Request

CACHE_BYTES = 2**30  # what num_pages=0 takes at most, if one sequence does not need more


@dataclass(frozen=True)
class SampleConfig:
    prompt: Annotated[str, "text to continue; empty: start a new document"] = ""
    prompts_file: Annotated[str, "file with a prompt on each line, instead of prompt"] = ""
    num_samples: Annotated[int, "samples of each prompt"] = 1
    max_new_tokens: Annotated[int, "length of a sample; 0: 500, or less where learned positions end"] = 0
    temperature: Annotated[float, "0: always the likeliest token; 1: as the model says; above: wilder"] = 0.8
    top_k: Annotated[int, "draw among the k likeliest tokens; 0: no limit"] = 200
    top_p: Annotated[float, "draw among the fewest likeliest tokens that have this probability together"] = 1.0
    seed: Annotated[int, "sample i draws with seed + i, so each can be had again alone"] = 1
    stop: Annotated[str, "text that ends a sample, itself left out"] = ""
    max_window: Annotated[int, "tokens that any layer looks back on, at most; 0: max_seq_len, as in training"] = 0
    checkpoint: Annotated[Literal["newest", "best"], "best: the one with the lowest validation loss"] = "newest"
    device: Annotated[Literal["auto", "cuda", "mps", "cpu"], "auto: the best there is"] = "auto"
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], "auto: bfloat16 on GPUs that have it"] = "auto"
    page_size: Annotated[int, "tokens in a page of the KV cache"] = 16
    num_pages: Annotated[int, "pages in the KV cache; 0: enough for all samples at once, but at most 1 GiB"] = 0

    def __post_init__(self):
        if self.prompt and self.prompts_file:
            raise ValueError("prompt and prompts_file exclude each other; give one of them")
        for key in ("num_samples", "page_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} takes 1 or more, got {getattr(self, key)}")
        for key in ("max_new_tokens", "temperature", "top_k", "max_window", "num_pages"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} takes 0 or more, got {getattr(self, key)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p takes a probability in (0, 1], got {self.top_p}")


def main(argv):
    words, config = parse(argv, SampleConfig, usage=__doc__)
    if len(words) != 1:
        raise UserError(f"sample.py takes one run folder, as in sample.py out/quickstart, got {' '.join(words) or 'none'}")
    prompts = [config.prompt] if not config.prompts_file else read_prompts(config.prompts_file)
    device = pick_device(config.device)
    model, state = checkpoint.load_model(words[0], device, pick_dtype(config.dtype, device), config.checkpoint)
    tokenizer = from_spec(state["tokenizer"])

    prompt_ids = [encode(tokenizer, number, prompt) for number, prompt in enumerate(prompts, start=1)]
    engine = make_engine(model, tokenizer, config, prompt_ids)
    streams = {}
    for number, (prompt, ids) in enumerate(zip(prompts, prompt_ids), start=1):
        for sample in range(1, config.num_samples + 1):
            try:
                sequence = engine.add(request(ids, config.seed + len(streams), tokenizer, model.config, config))
            except ValueError as error:
                raise UserError(f"prompt {number}: {error}") from None
            streams[sequence] = TextStream(f"prompt {number}, sample {sample}", prompt, tokenizer, config.stop)

    alone = len(streams) == 1
    if alone:
        show(prompt)
    while engine.has_work():
        for sequence, new_tokens in engine.step():
            stream = streams[sequence]
            text = stream.push(new_tokens)
            if stream.stopped:
                engine.finish(sequence, "stop")
            if sequence.finished:
                text += stream.close()
            if alone:
                show(text)
            elif sequence.finished:
                show(f"--- {stream.name} ({sequence.finished}) ---\n{stream.prompt}{stream.text}\n")
    if alone:
        show("\n")
    report(engine)


def read_prompts(path):
    try:
        with open(path, encoding="utf-8") as file:
            prompts = [line.rstrip("\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts_file={path} cannot be read: {error}") from None
    if not prompts:
        raise UserError(f"prompts_file={path} is empty; it takes a prompt on each line")
    return prompts


def encode(tokenizer, number, prompt):
    """The prompt's ids; those of an empty one are what stands before a document's first token."""
    if not prompt and tokenizer.eot is not None:
        return [tokenizer.eot]
    try:
        return tokenizer.encode(prompt or "\n")
    except UserError as error:
        why = error if prompt else "the tokenizer has no end-of-text and no newline to start from; give a prompt"
        raise UserError(f"prompt {number}: {why}") from None


def new_tokens_of(ids, model_config, config):
    """max_new_tokens for a prompt; where the default meets the last learned position, at least 1, to be refused."""
    if config.max_new_tokens:
        return config.max_new_tokens
    return 500 if model_config.pos == "rope" else max(1, min(500, model_config.max_seq_len - len(ids)))


def request(ids, seed, tokenizer, model_config, config):
    return Request(
        prompt=ids,
        max_new_tokens=new_tokens_of(ids, model_config, config),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=seed,
        stop_tokens=() if tokenizer.eot is None else (tokenizer.eot,),
    )


def make_engine(model, tokenizer, config, prompt_ids):
    bytes_per_page = model.kv_bytes_per_token(next(model.parameters()).element_size()) * config.page_size
    num_pages = config.num_pages
    if not num_pages:
        pages = [math.ceil((len(ids) + new_tokens_of(ids, model.config, config)) / config.page_size) for ids in prompt_ids]
        num_pages = max(max(pages), min(sum(pages) * config.num_samples, CACHE_BYTES // bytes_per_page))
    # learned positions end before anything could be farther away than that
    max_window = config.max_window or model.config.max_seq_len
    try:
        return Engine(model, num_pages, config.page_size, vocab_size=tokenizer.vocab_size, max_window=max_window)
    except RuntimeError as error:  # how torch says that memory is out
        need = num_pages * bytes_per_page / 2**30
        raise UserError(
            f"no memory for a cache of {num_pages} pages, {need:.1f} GiB ({type(error).__name__}); "
            "ask for fewer tokens or give a smaller num_pages"
        ) from None


class TextStream:
    """The text of one sample as its tokens come in: whole characters only, and nothing of the stop text."""

    def __init__(self, name, prompt, tokenizer, stop):
        self.name = name
        self.prompt = prompt
        self.text = ""  # given out so far
        self.stopped = False
        self.token_bytes = tokenizer.token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop = stop
        self.held = ""  # the end of the text, as long as it may be the beginning of the stop text

    def push(self, tokens):
        """Take new tokens. Returns the text that is certain now."""
        self.held += self.decoder.decode(b"".join(self.token_bytes(token) for token in tokens))
        before, found, _ = self.held.partition(self.stop) if self.stop else (self.held, "", "")
        if found:
            self.stopped = True
            return self.give(before, "")
        hold = next((n for n in range(len(self.stop) - 1, 0, -1) if before.endswith(self.stop[:n])), 0)
        return self.give(before[: len(before) - hold], before[len(before) - hold :])

    def close(self):
        """The sample has ended. Returns what was held back: a beginning that got no end, a torn character."""
        return "" if self.stopped else self.give(self.held + self.decoder.decode(b"", final=True), "")

    def give(self, text, held):
        self.text += text
        self.held = held
        return text


def show(text):
    print(text, end="", flush=True)


def report(engine):
    stats = engine.stats
    rates = [("prefill", stats.prefill_tokens, stats.prefill_s), ("decode", stats.decode_tokens, stats.decode_s)]
    parts = [f"{name} {tokens} tokens, {tokens / seconds:,.0f} tokens/s" for name, tokens, seconds in rates if tokens]
    parts.append(f"at most {stats.peak_pages} of {engine.num_pages} pages held")
    if stats.preemptions:
        parts.append(f"{stats.preemptions} preemptions")
    print("; ".join(parts), file=sys.stderr)


if __name__ == "__main__":
    run(main)
