"""Tokenizers: round trips, GPT-2's own ids, specs, and what happens when one cannot be loaded."""

import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest

from config import UserError
from data.tokenizer import from_spec, load

REPO = Path(__file__).parents[1]
TEXT = "Naïve café, 日本 🙂\r\n\tdef f(x): return x\0 <|endoftext|>"


@pytest.fixture(params=["byte", "char", "r50k_base"])
def tokenizer(request):
    if request.param == "r50k_base":
        return request.getfixturevalue("r50k")
    return load(request.param, alphabet=TEXT)


def test_round_trip_streaming_and_spec(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.eot not in ids, "the name of a special token is plain text"

    stream = codecs.getincrementaldecoder("utf-8")()
    assert "".join(stream.decode(tokenizer.token_bytes(id)) for id in ids) == TEXT

    again = from_spec(json.loads(json.dumps(tokenizer.spec)))
    assert again.encode(TEXT) == ids
    assert (again.vocab_size, again.eot, again.spec) == (tokenizer.vocab_size, tokenizer.eot, tokenizer.spec)


def test_ids_without_a_token_decode_to_the_replacement_character(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size, -1, 10**12]) == "\ufffd" * 3


def test_byte_ids_are_utf8():
    tokenizer = load("byte")
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd", "half a character"
    assert tokenizer.decode([104, 105, 256]) == "hi<|endoftext|>"


def test_lone_surrogates_become_the_replacement_character(r50k):
    for tokenizer in (load("byte"), r50k):
        assert tokenizer.decode(tokenizer.encode("a\ud800b \ud83d\ude42")) == "a\ufffdb 🙂"


def test_char_is_nanogpts():
    chars = sorted(set(TEXT))
    stoi = {ch: i for i, ch in enumerate(chars)}
    tokenizer = load("char", alphabet=TEXT)
    assert tokenizer.encode(TEXT) == [stoi[c] for c in TEXT]
    assert (tokenizer.vocab_size, tokenizer.eot) == (len(chars), None)


def test_char_names_the_unknown_character():
    with pytest.raises(UserError, match="'z' is not in"):
        load("char", alphabet="abc").encode("abz")


def test_r50k_is_gpt2s(r50k):
    assert r50k.encode("Hello world") == [15496, 995]  # as the GPT-2 paper's own encoder gives
    assert (r50k.vocab_size, r50k.eot) == (50257, 50256)
    assert r50k.decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize(("given", "nearest"), [("r50k", "r50k_base"), ("bytes", "byte"), ("GPT2", "gpt2")])
def test_unknown_name_names_the_nearest(given, nearest):
    pytest.importorskip("tiktoken")
    with pytest.raises(UserError, match=f"unknown tokenizer '{given}'; the nearest is '{nearest}'"):
        load(given)


def test_offline(monkeypatch, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")

    def no_network(path):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR"):
        load("r50k_base")


def test_tiktoken_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # import raises ImportError
    with pytest.raises(UserError, match="pip install tiktoken"):
        load("r50k_base")
    assert load("byte").encode("a") == [97]


def test_byte_does_not_import_tiktoken():
    code = "import sys; from data.tokenizer import load; load('byte').encode('a'); sys.exit('tiktoken' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


@pytest.mark.parametrize("spec", [None, {}, {"type": "word"}, {"type": "char"}, {"type": "tiktoken", "name": 3}])
def test_unknown_spec(spec):
    with pytest.raises(UserError, match="unknown tokenizer spec"):
        from_spec(spec)
