"""Who holds which page of the KV cache. Numbers only: the K and V themselves are the runner's.

    tokens of a sequence -> admit     a row of the page tables, and the pages that already hold the same beginning
                         -> reserve   new pages for the next tokens, least recently used ones first
                         -> remember  a full page is found again under the text up to its end
                         -> slide     a page behind the window goes back at once
                         -> release   all pages go back; what they hold can be found until they are taken again

A page is page_size tokens of one group of layers. Layers that see equally far form a group, cut into groups of equal
size where windows differ over the depth, so that one pool serves them all: a page that a windowed layer gives back may
next hold tokens of a global one. A page may be held by many sequences, but only when it is full, so that nobody writes
into it: the last, partly filled page of a shared beginning is computed again by each.

Between steps, which is after `slide`, a sequence holds pages of at most window + 2 * page_size positions of a windowed
group. A step that computes a long piece of a prompt holds the pages of that piece, too, while it is scheduled.

Steps run one after the other on the device. So what a step writes may be read by the next one, and by the same one too,
because a layer writes K and V of all tokens before it looks at any; and a page given back once a step is scheduled may
be written by the next one, even if that is scheduled while the step still runs. But within the scheduling of a step
nothing may be given back that this very step reads.
"""

import math
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256

import numpy as np


@dataclass(frozen=True)
class PageGroup:
    """Layers that see equally far and therefore hold the same tokens."""

    window: int  # visible keys, 0: all
    layers: tuple[int, ...]

    def first_seen(self, position):
        """The first position that the token at `position` sees."""
        return max(0, position - self.window + 1) if self.window else 0


def page_groups(windows):
    """The groups of layers with these windows: as few as are all of one size."""
    by_window = {}
    for layer, window in enumerate(windows):
        by_window.setdefault(window, []).append(layer)
    size = math.gcd(*map(len, by_window.values()))
    return [
        PageGroup(window, tuple(layers[i : i + size]))
        for window, layers in by_window.items()
        for i in range(0, len(layers), size)
    ]


