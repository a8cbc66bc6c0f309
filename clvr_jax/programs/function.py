"""Jitted functions whose compiled programs are stored, so that the next process loads them and traces nothing."""

import contextlib
import functools
import inspect
import logging
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from clvr_jax.compilation import drop_with_caches, without_compilation_cache
from clvr_jax.programs.fingerprint import NotStorableError
from clvr_jax.programs.settings import active_store
from clvr_jax.programs.signature import (
    Signature,
    call_parts,
    content_key,
    devices_of,
    disk_key,
    sharding_parts,
    signature,
)
from clvr_jax.programs.store import ProgramStore

_log = logging.getLogger("clvr.programs")

Result = TypeVar("Result")

FIND_EVENT = "/clvr_jax/programs/find_duration"
"""The event of JAX's monitoring that reports how long it took to find a program: to load it, or to compile it."""


class MadeProgram(NamedTuple):
    """A program that was asked for inside `making_programs`.

    key: tells programs apart. name: of the function. is_new: whether it was compiled, not read. nbytes: of the stored
    program, 0 if it cannot be stored. seconds: to compile or to read it.
    """

    key: str
    name: str
    is_new: bool
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class _Out:
    """Type of a result; no pytree, so that a tree of them has the structure of the results."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class _Program:
    compiled: jax.stages.Compiled
    outputs: Any
    """Tree of `_Out`."""


@dataclass(frozen=True)
class _Making:
    report: Callable[[MadeProgram], None]
    is_run: bool


_making: _Making | None = None
_functions: "weakref.WeakSet[StoredFunction[Any]]" = weakref.WeakSet()


class StoredFunction(Generic[Result]):
    """A function under `jax.jit` that looks for its programs in the store of the process.

    Without a store, inside of another traced function, in a program of several processes, and for a call whose program
    cannot be stored, it is the jitted function; results are the same, bit for bit, as the programs are the same. Other
    attributes, such as `lower`, are those of the jitted function.

    Args:
      function: its module belongs to this package, unless it is traced.
      static_argnums, static_argnames, donate_argnums, out_shardings: of `jax.jit`.
      trace: a function without a fingerprint, such as one that depends on code outside of this package, is traced by
        every process, and its program is found by what it lowers to. Otherwise such a function has no stored program.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        *,
        static_argnums: int | Sequence[int] | None = None,
        static_argnames: str | Sequence[str] | None = None,
        donate_argnums: int | Sequence[int] | None = None,
        out_shardings: Any = None,
        trace: bool = False,
    ) -> None:
        options = {} if out_shardings is None else {"out_shardings": out_shardings}
        jit: Callable[..., Any] = functools.partial(
            jax.jit,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate_argnums=donate_argnums,
            **options,
        )

        @functools.wraps(function)
        def to_store(*args: Any, **named: Any) -> Result:
            return function(*args, **named)

        # What is stored is compiled for it: JAX keeps the program of a function, and one that it has read from its own
        # cache for a CPU cannot be serialized.
        self._jitted: Callable[..., Result] = jit(function)
        self._jitted_to_store = jit(to_store)
        functools.update_wrapper(self, function)
        numbers = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums or ())
        names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames or ())
        parameters = list(inspect.signature(function).parameters)
        self._static_names = frozenset({*names, *(parameters[number] for number in numbers)})
        self._static_numbers = frozenset({*numbers, *(parameters.index(name) for name in names)})
        self._key = (function, numbers, names, donate_argnums)
        self._out_shardings, self._trace = out_shardings, trace
        self._programs: dict[Signature, _Program | None] = {}
        self._lock = threading.RLock()
        _functions.add(self)

    def __call__(self, *args: Any, **named: Any) -> Result:
        """Calls the function."""
        store = active_store()
        is_disabled: bool = getattr(jax.config, "jax_disable_jit")  # noqa: B009 - not in JAX's types
        if store is None or is_disabled or jax.process_count() > 1:
            return self._jitted(*args, **named)
        static: list[tuple[int | str, Any]]
        static = [(number, args[number]) for number in sorted(self._static_numbers) if number < len(args)]
        static += sorted((name, value) for name, value in named.items() if name in self._static_names)
        dynamic = [value for number, value in enumerate(args) if number not in self._static_numbers]
        traced = {name: value for name, value in named.items() if name not in self._static_names}
        own = signature(tuple(static), dynamic, traced)
        if own is None:
            return self._jitted(*args, **named)
        if own not in self._programs:
            with self._lock:
                if own not in self._programs:
                    self._programs[own] = self._find(store, own, args, named)
        program = self._programs.get(own)
        if program is None:
            return self._jitted(*args, **named)
        result: Result
        if _making is not None and not _making.is_run and (result := _zeros(program, own)) is not None:
            return result
        result = program.compiled(*dynamic, **traced)
        return result

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the jitted function."""
        if name.startswith("__") or name == "_jitted":
            raise AttributeError(name)
        return getattr(self._jitted, name)

    def drop(self) -> None:
        """Forgets the programs in memory; they are read again when they are needed."""
        self._programs = {}

    def _find(self, store: ProgramStore, own: Signature, args: Any, named: Any) -> _Program | None:
        """Returns the program of a call: from the store, or compiled and stored; None if it cannot be stored."""
        began = time.monotonic()
        name = getattr(self, "__name__", "function")
        try:
            devices = devices_of(own)
            key = self._disk_key(own, devices[0].client)
        except NotStorableError as error:
            _log.info("%s: its program is not stored: %s", name, error)
            return None
        nbytes, program = (0, None) if key is None else _read(store, key, own, devices)
        if is_new := program is None:
            nbytes, is_new, program = self._make(store, key, own, devices, args, named)
        seconds = time.monotonic() - began
        jax.monitoring.record_event_duration_secs(FIND_EVENT, seconds)
        if _making is not None:
            _making.report(MadeProgram(key or "", name, is_new, nbytes, seconds))
        return program

    def _disk_key(self, own: Signature, client: Any) -> str | None:
        """Returns the key by which a program is found without tracing, None if it has to be traced."""
        try:
            return disk_key((*self._key, *sharding_parts(self._out_shardings)), own, client)
        except NotStorableError:
            if not self._trace:
                raise
            call_parts(own)  # what is lowered does not say everything about the arguments
            return None

    def _make(
        self, store: ProgramStore, key: str | None, own: Signature, devices: list[jax.Device], args: Any, named: Any
    ) -> tuple[int, bool, _Program]:
        """Traces a call and stores its program; returns its bytes, whether it was compiled, and the program."""
        lowered = self._jitted_to_store.lower(*args, **named)
        outputs = jax.tree.map(lambda each: _Out(tuple(each.shape), each.dtype), lowered.out_info)
        content = content_key(own, devices[0].client, lowered) or key
        if content is None:
            return 0, True, _Program(lowered.compile(), outputs)
        entry = pickle.dumps((content, outputs))
        nbytes, program = _load(store, content, outputs, own, devices)
        if program is not None:
            if key is not None:
                store.write_key(key, entry)
            return nbytes, False, program
        with without_compilation_cache():
            compiled = lowered.compile()
        try:
            serialized, in_tree, out_tree = serialize(compiled)
            deserialize_and_load(serialized, in_tree, out_tree, devices[0].client, devices)
        except Exception as error:  # noqa: BLE001 - of any backend and any kind
            _log.info("%s: its program cannot be stored: %s", self._key[0], str(error).splitlines()[:1])
            return 0, True, _Program(compiled, outputs)
        store.write_program(content, serialized)
        if key is not None:
            store.write_key(key, entry)
        return len(serialized), True, _Program(compiled, outputs)


def _read(store: ProgramStore, key: str, own: Signature, devices: list[jax.Device]) -> tuple[int, _Program | None]:
    """Returns bytes and program of a key; 0 and None if there is none."""
    entry = store.read_key(key)
    if entry is None:
        return 0, None
    try:
        content, outputs = pickle.loads(entry)  # noqa: S301 - a file that only this user can write, see `store`
    except Exception as error:  # noqa: BLE001 - whatever an old or damaged pickle raises
        store.discard(key, f"cannot be read ({type(error).__name__})")
        return 0, None
    return _load(store, content, outputs, own, devices)


def _load(
    store: ProgramStore, content: str, outputs: Any, own: Signature, devices: list[jax.Device]
) -> tuple[int, _Program | None]:
    """Returns bytes and program of a content; 0 and None if there is none."""
    serialized = store.read_program(content)
    if serialized is None:
        return 0, None
    try:
        out_tree = jax.tree.structure(outputs)
        compiled = deserialize_and_load(serialized, own.tree, out_tree, devices[0].client, devices)
    except Exception as error:  # noqa: BLE001 - see `_read`
        store.discard(content, f"cannot be loaded ({type(error).__name__})")
        return 0, None
    return len(serialized), _Program(compiled, outputs)


def _zeros(program: _Program, own: Signature) -> Any:
    """Returns zeros in place of the results of a program; None if there are other values than numbers."""
    outputs, tree = jax.tree.flatten(program.outputs)
    if any(jnp.issubdtype(each.dtype, jax.dtypes.extended) for each in outputs):
        return None
    is_committed = any(len(leaf) == 3 and leaf[2] for leaf in own.leaves)
    shardings = jax.tree.leaves(program.compiled.output_shardings)
    zeros = []
    for each, sharding in zip(outputs, shardings, strict=True):
        value = np.zeros(each.shape, each.dtype)
        zeros.append(jax.device_put(value, sharding) if is_committed else jnp.asarray(value))
    return jax.tree.unflatten(tree, zeros)


@contextlib.contextmanager
def making_programs(report: Callable[[MadeProgram], None], *, is_run: bool = False) -> Iterator[None]:
    """Makes programs inside the context, and runs none: their results are zeros.

    Args:
      report: called for each program that a function needs for the first time.
      is_run: runs them as well.
    """
    global _making
    before, _making = _making, _Making(report, is_run)
    try:
        yield
    finally:
        _making = before


def drop_programs() -> None:
    """Forgets all programs in memory."""
    for function in list(_functions):
        function.drop()


drop_with_caches(drop_programs)
