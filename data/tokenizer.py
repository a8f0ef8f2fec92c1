"""Text to token ids and back: `byte`, `char`, or any tiktoken encoding by name (`r50k_base` has GPT-2's ranks).

    python -c "from data.tokenizer import load; print(load('byte').encode('hi'))"

Every tokenizer has
    encode(text)     list of ids; a special token's name inside the text is plain text
    decode(ids)      str; bytes that are not UTF-8 become U+FFFD
    token_bytes(id)  the bytes of one token, for text streamed through an incremental UTF-8 decoder
    vocab_size       ids lie in [0, vocab_size)
    eot              the id that ends a document, or None
    spec             a plain JSON dict that meta.json and checkpoints store; `from_spec` rebuilds the tokenizer
An id without a token (a gap in the vocabulary, or its padding) decodes to U+FFFD.
"""

import difflib

from config import UserError

END_OF_TEXT = "<|endoftext|>"
NO_TOKEN = "\ufffd".encode()


def utf8(text):
    """The text as UTF-8. A lone surrogate (JSON and command lines can hold one) becomes U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def join(tokenizer, ids):
    return b"".join(tokenizer.token_bytes(id) for id in ids).decode("utf-8", errors="replace")


class ByteTokenizer:
    """The 256 byte values and one end-of-text id."""

    vocab_size = 257
    eot = 256

    def __init__(self):
        self.spec = {"type": "byte"}

    def encode(self, text):
        return list(utf8(text))

    def decode(self, ids):
        return join(self, ids)

    def token_bytes(self, id):
        if id == self.eot:
            return END_OF_TEXT.encode()
        return bytes([id]) if 0 <= id < 256 else NO_TOKEN


class CharTokenizer:
    """One id per character of the alphabet, in sorted order as in nanoGPT; no end-of-text."""

    eot = None

    def __init__(self, alphabet):
        self.characters = sorted(set(alphabet))
        self.ids = {character: id for id, character in enumerate(self.characters)}
        self.vocab_size = len(self.characters)
        self.spec = {"type": "char", "alphabet": "".join(self.characters)}

    def encode(self, text):
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"character {error.args[0]!r} is not in this char tokenizer's alphabet of {self.vocab_size}; "
                "leave it out, or prepare and train with tokenizer=byte"
            ) from None

    def decode(self, ids):
        return join(self, ids)

    def token_bytes(self, id):
        return utf8(self.characters[id]) if 0 <= id < self.vocab_size else NO_TOKEN


class TiktokenTokenizer:
    """A byte-pair encoding of the tiktoken package, which is imported only here."""

    def __init__(self, name):
        self.encoding = load_tiktoken(name)
        self.vocab_size = self.encoding.n_vocab
        self.eot = self.encoding.eot_token if END_OF_TEXT in self.encoding.special_tokens_set else None
        self.spec = {"type": "tiktoken", "name": name}

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return join(self, ids)

    def token_bytes(self, id):
        try:
            return self.encoding.decode_single_token_bytes(id)
        except (KeyError, OverflowError):
            return NO_TOKEN


def load_tiktoken(name):
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"tokenizer {name!r} needs tiktoken: pip install tiktoken, or use tokenizer=byte") from None
    if name not in tiktoken.list_encoding_names():
        known = ["byte", "char", *tiktoken.list_encoding_names()]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown tokenizer {name!r}; the nearest is {near!r}, all are: {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # noqa: BLE001 -- tiktoken lets through whatever its download raised
        raise UserError(
            f"cannot load tokenizer {name!r} ({type(error).__name__}): tiktoken downloads its vocabulary on first use; "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use tokenizer=byte"
        ) from None


def load(name, alphabet=""):
    """The tokenizer called `name`; `alphabet` holds every character that `char` shall know."""
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer(alphabet)
    return TiktokenTokenizer(name)


def from_spec(spec):
    """The tokenizer whose `.spec` this is."""
    match spec:
        case {"type": "byte"}:
            return ByteTokenizer()
        case {"type": "char", "alphabet": str(alphabet)}:
            return CharTokenizer(alphabet)
        case {"type": "tiktoken", "name": str(name)}:
            return TiktokenTokenizer(name)
    raise UserError(f"unknown tokenizer spec {spec!r}; it takes a type of byte, char or tiktoken: prepare again")
