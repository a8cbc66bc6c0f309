"""The pages of conversations hold what they are found for, whatever was stored and replaced before."""

import random

import pytest

from clvr_jax.pipelines.qwen3_vl.prefix_tree import PrefixTree

PAGE = 4


class Store:
    """A tree with the contents of its pages, as the cache of keys and values has them."""

    def __init__(self, pages):
        self.tree, self.contents, self.pages = PrefixTree(pages, PAGE), {}, pages

    def add(self, symbols):
        new = self.tree.add(symbols)
        assert len({page for page, _ in new}) == len(new)
        for page, begin in new:
            assert 0 <= page < self.pages
            # Keys and values depend on everything before, so the contents of a page are all of it.
            self.contents[page] = tuple(symbols[: begin + PAGE])
        return new

    def find(self, symbols):
        pages, length = self.tree.find(symbols)
        assert len(pages) == -(-length // PAGE)
        for index, page in enumerate(pages):
            end = min(length, (index + 1) * PAGE)
            assert self.contents[page][:end] == tuple(symbols[:end]), "keys and values of another beginning"
        return length


def test_a_conversation_is_found_up_to_where_another_one_differs():
    store = Store(20)
    store.add(list(range(10)))
    assert store.find(list(range(30))) == 10
    assert store.find([*range(7), 99, *range(8, 30)]) == 7
    assert store.find([99, *range(1, 10)]) == 0
    assert store.find([]) == 0
    assert store.find([*range(4, 10)]) == 0, "a page has its place behind the pages before it"


def test_beginnings_share_pages():
    store = Store(20)
    assert len(store.add(list(range(10)))) == 3
    assert store.add(list(range(10))) == []
    assert store.add(list(range(9))) == [], "a part of what is stored needs no page"
    assert len(store.add([*range(8), 50, 51])) == 1
    assert len(store.tree) == 4
    assert [begin for _, begin in store.add(list(range(14)))] == [8, 12], "the incomplete page is replaced"
    assert len(store.tree) == 5
    assert store.find([*range(8), 50, 51]) == 10


def test_the_least_recently_used_pages_are_replaced():
    store = Store(6)
    store.add([1] * 12)
    store.add([2] * 12)
    assert store.find([1] * 12) == 12
    store.add([3] * 4)
    assert store.find([2] * 12) == 8, "the last page goes first"
    assert store.find([1] * 12) == 12
    assert len(store.tree) == 6
    store.add([4] * 100)
    assert store.find([4] * 100) == 24, "as much of the beginning as there are pages"
    assert store.find([1] * 12) == 0


@pytest.mark.parametrize("pages", [1, 3, 8, 40])
def test_no_history_of_additions_and_roll_backs_leaves_a_stale_page(pages):
    rng = random.Random(pages)
    store, told = Store(pages), [[]]
    for _ in range(3000):
        before = rng.choice(told)
        now = [*before[: rng.randrange(len(before) + 1)], *(rng.randrange(3) for _ in range(rng.randrange(9)))]
        found = store.find(now)
        if rng.random() < 0.7:
            store.add(now)
            assert store.find(now) == min(len(now), pages * PAGE)
            told = [*told[-30:], now]
        else:
            assert found <= len(now)
        assert len(store.tree) <= pages
