"""Pages: free or held and never both, found again under their whole text, given back behind a window."""

import random
from types import SimpleNamespace

import pytest

from paging import PageAllocator, PageTables, most_pages, page_groups

PAGE = 4


def tables_of(num_pages, windows=(0,), max_num_seqs=8, longest_step=16):
    return PageTables(page_groups(windows), num_pages, PAGE, max_num_seqs, longest_step, max_seq_len=16)


def new_sequence(tokens):
    return SimpleNamespace(tokens=list(tokens), num_computed=0, keys=[], row=None)


def find(tables, tokens):
    return tables.find(new_sequence(tokens))


def compute(tables, sequence, n=None):
    """What a step does with the next n tokens, all of them when None. Returns how many there were pages for."""
    n = tables.reserve(sequence, len(sequence.tokens) - sequence.num_computed if n is None else n)
    sequence.num_computed += n
    tables.remember(sequence)
    tables.slide(sequence)
    return n


def admitted(tables, tokens):
    sequence = new_sequence(tokens)
    assert tables.admit(sequence)
    return sequence


def pages_of(tables, sequence, group=0):
    row = sequence.row
    return [tables.page(row, group, index) for index in range(row.first[group], row.end)]


def check_tables(tables, sequences):
    """free + held = all, a page has as many holders as hold it, and what is remembered is where it is said to be."""
    allocator, holders = tables.allocator, [0] * len(tables.allocator.holders)
    rows = [sequence.row.index for sequence in sequences if sequence.row]
    for sequence in sequences:
        for group in range(len(tables.groups)) if sequence.row else ():
            pages = pages_of(tables, sequence, group)
            assert len(set(pages)) == len(pages)
            for page in pages:
                holders[page] += 1
    assert allocator.holders == holders
    assert {page for page, n in enumerate(holders) if not n} == set(allocator.free)
    assert sorted(rows + tables.rows) == list(range(len(rows) + len(tables.rows)))
    for prefix in tables.prefixes.values():
        assert any(page is not None for page in prefix.pages)
        assert all(page is None or tables.contents[page] == (prefix, g) for g, page in enumerate(prefix.pages))
    assert all(tables.prefixes[prefix.key] is prefix for prefix, _ in filter(None, tables.contents))


def test_a_page_given_back_twice_is_an_error():
    allocator = PageAllocator(3)
    page = allocator.take()
    allocator.give_back(page, useful=False)
    with pytest.raises(ValueError, match=f"page {page} is given back, but nobody holds it"):
        allocator.give_back(page, useful=False)


def test_useless_pages_leave_first_then_the_least_recently_used():
    allocator = PageAllocator(4)
    a, b, c, d = (allocator.take() for _ in range(4))
    for page, useful in ((b, True), (d, False), (a, True), (c, True)):
        allocator.give_back(page, useful)
    allocator.share(b)  # used again
    allocator.give_back(b, True)
    assert [allocator.take() for _ in range(4)] == [d, a, c, b]


def test_groups_are_of_one_size_so_that_any_page_serves_any_of_them():
    assert [(g.window, g.layers) for g in page_groups((0, 0, 0))] == [(0, (0, 1, 2))]
    assert [(g.window, g.layers) for g in page_groups((5, 5, 5, 0, 5, 5, 5, 0))] == [
        (5, (0, 1)),
        (5, (2, 4)),
        (5, (5, 6)),
        (0, (3, 7)),
    ]
    assert len(page_groups((5, 0, 5))) == 3


