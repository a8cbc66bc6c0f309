"""Stored functions: what they return is what the jitted function returns, and what is stored is found only for it."""

import logging
import pickle
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clvr_jax.programs import ProgramStore, StoredFunction, making_programs, program_store, stored_value
from clvr_jax.sharding import MeshConfig, MeshLayout, Rules, with_logical_constraint


class Pair(NamedTuple):
    total: jax.Array
    rest: dict


def computed(x, weights, n, *, shift=0):
    """n matrix products; the arguments after `weights` are static."""
    for _ in range(n):
        x = jnp.tanh(x @ weights["kernel"]) + shift
    return Pair(with_logical_constraint(x, "batch", None), {"mean": x.mean(), "key": weights.get("key")})


@pytest.fixture(autouse=True)
def own_code(monkeypatch):
    """Lets functions of this file count as those of a package with a digest."""
    roots = {__name__.partition(".")[0], "builtins", "jax", "numpy", "jaxlib", "clvr_jax", "functools"}
    monkeypatch.setattr("clvr_jax.programs.fingerprint._ROOTS", frozenset(roots))


@pytest.fixture
def store(tmp_path):
    made = ProgramStore(tmp_path / "store", 10**9)
    assert made.prepare()
    with program_store(made):
        yield made


def function(**options):
    return StoredFunction(computed, static_argnums=2, static_argnames="shift", **options)


def arguments(rows=4):
    return jnp.arange(rows * 8.0).reshape(rows, 8), {"kernel": jnp.eye(8) / 2, "key": jax.random.key(1)}


@pytest.fixture
def traces():
    """Counts of the functions that were traced."""
    found = []
    listener = partial(_note, found)
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield found
    jax.monitoring.unregister_event_duration_listener(listener)


def _note(found, event, seconds, fun_name=None, **_):
    if event.endswith("jaxpr_trace_duration") and fun_name == "computed":
        found.append(fun_name)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert left.dtype == right.dtype
        assert left.weak_type == right.weak_type
        assert left.committed == right.committed
        assert left.sharding == right.sharding
        np.testing.assert_array_equal(left, right)


def test_another_function_object_loads_what_the_first_has_stored(store, traces):
    x, weights = arguments()
    with program_store(None):
        expected = function()(x, weights, 3, shift=1)
    traces.clear()
    assert_same(function()(x, weights, 3, shift=1), expected)
    assert len(traces) == 1
    later = function()
    assert_same(later(x, weights, 3, shift=1), expected)
    assert_same(later(x, weights, 3, shift=1), expected)
    assert len(traces) == 1, "it is loaded"
    assert store.size().programs == 1


def test_what_a_program_depends_on_changes_its_key(store, traces, monkeypatch):
    x, weights = arguments()

    def count(call):
        traces.clear()
        call()
        return len(traces)

    def plain():
        return function()(x, weights, 2)

    assert count(plain) == 1
    assert count(plain) == 0
    changed = {
        "static argument": lambda: function()(x, weights, 3),
        "static name": lambda: function()(x, weights, 2, shift=2),
        "shape": lambda: function()(*arguments(5), 2),
        "dtype": lambda: function()(x.astype(jnp.bfloat16), weights, 2),
        "structure": lambda: function()(x, {"kernel": weights["kernel"]}, 2),
        "device": lambda: function()(jax.device_put(x, jax.devices()[0]), weights, 2),
        "another device": lambda: function()(jax.device_put(x, jax.devices()[1]), weights, 2),
        "kind of array": lambda: function()(np.asarray(x), weights, 2),
        "donation": lambda: function(donate_argnums=0)(x + 1, weights, 2),
    }
    for name, call in changed.items():
        assert count(call) == 1, name
        assert count(call) == 0, name
    with jax.default_matmul_precision("float32"):
        assert count(plain) == 1, "setting of a thread"
    with MeshLayout(MeshConfig(fsdp=8).make()).active():
        assert count(plain) == 1, "mesh"
    with MeshLayout(MeshConfig(fsdp=8).make(), Rules(batch=("data",))).active():
        assert count(plain) == 1, "rules"
    for place in ("sources", "environment"):
        with monkeypatch.context() as patched:
            patched.setattr(f"clvr_jax.programs.signature.{place}", lambda *_: "another")
            _forget_environment()
            assert count(plain) == 1, place
        _forget_environment()
    assert count(plain) == 0


def _forget_environment():
    from clvr_jax.programs import signature

    signature._environment.cache_clear()
    signature._compiler.cache_clear()


def test_changed_source_that_lowers_to_the_same_is_traced_but_not_compiled(store, traces, monkeypatch):
    x, weights = arguments()
    compiled = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    expected = function()(x, weights, 2)
    monkeypatch.setattr("clvr_jax.programs.signature.sources", lambda: "another")
    _forget_environment()
    traces.clear()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert_same(function()(x, weights, 2), expected)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        monkeypatch.undo()
        _forget_environment()
    assert len(traces) == 1
    assert not compiled
    assert store.size().programs == 1


def first(x, y):
    return x * 2


def second(x, y):
    return y * 2


