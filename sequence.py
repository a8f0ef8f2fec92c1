"""A request on its way through the engine: what was asked, the tokens so far, and where they end."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """What to continue, and how to draw. `Engine.add` checks it."""

    prompt: list[int]  # token ids
    max_new_tokens: int
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # draw among the k likeliest tokens; 0: no limit
    top_p: float = 1.0  # draw among the fewest likeliest tokens that have this probability together
    min_p: float = 0.0  # draw among tokens at least this many times as likely as the likeliest
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()  # one of these ends the sequence and is not part of it
    stop_strings: tuple[bytes, ...] = ()  # so does one of these, in what the engine's `decode` makes of the tokens
    logprobs: int | None = None  # log-probabilities of the drawn tokens, and of so many likeliest ones


class Sequence:
    """A request on its way."""

    def __init__(self, request):
        self.request = request
        self.num_prompt = len(request.prompt)
        self.longest = self.num_prompt + int(request.max_new_tokens)  # tokens with which it ends at the latest
        self.tokens = list(request.prompt)  # and what was generated, as far as it is read
        self.logprobs = []  # of each generated token, if asked for: (its log-probability, {id: of the likeliest ones})
        self.pending = 0  # tokens drawn but not read: 0 to 2
        self.drawn_at = 0  # the newest one's row in the runner's `drawn`
        self.num_computed = 0  # tokens whose K and V are in the pages, or will be when the launched steps have run
        self.keys = []  # of its first full pages, by which the page tables find them
        self.row = None  # of the page tables, while running
        self.finished = ""  # why: "length", "stop" or "cancelled"
        self.text = None  # of the generated tokens without a stop string; once finished, if the engine can decode

    @property
    def generated(self):
        return self.tokens[self.num_prompt :]

    @property
    def todo(self):
        """Tokens to compute next; none once the last one is drawn, which nobody looks at."""
        num_drawn = len(self.tokens) + self.pending
        return num_drawn - self.num_computed if num_drawn < self.longest else 0

    def ends_in_stop_string(self, decode):
        """Whether the newest token completes a stop string. Decodes no more of the text's end than it must."""
        stops, end = self.request.stop_strings, len(self.tokens)
        before = max(map(len, stops)) - 1  # bytes of a stop string that may precede the newest token
        first = max(self.num_prompt, end - 1 - before)  # enough where each token has a byte; some decode to nothing
        while first > self.num_prompt and len(decode(self.tokens[first : end - 1])) < before:
            first = max(self.num_prompt, 2 * first - end)  # twice as many tokens
        text = decode(self.tokens[first:])
        return any(stop in text for stop in stops)

    def make_text(self, decode):
        """Decode the generated tokens up to the first stop string, and drop the tokens that only belong to that."""
        text = decode(self.generated)
        found = [at for stop in self.request.stop_strings if (at := text.find(stop)) >= 0]
        self.text = text[: min(found, default=len(text))]
        while found and self.generated and decode(self.generated[:-1]).startswith(self.text):
            self.tokens.pop()
        del self.logprobs[len(self.generated) :]