def pages_for(num_tokens, page_size):
    return -(-num_tokens // page_size)


def most_touched(num_positions, page_size):
    """Pages that so many positions in a row touch at most, which is when they begin at the last slot of one."""
    return (num_positions + page_size - 2) // page_size + 1


def most_pages(groups, page_size, num_tokens):
    """Pages that a sequence of num_tokens tokens has to hold at most, computed token by token."""
    pages = pages_for(num_tokens, page_size)
    return sum(min(pages, most_touched(group.window, page_size)) if group.window else pages for group in groups)


class PageAllocator:
    """Page ids 0 to num_pages - 1, each of them free or held by one sequence or more, never both."""

    def __init__(self, num_pages):
        self.free = OrderedDict.fromkeys(range(num_pages))  # in the order in which they will be taken
        self.holders = [0] * num_pages

    @property
    def num_held(self):
        return len(self.holders) - len(self.free)

    def take(self):
        """The free page whose contents were needed least recently; the caller has made sure that there is one."""
        page, _ = self.free.popitem(last=False)
        self.holders[page] = 1
        return page

    def share(self, page):
        if not self.holders[page]:
            del self.free[page]
        self.holders[page] += 1

    def give_back(self, page, useful):
        """One holder less. A page that nobody holds any more is free; it is taken last if it is useful, else first."""
        if not self.holders[page]:
            raise ValueError(f"page {page} is given back, but nobody holds it")
        self.holders[page] -= 1
        if not self.holders[page]:
            self.free[page] = None
            self.free.move_to_end(page, last=useful)


class Prefix:
    """A page's worth of tokens and all that stands before them: texts with the same beginning share them.

    Found by `key`: a hash of all tokens before the page, and the page's own tokens. A dictionary compares these one by one,
    and those before were compared when the Prefixes before it were found. Where a windowed text has no pages any more for
    its beginning, the hash stands for them: it is SHA-256, of which nobody knows two texts that have the same. Each Prefix
    that is kept has a page, so there are no more of them than pages.
    """

    def __init__(self, key, num_groups):
        self.key = key
        self.pages = [None] * num_groups  # where each group keeps it, None: no more


class Row:
    """A sequence's row of the page tables. The page of index j has its positions j * page_size and following; group g holds
    the indices first[g] to end - 1."""

    def __init__(self, index, first, end):
        self.index = index
        self.first = first
        self.end = end
        self.known = end  # full pages that are remembered, or were found
        self.slides_at = 0  # with fewer tokens computed, no page is behind its window


class PageTables:
    """The page tables of all running sequences, one for each group, and the pool that their pages come from.

    Sequences have .tokens (ids known so far), .num_computed (tokens whose K and V are in the pages or on their way
    there), .keys (of their first full pages, filled by `key`) and .row, which is None unless they are admitted.

    tables[g][row, j % width] is the page of index j. A windowed group's table is as wide as the window and the longest
    step need, so that a sequence can go on without end in it; a global group's grows with the longest sequence.
    """

    def __init__(self, groups, num_pages, page_size, max_num_seqs, max_tokens_per_step, max_seq_len):
        self.groups = groups
        self.windowed = all(group.window for group in groups)
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self.rows = list(reversed(range(max_num_seqs)))  # free ones, the lowest is taken next
        self.tables = []
        for group in groups:
            longest = group.window + max_tokens_per_step if group.window else max_seq_len
            width = min(num_pages, pages_for(longest, page_size) + 1)
            self.tables.append(np.zeros((max_num_seqs, width), dtype=np.int32))
        self.prefixes = {}  # key -> Prefix
        self.contents = [None] * num_pages  # (Prefix, group) that a page holds, if it can be found again

    def page(self, row, group, index):
        table = self.tables[group]
        return int(table[row.index, index % table.shape[1]])

    def put(self, row, group, index, page):
        table = self.tables[group]
        if index >= table.shape[1] and not self.groups[group].window:
            self.tables[group] = table = np.pad(table, ((0, 0), (0, table.shape[1])))
        table[row.index, index % table.shape[1]] = page

    def admit(self, sequence):
        """Give the sequence a row and what is known of its tokens. False when no row is free, or too few pages are for the
        tokens that were not found."""
        if not self.rows:
            return False
        found = self.find(sequence)
        position = len(found) * self.page_size
        first = [group.first_seen(position) // self.page_size for group in self.groups]
        shared = [(g, j, found[j].pages[g]) for g in range(len(first)) for j in range(first[g], len(found))]
        missing = most_pages(self.groups, self.page_size, len(sequence.tokens)) - len(shared)
        left = len(self.allocator.free) - sum(not self.allocator.holders[page] for *_, page in shared)
        if missing > left:
            return False
        row = Row(self.rows.pop(), first, len(found))
        for group, index, page in shared:
            self.allocator.share(page)
            self.put(row, group, index, page)
        sequence.row = row
        sequence.num_computed = position
        return True

    def key(self, sequence, index):
        """The `Prefix.key` of the sequence's page of that index. Made once, and after that of the page before it."""
        if index == len(sequence.keys):
            before = sha256(b"".join(sequence.keys[-1])).digest() if index else b""
            tokens = array("q", sequence.tokens[index * self.page_size : (index + 1) * self.page_size])
            sequence.keys.append((before, tokens.tobytes()))
        return sequence.keys[index]

    def find(self, sequence):
        """The longest known beginning of the tokens, as Prefixes; the last token is left to compute, for its logits.

        A group must still have the pages that the next token sees, not those behind its window. Where no group has a page
        any more, it is None in place of a Prefix.
        """
        found, longest = [], 0
        in_a_row = [0] * len(self.groups)  # how many of the last pages a group has, without a gap
        for index in range((len(sequence.tokens) - 1) // self.page_size):
            prefix = self.prefixes.get(self.key(sequence, index))
            if prefix is None and not self.windowed:
                break  # a global group needs all pages
            found.append(prefix)
            enough = prefix is not None  # and whether every group has all pages that the next token sees
            for g, group in enumerate(self.groups):
                in_a_row[g] = in_a_row[g] + 1 if prefix and prefix.pages[g] is not None else 0
                enough &= len(found) - in_a_row[g] <= group.first_seen(len(found) * self.page_size) // self.page_size
            if enough:
                longest = len(found)
        return found[:longest]

    def reserve(self, sequence, num_tokens):
        """Pages for the next num_tokens tokens, or for as many as there are pages for. Returns their number."""
        row, start = sequence.row, sequence.num_computed
        if start + num_tokens <= row.end * self.page_size:
            return num_tokens  # as for most tokens that are decoded
        most = row.end + len(self.allocator.free) // len(self.groups)
        num_tokens = min(num_tokens, most * self.page_size - start)
        for index in range(row.end, pages_for(start + num_tokens, self.page_size)):
            for group in range(len(self.groups)):
                page = self.allocator.take()
                self.forget(page)
                self.put(row, group, index, page)
            row.end = index + 1
        return num_tokens

    def remember(self, sequence):
        """Let full pages be found again, once their tokens are known and are, or are about to be, in the cache."""
        row = sequence.row
        full = min(sequence.num_computed, len(sequence.tokens)) // self.page_size
        for index in range(row.known, full):
            key = self.key(sequence, index)
            prefix = self.prefixes.get(key) or Prefix(key, len(self.groups))
            for group in range(len(self.groups)):
                if index >= row.first[group] and prefix.pages[group] is None:
                    prefix.pages[group] = page = self.page(row, group, index)
                    self.contents[page] = prefix, group
                    self.prefixes[key] = prefix
            row.known = index + 1

    def forget(self, page):
        """The page is about to hold something else."""
        if self.contents[page] is None:
            return
        prefix, group = self.contents[page]
        self.contents[page] = prefix.pages[group] = None
        if not any(page is not None for page in prefix.pages):
            del self.prefixes[prefix.key]

    def slide(self, sequence):
        """Give back the pages that neither the next token nor a later one sees. Called once a step is scheduled."""
        row = sequence.row
        if sequence.num_computed < row.slides_at:
            return  # as most times: nothing has left a window
        row.slides_at = math.inf
        for g, group in enumerate(self.groups):
            if group.window:
                first = group.first_seen(sequence.num_computed) // self.page_size
                for index in range(row.first[g], first):
                    self.give_back(self.page(row, g, index))
                row.first[g] = first
                row.slides_at = min(row.slides_at, (first + 1) * self.page_size + group.window - 1)

    def release(self, sequence):
        """Give everything back, the end of the text first: its beginning is likelier to be needed again."""
        row = sequence.row
        for index in reversed(range(min(row.first), row.end)):
            for group in range(len(self.groups)):
                if index >= row.first[group]:
                    self.give_back(self.page(row, group, index))
        self.rows.append(row.index)
        sequence.row = None
        sequence.num_computed = 0

    def give_back(self, page):
        self.allocator.give_back(page, useful=self.contents[page] is not None)
