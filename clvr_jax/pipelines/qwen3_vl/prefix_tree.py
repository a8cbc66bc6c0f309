"""Which pages hold which beginnings of conversations: an index of tokens, without the keys and values themselves."""

import collections
from collections.abc import Sequence

Symbols = Sequence[int]
"""Tokens of a conversation as integers that differ where keys and values may: ids, and a number for each image."""


class _Node:
    """A page: its symbols, which follow those of its parents."""

    def __init__(self, symbols: tuple[int, ...], page: int, parent: "_Node | None"):
        self.symbols, self.page, self.parent = symbols, page, parent
        self.children: dict[tuple[int, ...], _Node] = {}


class PrefixTree:
    """The pages of all stored conversations; those that begin alike share pages.

    A page has `page_tokens` symbols, and the last one of a conversation may have fewer. A page is found by all symbols
    from the beginning of the conversation to its own, which are compared one by one, so it never belongs to another
    beginning. If all pages are taken, the least recently used one that no other page follows is used again.
    """

    def __init__(self, pages: int, page_tokens: int):
        self._pages, self._page_tokens = pages, page_tokens
        self._root = _Node((), -1, None)
        self._free = list(range(pages - 1, -1, -1))
        # From the least to the most recently used. A page is used whenever one after it is, and counts as used later.
        self._nodes: collections.OrderedDict[_Node, None] = collections.OrderedDict()

    def __len__(self) -> int:
        """Returns the number of pages that are taken."""
        return len(self._nodes)

    def find(self, symbols: Symbols) -> tuple[list[int], int]:
        """Returns the pages with the longest stored beginning of `symbols`, and its length; the last may hold more."""
        path, found = self._full_pages(symbols)
        node = path[-1] if path else self._root
        rest = symbols[found : found + self._page_tokens]
        last = max(node.children.values(), key=lambda child: common(child.symbols, rest), default=None)
        if last is not None and (count := common(last.symbols, rest)):
            path.append(last)
            found += count
        self._use(path)
        return [node.page for node in path], found

    def add(self, symbols: Symbols) -> list[tuple[int, int]]:
        """Stores a conversation, as much of its beginning as there are pages.

        Returns: the pages to be written, each with the index of its first symbol; a page may have had other contents.
        """
        path, begin = self._full_pages(symbols)
        self._use(path)
        new: list[tuple[int, int]] = []
        while begin < len(symbols) and len(path) < self._pages:
            parent = path[-1] if path else self._root
            own = tuple(symbols[begin : begin + self._page_tokens])
            if any(child.symbols[: len(own)] == own for child in parent.children.values()):
                break  # an incomplete page, of which another one has all
            for child in list(parent.children.values()):
                if own[: len(child.symbols)] == child.symbols:
                    self._drop(child)  # incomplete; the new page has all of it
            if not self._free:
                self._drop(next(iter(self._nodes)))
            node = parent.children[own] = _Node(own, self._free.pop(), parent)
            self._nodes[node] = None
            path.append(node)
            new.append((node.page, begin))
            begin += self._page_tokens
        self._use(path)
        return new

    def _full_pages(self, symbols: Symbols) -> tuple[list[_Node], int]:
        """Returns the stored pages that `symbols` begin with, complete ones only, and the number of their symbols."""
        path: list[_Node] = []
        node, begin = self._root, 0
        while begin + self._page_tokens <= len(symbols):
            child = node.children.get(tuple(symbols[begin : begin + self._page_tokens]))
            if child is None:
                break
            path.append(child)
            node, begin = child, begin + self._page_tokens
        return path, begin

    def _use(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._nodes.move_to_end(node)

    def _drop(self, node: _Node) -> None:
        assert node.parent is not None
        del self._nodes[node], node.parent.children[node.symbols]
        self._free.append(node.page)


def common(first: Symbols, second: Symbols) -> int:
    """Returns the number of equal symbols at the beginning."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
