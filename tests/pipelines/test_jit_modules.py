"""A module is split once, and new values and new modules are used."""

import jax.numpy as jnp
from flax import nnx

from clvr_jax.pipelines.jit_modules import JittedPipeline, jit_module


class Line(JittedPipeline):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.program = jit_module(lambda graphdef, state, x: nnx.merge(graphdef, state)(x), static_argnums=0)

    def __call__(self):
        return self.program(*self._split("layer"), jnp.ones((1, 2))).item()


def layer(weight):
    linear = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel[...] = jnp.full((2, 1), weight)
    return linear


def test_a_module_is_split_once(monkeypatch):
    line, calls, split = Line(layer(1.0)), [], nnx.split
    monkeypatch.setattr(nnx, "split", lambda module: calls.append(module) or split(module))
    assert line() == line() == 2.0
    assert len(calls) == 1


def test_new_values_and_new_modules_are_seen():
    line = Line(layer(1.0))
    assert line() == 2.0
    nnx.update(line.layer, nnx.state(layer(3.0)))
    assert line() == 6.0
    line.layer.kernel[...] = jnp.full((2, 1), 4.0)
    assert line() == 8.0
    line.layer = layer(5.0)
    assert line() == 10.0
    assert line.program._cache_size() == 1  # all of them are of one graph
