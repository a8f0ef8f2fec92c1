"""Continue prompts with a trained model.

    python sample.py out/quickstart --prompt="def "
    python sample.py out/gqa --prompt="ROMEO:" --num_samples=4 --max_new_tokens=200 --temperature=0.8 --top_k=50
    python sample.py out/gqa --prompts_file=prompts.txt --temperature=0 --stop=$'\\n\\n'
    python sample.py out/gqa --prompt="Q: why?" --stop='["\\nQ:", "\\nA:"]' --logprobs=true

The text goes to stdout: a single sample as it comes, several ones each when it is finished. Samples of one prompt share
its pages of the KV cache. Speed, and log-probabilities if asked for, go to stderr.
"""

import atexit
import codecs
import gc
import json
import math
import sys
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Literal

import checkpoint
from config import UserError, parse, pathname, run
from data.tokenizer import from_spec, utf8
from device import pick_device, pick_dtype
from engine import Engine, groups_of, pages_of_prompts
from paging import most_pages
from runner import page_bytes
from sequence import Request

AHEAD = 512  # samples that the engine has at a time: twice as many as it runs at once
CACHE_BYTES = 2**30  # what num_pages=0 takes at most, if one sequence does not need more


@dataclass(frozen=True)
class SampleConfig:
    prompt: Annotated[str, "text to continue; empty: start a new document"] = ""
    prompts_file: Annotated[pathname, "file with a prompt on each line, instead of prompt"] = ""
    num_samples: Annotated[int, "samples of each prompt"] = 1
    max_new_tokens: Annotated[int, "length of a sample; 0: 500, or less where learned positions end"] = 0
    temperature: Annotated[float, "0: always the likeliest token; 1: as the model says; above: wilder"] = 0.8
    top_k: Annotated[int, "draw among the k likeliest tokens; 0: no limit"] = 200
    top_p: Annotated[float, "draw among the fewest likeliest tokens that have this probability together"] = 1.0
    min_p: Annotated[float, "draw among tokens at least this many times as likely as the likeliest; 0: no limit"] = 0.0
    seed: Annotated[int, "sample i draws with seed + i, so each can be had again alone"] = 1
    stop: Annotated[str, "text that ends a sample, itself left out; several ones as a JSON list"] = ""
    logprobs: Annotated[bool, "list each token with its log-probability, on stderr"] = False
    max_window: Annotated[int, "tokens that any layer looks back on, at most; 0: max_seq_len, as in training"] = 0
    checkpoint: Annotated[Literal["newest", "best"], "best: the one with the lowest validation loss"] = "newest"
    device: Annotated[Literal["auto", "cuda", "mps", "cpu"], "auto: the best there is"] = "auto"
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], "auto: bfloat16 on GPUs that have it"] = "auto"
    compile: Annotated[bool, "fuse the model's parts: half a minute first, then more tokens/s on a GPU"] = False
    page_size: Annotated[int, "tokens in a page of the KV cache"] = 16
    num_pages: Annotated[int, "pages in the KV cache; 0: enough for all samples at once, at most 1 GiB or one sample's"] = 0

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
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p takes a share in [0, 1], got {self.min_p}")
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise ValueError(f"stop takes a text or a JSON list of texts that are not empty, got {self.stop}")

    @property
    def stop_strings(self):
        try:
            texts = json.loads(self.stop)
        except (ValueError, RecursionError):  # no JSON, or brackets upon brackets
            texts = self.stop
        return texts if isinstance(texts, list) else [self.stop] if self.stop else []