def test_functions_that_use_different_arguments_share_no_program(store):
    x, y = jnp.ones(3), jnp.zeros(3)
    lowered = [jax.jit(each).lower(x, y).as_text().replace("second", "first") for each in (first, second)]
    assert lowered[0] == lowered[1], "the text does not say which argument is used"
    for _ in range(2):
        np.testing.assert_array_equal(StoredFunction(first)(x, y), [2, 2, 2])
        np.testing.assert_array_equal(StoredFunction(second)(x, y), [0, 0, 0])


@pytest.mark.parametrize("name", ["fsdp", "tensor", "devices"])
def test_sharded_arguments_have_programs_on_their_mesh(store, traces, name):
    mesh = {"fsdp": MeshConfig(fsdp=8), "tensor": MeshConfig(fsdp=2, tensor=4), "devices": MeshConfig(devices=4)}
    layout = MeshLayout(mesh[name].make())

    def call():
        x, weights = arguments(8)
        with layout.active():
            x = jax.device_put(x, layout.sharding(("batch", None), x.shape))
            spec = PartitionSpec(None, "tensor")
            weights["kernel"] = jax.device_put(weights["kernel"], jax.sharding.NamedSharding(layout.mesh, spec))
            out = function(donate_argnums=0)(x, weights, 3)
        assert x.is_deleted()
        return out

    with program_store(None):
        expected = call()
    made = call()
    traces.clear()
    loaded = call()
    assert not traces
    assert_same(made, expected)
    assert_same(loaded, expected)
    assert len(loaded.total.sharding.device_set) == layout.mesh.size


def test_inside_of_another_traced_function_it_is_a_part_of_that(store):
    x, weights = arguments()
    whole = jax.jit(lambda x: function()(x, weights, 2).total * 2)(x)
    np.testing.assert_allclose(whole, function()(x, weights, 2).total * 2, rtol=1e-6)
    assert store.size().programs == 1
    assert jax.grad(lambda x: function()(x, weights, 2).total.sum())(x).shape == x.shape
    assert function().lower(x, weights, 2).out_info.total.shape == x.shape, "what jax.jit has"


def test_what_has_no_key_takes_the_ordinary_path_and_its_errors_are_the_same(store, caplog):
    with caplog.at_level(logging.INFO, "clvr.programs"):
        out = StoredFunction(lambda x, own: x + own.value, static_argnums=1)(jnp.ones(2), _Unknown())
    np.testing.assert_array_equal(out, [4, 4])
    assert "is not stored" in caplog.text
    assert store.size().programs == 0
    x, weights = arguments()
    with pytest.raises(TypeError, match="dot_general"):
        function()(x[:, :3], weights, 2)


class _Unknown:
    """Code of which no version is known."""

    value = 3
    __module__ = "elsewhere"


def _overwrite(store, suffix, content):
    for path in store.directory.glob(f"*{suffix}"):
        store._write(path.name, content(path))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".key", lambda path: b"no pickle"),
        (".key", lambda path: pickle.dumps(("x", 1, 2))),
        (".key", lambda path: pickle.dumps(("0" * 64, 1))),
        (".program", lambda path: b"no program"),
        (".program", lambda path: pickle.dumps((1, 2, 3))),
    ],
    ids=["key", "another key", "no content", "program", "another program"],
)
def test_a_stale_file_with_a_right_digest_is_made_anew(store, traces, caplog, suffix, content):
    x, weights = arguments()
    expected = function()(x, weights, 2)
    _overwrite(store, suffix, content)
    traces.clear()
    assert_same(function()(x, weights, 2), expected)
    assert len(traces) == 1
    assert_same(function()(x, weights, 2), expected)
    assert len(traces) == 1
    assert len(caplog.records) <= 1


def test_programs_are_made_ahead_without_running_them(store, traces):
    x, weights = arguments()
    reports = []
    with making_programs(reports.append):
        out = function(donate_argnums=0)(jax.device_put(x, jax.devices()[0]), {"kernel": weights["kernel"]}, 2)
    (made,) = reports
    assert (made.name, made.is_new) == ("computed", True)
    assert made.nbytes > 0
    np.testing.assert_array_equal(out.total, jnp.zeros((4, 8)))
    assert out.rest["key"] is None
    traces.clear()
    committed = jax.device_put(x, jax.devices()[0])
    out = function(donate_argnums=0)(committed, {"kernel": weights["kernel"]}, 2)
    assert not traces
    assert committed.is_deleted()
    assert np.abs(out.total).max() > 0


def test_values_are_stored_with_what_they_depend_on(store):
    calls = []

    def make(number):
        calls.append(number)
        return {"number": number}

    for _ in range(2):
        assert stored_value(lambda: make(1), "a", 1) == {"number": 1}
        assert stored_value(lambda: make(2), "a", 2) == {"number": 2}
    assert calls == [1, 2]
    _overwrite(store, ".key", lambda path: b"no pickle")
    assert stored_value(lambda: make(1), "a", 1) == {"number": 1}
    assert calls == [1, 2, 1]
    with program_store(None):
        stored_value(lambda: make(1), "a", 1)
    assert calls == [1, 2, 1, 1]
