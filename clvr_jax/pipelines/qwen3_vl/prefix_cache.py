"""Keys and values of earlier conversations, for conversations that begin alike."""

import collections
import functools
import hashlib
import itertools
import math
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.models.common.decoding import Prefix
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.qwen3_vl.image_buckets import TOKENS, bucket_of
from clvr_jax.models.qwen3_vl.model import DecodeCache
from clvr_jax.models.qwen3_vl.positions import Conversation, merged_tokens
from clvr_jax.pipelines.qwen3_vl.prefix_tree import PrefixTree, common
from clvr_jax.programs import StoredFunction
from clvr_jax.sharding import active_layout, with_logical_constraint

PAGE_TOKENS = 16
MIN_PREFIX = 32
"""Fewest tokens of a stored beginning that is used."""
MIN_SHARED = 64
"""Fewest tokens that conversations of one call must share, and that are not stored, to be processed before the rest."""
_MAX_IMAGES = 4096
_AXES = (None, None, None, "heads", None)
"""Logical axes of the pages: page, token, layer, head, head dimension."""

Pages = tuple[Float[Array, "n t l k h"], Float[Array, "n t l k h"]]
"""Keys and values."""


class PrefixCache:
    """Keys and values of earlier conversations with one model, in a fixed amount of memory.

    They are stored in pages of 16 tokens. Conversations that begin alike share pages; if all pages are taken, the least
    recently used are replaced. A page is found by all token ids and images (their SHA-256) from the beginning of the
    conversation to its end, so no conversation gets the keys and values of another beginning. On a mesh, heads are
    sharded.

    Args:
      config: of the model.
      dtype: of its keys and values.
      gib: memory for the pages on each device, in GiB.

    Attributes:
      prompt_tokens, computed_tokens: number of tokens of all prompts so far, and how many of them were computed.

    Raises: UsageError for a size that is not finite or holds no page; ClvrError if a device has not so much memory.
    """

    def __init__(self, config: Qwen3VLConfig, dtype: DTypeLike, gib: float):
        text = config.text
        page = (PAGE_TOKENS, text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
        layout = active_layout()
        self._sharding = None if layout is None else layout.sharding(_AXES, (1, *page))
        on_device = (1, *page) if self._sharding is None else self._sharding.shard_shape((1, *page))
        page_bytes = 2 * math.prod(on_device) * jnp.dtype(dtype).itemsize
        if not math.isfinite(gib) or gib * 2**30 < page_bytes:
            raise UsageError(
                f"prefix cache: {gib} GiB must be a finite number, and hold a page of this model, {page_bytes} bytes"
            )
        self._config, self._dtype, self._gib = config, dtype, gib
        self._shape = (int(gib * 2**30 / page_bytes), *page)
        self._pages: Pages
        self._tree: PrefixTree
        self._lock = threading.Lock()
        self._images: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._next_image = itertools.count(1)
        self.prompt_tokens = self.computed_tokens = 0
        self._reset()

    @property
    def page_count(self) -> int:
        """Number of pages."""
        return self._shape[0]

    @property
    def used_pages(self) -> int:
        """Number of pages that hold a part of a conversation."""
        return len(self._tree)

    def clear(self) -> None:
        """Forgets all conversations, for other weights."""
        with self._lock:
            self._tree = PrefixTree(self.page_count, PAGE_TOKENS)

    def count(self, *, prompt: int = 0, computed: int = 0) -> None:
        """Adds to `prompt_tokens` and `computed_tokens`."""
        with self._lock:
            self.prompt_tokens += prompt
            self.computed_tokens += computed

    def symbols(self, conversation: Conversation) -> list[int]:
        """Returns the tokens of a conversation as integers: ids, and at the tokens of an image its number, negative.

        Images have the same number if they have the same patches and grid.
        """
        ids = np.array(conversation.input_ids, np.int64)
        if conversation.pixel_values is not None:
            counts = merged_tokens(conversation.grid_thw, self._config.vision.spatial_merge_size)
            ends = np.cumsum([t * h * w for t, h, w in conversation.grid_thw])
            patches = np.split(conversation.pixel_values, ends[:-1])
            numbers = [self._image_number(*image) for image in zip(patches, conversation.grid_thw, strict=True)]
            ids[ids == self._config.image_token_id] = -np.repeat(np.array(numbers, np.int64), counts)
        found: list[int] = ids.tolist()
        return found

    def shared(self, conversations: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Returns the beginnings that several conversations of one call share and that are not stored.

        Args:
          conversations: the `symbols` of each.
        Returns: for each beginning a conversation that has it, and its number of tokens.
        """
        with self._lock:
            stored = [self._find(symbols)[1] for symbols in conversations]
        order = sorted(range(len(conversations)), key=lambda row: list(conversations[row]))
        found: list[tuple[int, int]] = []
        continues = False  # whether the last beginning found is also that of `row`
        for row, following in itertools.pairwise(order):
            own, next_own = conversations[row], conversations[following]
            length = _whole_images(own, min(common(own, next_own), len(own) - 1, len(next_own) - 1))
            is_new = length >= max(stored[row], stored[following]) + MIN_SHARED
            if is_new and continues:
                found[-1] = row, min(length, found[-1][1])
            elif is_new:
                found.append((row, length))
            continues = is_new
        return found

    def prefix(
        self, conversations: Sequence[Sequence[int]], input_ids: Sequence[Sequence[int]]
    ) -> tuple[list[int], Prefix | None]:
        """Returns the stored beginnings of the conversations of one call.

        At least one token of each conversation is left, and no image is divided.

        Args:
          conversations: the `symbols` of each.
          input_ids: token ids of each.
        Returns: the number of tokens of each beginning; and keys and values, None if they would save nothing.
        """
        with self._lock:
            found = [self._find(symbols) for symbols in conversations]
            lengths = [length for _, length in found]
            most = max(map(len, conversations))
            left = max(len(symbols) - length for symbols, length in zip(conversations, lengths, strict=True))
            if bucket_of(left, TOKENS) >= bucket_of(most, TOKENS):
                return [0] * len(found), None
            shape = (len(found), prefix_bucket(max(lengths)))
            table, ids = np.zeros((shape[0], shape[1] // PAGE_TOKENS), np.int32), np.zeros(shape, np.int32)
            for row, (pages, length) in enumerate(found):
                table[row, : len(pages)] = pages
                ids[row, :length] = input_ids[row][:length]
            key, value = _read(self._pages, table)
        return lengths, Prefix(key, value, np.arange(shape[1]) < np.array(lengths)[:, None], ids)

    def store(self, cache: DecodeCache, conversations: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Stores conversations.

        Args:
          cache: keys and values of a call.
          conversations: for each row, the `symbols` of prompt and reply, and the slot of the cache of each.
        """
        with self._lock:
            writes: dict[int, tuple[int, Sequence[int]]] = {}
            try:
                for row, (symbols, slots) in enumerate(conversations):
                    # A page that an earlier row got may have been taken for this one.
                    pages = self._tree.add(symbols)
                    writes |= {page: (row, slots[begin : begin + PAGE_TOKENS]) for page, begin in pages}
                if not writes:
                    return
                number = 1 << (len(writes) - 1).bit_length()
                pages_n, rows_n = np.full(number, self.page_count, np.int32), np.zeros(number, np.int32)
                slots_nt = np.zeros((number, PAGE_TOKENS), np.int32)
                for index, (page, (row, own)) in enumerate(writes.items()):
                    pages_n[index], rows_n[index], slots_nt[index, : len(own)] = page, row, own
                self._pages = _write(self._pages, (cache.key, cache.value), pages_n, rows_n, slots_nt)
            except BaseException:
                self._reset()  # the pages were given to the program, and the tree may name some that were not written
                raise

    def _reset(self) -> None:
        def allocate() -> Pages:
            return jnp.zeros(self._shape, self._dtype), jnp.zeros(self._shape, self._dtype)

        try:
            self._pages = jax.block_until_ready(jax.jit(allocate, out_shardings=self._sharding)())
        except jax.errors.JaxRuntimeError as error:
            raise ClvrError(
                f"prefix cache: a device has no memory for {self._gib} GiB; give the cache less, or none"
            ) from error
        self._tree = PrefixTree(self.page_count, PAGE_TOKENS)

    def _find(self, symbols: Sequence[int]) -> tuple[list[int], int]:
        """Returns the pages of the longest beginning that may be used, and its length."""
        pages, length = self._tree.find(symbols[:-1])
        length = _whole_images(symbols, length)
        return (pages[: -(-length // PAGE_TOKENS)], length) if length >= MIN_PREFIX else ([], 0)

    def _image_number(self, patches_np: np.ndarray, grid: tuple[int, int, int]) -> int:
        digest = hashlib.sha256(str((grid, patches_np.dtype, patches_np.shape)).encode())
        digest.update(np.ascontiguousarray(patches_np).data)
        key = digest.digest()
        with self._lock:
            if key not in self._images:
                # A number is never given a second time: pages with an image that is forgotten here are not found again.
                self._images[key] = next(self._next_image)
                if len(self._images) > _MAX_IMAGES:
                    self._images.popitem(last=False)
            self._images.move_to_end(key)
            return self._images[key]


def prefix_bucket(tokens: int) -> int:
    """Returns the number of tokens that prefixes are padded to: a power of two, or the middle between two, from 64."""
    bucket = 64
    while bucket < tokens:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket // 3 * 4
    return bucket


def _whole_images(symbols: Sequence[int], length: int) -> int:
    """Returns the length of the beginning without an image that it contains a part of."""
    is_inside = 0 < length < len(symbols) and symbols[length - 1] == symbols[length] < 0
    while is_inside and length > 0 and symbols[length - 1] == symbols[length]:
        length -= 1
    return length


@StoredFunction
def _read(pages: Pages, table_bn: Int[Array, "b n"]) -> Pages:
    """Returns the tokens of pages one after another, (layers, b, tokens, kv_heads, head_dim)."""

    def read(pages_ntlkh: jax.Array) -> jax.Array:
        own_bntlkh = pages_ntlkh[table_bn]
        b, n, t, *rest = own_bntlkh.shape
        return with_logical_constraint(
            jnp.moveaxis(own_bntlkh.reshape(b, n * t, *rest), 2, 0), None, "batch", None, "heads", None
        )

    return read(pages[0]), read(pages[1])


@functools.partial(StoredFunction, donate_argnums=0)
def _write(
    pages: Pages,
    cache: tuple[jax.Array, jax.Array],
    pages_n: Int[Array, " n"],
    rows_n: Int[Array, " n"],
    slots_nt: Int[Array, "n t"],
) -> Pages:
    """Copies slots of a cache into pages; a number of a page that does not exist is left out."""

    def write(pages_ntlkh: jax.Array, cache_lbksh: jax.Array) -> jax.Array:
        new_ntlkh = cache_lbksh[:, rows_n[:, None], :, slots_nt]
        return with_logical_constraint(pages_ntlkh.at[pages_n].set(new_ntlkh, mode="drop"), *_AXES)

    return write(pages[0], cache[0]), write(pages[1], cache[1])