@pytest.mark.parametrize("window", [0, 1, 2, 3, 4, 5, 7, 8, 9, 30])
@pytest.mark.parametrize("page_size", [1, 2, 4, 7])
def test_the_most_pages_are_those_of_the_token_that_sees_most(window, page_size):
    (group,), most = page_groups((window,)), 0
    for position in range(60):
        most = max(most, len({seen // page_size for seen in range(group.first_seen(position), position + 1)}))
        assert most_pages([group], page_size, position + 1) == most


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 9, 30])
def test_a_windowed_sequence_goes_on_without_end_in_few_pages(window):
    tables = tables_of(most_pages(page_groups((window,)), PAGE, 10**9), (window,), longest_step=1)
    sequence = admitted(tables, range(1))
    most = 0
    for _ in range(200):
        assert compute(tables, sequence) == 1
        held = pages_of(tables, sequence)
        most = max(most, len(held))
        assert len(held) * PAGE <= window + 2 * PAGE
        first = sequence.row.first[0] * PAGE
        assert first <= max(0, sequence.num_computed - window + 1) < first + PAGE  # what the next token sees, no more
        sequence.tokens.append(sequence.tokens[-1] + 1)
        check_tables(tables, [sequence])
    assert most <= len(tables.allocator.holders) and tables.tables[0].shape == (8, len(tables.allocator.holders))


def test_windowed_groups_hold_their_window_and_global_ones_everything():
    tables = tables_of(100, (5, 0))
    sequence = admitted(tables, range(60))
    while sequence.num_computed < 60:
        compute(tables, sequence, min(16, 60 - sequence.num_computed))
        check_tables(tables, [sequence])
    assert [len(pages_of(tables, sequence, group)) for group in (0, 1)] == [1, 15]
    assert tables.tables[1].shape[1] >= 15  # grown


def test_too_few_pages_give_as_many_tokens_as_fit():
    tables = tables_of(3)
    first = admitted(tables, range(6))
    assert compute(tables, first) == 6
    second = admitted(tables, [9] * 4)
    assert compute(tables, second) == 4
    second.tokens += [1]
    assert compute(tables, second) == 0
    assert not tables.admit(new_sequence([7]))
    tables.release(first)
    assert compute(tables, second) == 1
    check_tables(tables, [first, second])


def test_rows_run_out():
    tables = tables_of(10, max_num_seqs=1)
    first, second = admitted(tables, [1]), new_sequence([2])
    assert not tables.admit(second)
    tables.release(first)
    assert tables.admit(second)


# Text found again


@pytest.mark.parametrize("windows", [(0,), (9,), (9, 0)])
def test_a_beginning_is_shared_page_by_page(windows):
    tables = tables_of(60, windows)
    text = list(range(20))
    first = admitted(tables, text + [90])
    compute(tables, first)
    for tokens, found in (
        (text + [90], 20),
        (text + [91, 92], 20),
        (text[:19] + [93] * 3, 16),
        (text, 16),
        ([93] + text, 0),
        (text[4:], 0),  # the same page of tokens behind another text
    ):
        other = admitted(tables, tokens)
        assert other.num_computed == found
        for group in range(len(tables.groups)):
            indices = range(other.row.first[group], other.row.end)
            if indices and indices[0] >= first.row.first[group]:
                assert pages_of(tables, other, group) == [tables.page(first.row, group, index) for index in indices]
        check_tables(tables, [first, other])
        tables.release(other)


def test_a_full_prefix_hit_at_an_exact_multiple_of_the_page_size():
    """The last token is computed again all the same: without it there are no logits."""
    tables = tables_of(10)
    first = admitted(tables, range(3 * PAGE))
    compute(tables, first)
    second = admitted(tables, range(3 * PAGE))
    assert second.num_computed == 2 * PAGE
    assert compute(tables, second) == PAGE
    assert pages_of(tables, second)[:2] == pages_of(tables, first)[:2]
    assert pages_of(tables, second)[2] not in pages_of(tables, first)
    check_tables(tables, [first, second])


def test_a_stale_hash_never_returns_another_texts_pages_after_a_page_is_reused():
    tables = tables_of(4)
    first = admitted(tables, range(8))
    compute(tables, first)
    tables.release(first)
    second = admitted(tables, [50 + i for i in range(14)])
    compute(tables, second)  # takes all four pages
    assert not find(tables, list(range(8)))
    tables.release(second)
    assert len(find(tables, [50 + i for i in range(14)])) == 3
    check_tables(tables, [first, second])


def test_texts_whose_hashes_collide_are_told_apart():
    collide = 2**61 - 1  # Python's hash of n and of n + this are the same
    one, other = tuple(range(1, 5)), tuple(n + collide for n in range(1, 5))
    assert hash((0, one)) == hash((0, other)) and one != other
    tables = tables_of(10)
    compute(tables, admitted(tables, one + (9,)))
    assert find(tables, one + (9,)) and not find(tables, other + (9,))
    assert len(find(tables, one + one + (9,))) == 1


def test_a_page_behind_a_forgotten_one_is_not_found_under_a_new_text_in_its_place():
    tables = tables_of(3)
    first = admitted(tables, range(12))
    compute(tables, first)
    tables.forget(pages_of(tables, first)[0])
    assert not find(tables, list(range(13)))
    tables.release(first)
    again = admitted(tables, [7] * 4)  # reuses a page, and its number is a new one
    compute(tables, again)
    assert len(find(tables, [7] * 4 + list(range(4, 12)))) == 1
    check_tables(tables, [first, again])


def test_a_windowed_group_needs_only_the_pages_that_the_next_token_sees():
    tables = tables_of(30, (5, 0))
    text = list(range(24))
    first = admitted(tables, text)
    compute(tables, first, 16)
    compute(tables, first, 8)
    windowed = [prefix.pages[0] for prefix in find(tables, text + [99])]
    for page in windowed[:4]:
        tables.forget(page)  # as when others have taken them
    second = admitted(tables, text + [99])
    assert second.num_computed == 24 and second.row.first == [5, 0]
    tables.forget(windowed[5])
    assert len(find(tables, text + [99])) == 5  # a shorter beginning, which ends with a page that is still there
    tables.forget(windowed[4])
    assert not find(tables, text + [99])
    check_tables(tables, [first, second])


@pytest.mark.parametrize("windows", [(6,), (6, 9), (1,)])
def test_the_end_of_a_windowed_text_is_found_when_its_beginning_is_not_kept(windows):
    """In pages far fewer than those of the text; what is known of it takes no more room than they do."""
    num_pages = 6 * len(windows)
    tables, text = tables_of(num_pages, windows), list(range(1000))
    first = admitted(tables, text)
    while first.num_computed < 1000:
        compute(tables, first, 1)
        assert len(tables.prefixes) <= num_pages
    tables.release(first)
    assert not find(tables, text[:9])
    for end, found in ((1000, 996), (999, 996), (996, 992), (500, 0)):
        second = admitted(tables, text[:end])
        assert second.num_computed == found
        check_tables(tables, [second])
        tables.release(second)
    assert not find(tables, [5] + text[1:])  # the same pages of tokens behind another beginning
    assert not find(tables, text[4:])


def test_a_text_of_a_global_group_is_found_again_once_its_beginning_is_computed_again():
    tables, text = tables_of(9), list(range(16))
    first = admitted(tables, text)
    compute(tables, first)
    tables.forget(pages_of(tables, first)[0])
    assert not find(tables, text)
    second = admitted(tables, text[:5])
    compute(tables, second)
    assert len(find(tables, text + [99])) == 4
    check_tables(tables, [first, second])


def test_a_preempted_sequence_finds_its_own_pages_and_the_end_of_a_text_leaves_first():
    tables = tables_of(5)
    first = admitted(tables, range(14))
    compute(tables, first)
    tables.release(first)
    assert first.num_computed == 0 and len(find(tables, first.tokens)) == 3
    other = admitted(tables, [70 + i for i in range(10)])
    compute(tables, other)  # the unused page, that with two tokens, and the last of the full ones
    assert not tables.admit(first)  # there are two pages left, and it needs four
    tables.release(other)
    assert tables.admit(first) and first.num_computed == 8
    check_tables(tables, [first, other])


@pytest.mark.parametrize("windows", [(0,), (6,), (6, 0), (6, 6, 0, 3)])
def test_20000_random_operations_keep_the_invariant(windows):
    generator = random.Random(0)
    groups = page_groups(windows)
    tables = tables_of(16 * len(groups), windows, max_num_seqs=5)
    waiting, running, found = [], [], 0
    for _ in range(20_000):
        action = generator.random()
        if action < 0.1 and len(waiting) < 9:
            waiting.append(new_sequence(generator.randrange(2) for _ in range(generator.randrange(1, 30))))
        elif action < 0.2 and waiting:
            sequence = waiting.pop(generator.randrange(len(waiting)))
            admitted = tables.admit(sequence)
            (running if admitted else waiting).append(sequence)
            found += sequence.num_computed
        elif action < 0.25 and running:
            sequence = running.pop(generator.randrange(len(running)))
            tables.release(sequence)
            waiting += [sequence] if generator.random() < 0.5 else []
        elif running:
            sequence = generator.choice(running)
            todo = len(sequence.tokens) - sequence.num_computed
            compute(tables, sequence, min(todo, generator.randrange(1, 17)))
            sequence.tokens += [generator.randrange(2)] if len(sequence.tokens) < 60 else []
        check_tables(tables, waiting + running)
    assert found > 400
    for sequence in running:
        tables.release(sequence)
    assert tables.allocator.num_held == 0