def main(argv):
    words, config = parse(argv, SampleConfig, usage=__doc__)
    if len(words) != 1 or not words[0]:
        got = " ".join(words) or "none"
        raise UserError(f"sample.py takes one run folder, as in sample.py out/quickstart, got {got}")
    prompts = [config.prompt] if not config.prompts_file else read_prompts(config.prompts_file)
    device = pick_device(config.device)
    model, state = checkpoint.load_model(words[0], device, pick_dtype(config.dtype, device), config.checkpoint)
    tokenizer = from_spec(state.get("tokenizer"))

    prompt_ids = [encode(tokenizer, number, prompt) for number, prompt in enumerate(prompts, start=1)]
    seeds = range(config.seed, config.seed + len(prompts) * config.num_samples, config.num_samples)
    requests = [request(ids, seed, tokenizer, model, config) for ids, seed in zip(prompt_ids, seeds)]
    engine = make_engine(model, tokenizer, config, requests)
    gc.freeze()  # all this stays until the end: to search it for garbage would stop the engine for 0.1 s now and then
    atexit.register(gc.unfreeze)  # else Triton reports leaks
    for number, asked in enumerate(requests, start=1):
        try:
            engine.check(asked)
        except ValueError as error:
            raise UserError(f"prompt {number}: {error}") from None

    alone = len(prompts) * config.num_samples == 1
    if alone:
        show(prompts[0])
    samples, streams = samples_of(prompts, requests, tokenizer, config.num_samples), {}
    while True:
        for asked, stream in islice(samples, AHEAD - len(streams)):
            streams[engine.add(asked)] = stream
        if not streams:
            break
        for sequence, new_tokens in engine.step():
            stream = streams[sequence]
            text = stream.push(new_tokens)
            if sequence.finished:
                text += stream.close(sequence.text)
            if alone:
                show(text)
            elif sequence.finished:
                show(f"--- {stream.name} ({sequence.finished}) ---\n{stream.prompt}{stream.text}\n")
            if sequence.finished:
                del streams[sequence]
                if config.logprobs:
                    list_logprobs(stream.name, sequence, tokenizer)
    if alone:
        show("\n")
    print(engine.stats, file=sys.stderr)


def read_prompts(path):
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a mark that is no text
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


def request(ids, seed, tokenizer, model, config):
    return Request(
        prompt=ids,
        max_new_tokens=new_tokens_of(ids, model.config, config),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        seed=seed,
        stop_tokens=() if tokenizer.eot is None else (tokenizer.eot,),
        stop_strings=tuple(utf8(text) for text in config.stop_strings),
        logprobs=0 if config.logprobs else None,
    )


def samples_of(prompts, requests, tokenizer, num_samples):
    """(request, its TextStream) of one sample after the other; all at once may be more than memory holds."""
    for number, (prompt, asked) in enumerate(zip(prompts, requests), start=1):
        for i in range(num_samples):
            stream = TextStream(f"prompt {number}, sample {i + 1}", prompt, tokenizer, asked.stop_strings)
            yield replace(asked, seed=asked.seed + i), stream


def make_engine(model, tokenizer, config, requests):
    # learned positions end before anything could be farther away than that
    max_window = config.max_window or model.config.max_seq_len
    num_pages, page_size, groups = config.num_pages, config.page_size, groups_of(model.config, max_window)
    bytes_per_page = page_bytes(model.config, groups, page_size, next(model.parameters()).dtype)
    if not num_pages:
        pages = [most_pages(groups, page_size, len(asked.prompt) + asked.max_new_tokens) for asked in requests]
        beside = pages_of_prompts(groups, page_size, sum(len(asked.prompt) for asked in requests))
        num_pages = max(max(pages), min(sum(pages) * config.num_samples, CACHE_BYTES // bytes_per_page)) + beside

    def decode(ids):
        return b"".join(tokenizer.token_bytes(id) for id in ids)

    try:
        keys = {"vocab_size": tokenizer.vocab_size, "max_window": max_window, "compile": config.compile}
        return Engine(model, num_pages, page_size, decode=decode, **keys)
    except ValueError as error:
        raise UserError(f"the checkpoint's tokenizer does not fit its model: {error}") from None


class TextStream:
    """The text of a sample as its tokens come in: whole characters, and nothing that may belong to a stop text."""

    def __init__(self, name, prompt, tokenizer, stops):
        self.name = name
        self.prompt = prompt
        self.text = ""  # given out so far
        self.token_bytes = tokenizer.token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stops = stops
        self.held = b""  # the end of the text, as long as it may be the beginning of a stop text

    def push(self, tokens):
        """Take new tokens. Returns the text that is certain now."""
        text = self.held + b"".join(self.token_bytes(token) for token in tokens)
        begun = (n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        hold = max(begun, default=0)
        self.held = text[len(text) - hold :]
        return self.give(self.decoder.decode(text[: len(text) - hold]))

    def close(self, text):
        """The sample has ended, and this is all of its text, in bytes. Returns what was held back of it."""
        return self.give(text.decode("utf-8", "replace")[len(self.text) :])

    def give(self, text):
        self.text += text
        return text


def list_logprobs(name, sequence, tokenizer):
    lines = [f"--- {name}: log-probabilities ---"]
    for token, (logprob, _) in zip(sequence.generated, sequence.logprobs):
        lines.append(f"{logprob:9.4f}  {tokenizer.decode([token])!r}")
    print("\n".join(lines), file=sys.stderr)


def show(text):
    print(text, end="", flush=True)


if __name__ == "__main__":
    run(main)
