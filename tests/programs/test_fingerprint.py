"""Digests of values: equal values have equal ones in every process, and whatever a program depends on changes them."""

import dataclasses
import enum
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.models.flux2 import Flux2TransformerConfig
from clvr_jax.programs.environment import source_digest
from clvr_jax.programs.fingerprint import NotStorableError, fingerprint
from clvr_jax.sharding import Rules

CONFIG = Flux2TransformerConfig(num_layers=2)

IN_PROCESS = """
import jax
from clvr_jax.convert.architectures import FLUX2_VAE, qwen3_hidden_states
from clvr_jax.programs.environment import process, sources
from clvr_jax.programs.fingerprint import fingerprint

graphdef, state = FLUX2_VAE.split({"block_out_channels": [16, 32], "norm_num_groups": 8, "latent_channels": 4})
print(fingerprint(graphdef, jax.tree.structure(state), qwen3_hidden_states((1, 2)).module, {"a": {1, 2, "x"}}))
print(process(), sources())
"""


@pytest.mark.slow
def test_two_processes_have_the_same_digests():
    found = []
    for seed in ("1", "2"):  # of `hash`, which orders sets
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", IN_PROCESS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[1]
    assert len(found[0].split()) == 3


def scaled(factor):
    return lambda x: x * factor


def two_functions():
    return [lambda x: x + 1, lambda x: x + 2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ("a", b"a"),
        ((1, 2), [1, 2]),
        ((1, (2, 3)), ((1, 2), 3)),
        (("a\0b",), ("a", "b")),
        ({"a": 1}, {"a": 2}),
        ({"a": None}, {}),
        (np.float32(1), np.float64(1)),
        (np.arange(3), np.arange(3.0)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.dtype("float32"), np.dtype(jnp.bfloat16)),
        (CONFIG, dataclasses.replace(CONFIG, rope_theta=1999)),
        (Rules(), Rules(tokens=())),
        (jax.tree.structure((1, 2)), jax.tree.structure([1, 2])),
        (jax.tree.structure({"a": 1}), jax.tree.structure({"b": 1})),
        (jax.tree.structure((1, None)), jax.tree.structure((1,))),
        (functools.partial(jax.nn.softmax, axis=0), functools.partial(jax.nn.softmax, axis=1)),
        (jax.nn.silu, jax.nn.gelu),
        (nnx.Param, nnx.Variable),
    ],
    ids=lambda value: (
        f"{type(value).__name__} {value}"
        if isinstance(value, int | float | str | tuple | list | dict)
        else type(value).__name__
    ),
)
def test_different_values_have_different_digests(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


def test_what_is_outside_of_versioned_packages_has_no_digest():
    class Color(enum.Enum):
        RED = 1

    for value in (scaled(2), two_functions()[0], Color.RED, object(), np.array([object()]), jnp.ones(2), (1, scaled)):
        with pytest.raises(NotStorableError):
            fingerprint(value)


@pytest.fixture
def own_code(monkeypatch):
    """Lets functions of this file count as those of a package with a digest."""
    monkeypatch.setattr("clvr_jax.programs.fingerprint._ROOTS", frozenset({__name__.partition(".")[0], "builtins"}))


def test_functions_differ_by_their_code_and_by_what_they_hold(own_code):
    one, two = two_functions()
    assert fingerprint(one) != fingerprint(two), "two lambdas have one name"
    assert fingerprint(one) == fingerprint(two_functions()[0])
    assert fingerprint(scaled(2)) != fingerprint(scaled(3))
    assert fingerprint(scaled(2)) == fingerprint(scaled(2))


def test_the_digest_of_source_is_that_of_names_and_contents(tmp_path):
    found = [source_digest(tmp_path)]
    steps = [("a.py", "x = 1"), ("b/c.py", ""), ("a.py", "x = 2"), ("b/d.py", ""), ("notes.txt", "x")]
    for name, text in steps:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        found.append(source_digest(tmp_path))
    assert len(set(found)) == len(steps), "only notes.txt is no source"
    (tmp_path / "b/c.py").rename(tmp_path / "b/e.py")
    assert source_digest(tmp_path) not in found
