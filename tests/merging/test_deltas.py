import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clvr_jax as clvr
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.lora import LoRAPair, init_lora, is_pair
from clvr_jax.trees import leaves_by_path
from tests.convert.lora.models import KINDS, outputs
from tests.models.parity import TOLERANCE, relative_error

SHAPES = {"stack": (3, 8, 6), "kernel": (8, 6), "convolution": (3, 3, 4, 5), "bias": (6,)}


def tree(seed, dtype=np.float32, spread=1.0, around=None):
    """Random leaves, or leaves near those of `around`, as a tuned model is near its base."""
    random = np.random.default_rng(seed)
    leaves = {"layer": {name: spread * random.normal(size=shape) for name, shape in SHAPES.items()}}
    if around is not None:
        leaves = jax.tree.map(lambda own, near: own + np.asarray(near, np.float64), leaves, around)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), leaves)


def ulps(ours, exact, base):
    """Greatest distance in units of the last place of the larger of `exact` and `base`, in the dtype of `ours`.

    Where both nearly cancel, float32 cannot do better than the last place of what it subtracts.
    """
    rounded = np.asarray(exact).astype(ours.dtype).astype(np.float64)
    largest = np.maximum(np.abs(rounded), np.abs(np.asarray(base, np.float64)))
    unit = np.exp2(np.floor(np.log2(largest))) * float(jnp.finfo(ours.dtype).eps)
    return float((np.abs(np.asarray(ours, np.float64) - rounded) / unit).max())


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.3), (-1.0, 0.0)])
def test_dswm_is_the_float64_result_to_one_ulp(dtype, compiled, weights):
    base = tree(0, dtype)
    distill, align = tree(1, dtype, 1e-2, base), tree(2, dtype, 1e-2, base)
    merge = jax.jit(clvr.dswm) if compiled else clvr.dswm
    merged = merge(base, distill, align, *weights)
    exact = jax.tree.map(
        lambda b, d, a: b + weights[0] * (d - b) + weights[1] * (a - b), wide(base), wide(distill), wide(align)
    )
    for ours, theirs, origin in zip(*map(jax.tree.leaves, (merged, exact, base)), strict=True):
        assert ours.dtype == dtype
        assert ulps(ours, theirs, origin) <= 1


def test_dswm_far_from_the_base_is_as_exact_as_float32_is():
    base, distill, align = (tree(seed) for seed in range(3))
    merged = clvr.dswm(base, distill, align)
    exact = jax.tree.map(lambda b, d, a: d + a - b, wide(base), wide(distill), wide(align))
    for ours, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(exact), strict=True):
        assert np.abs(ours - theirs).max() < 4 * np.finfo(np.float32).eps * np.abs(theirs).max()


def test_one_delta_of_weight_one_gives_the_tuned_weights():
    base = tree(0, jnp.bfloat16)
    tuned = tree(1, jnp.bfloat16, 1e-2, base)
    for merged in (clvr.dswm(base, base, tuned), clvr.dswm(base, tuned, base)):
        assert jax.tree.all(jax.tree.map(np.array_equal, merged, tuned))
    applied = clvr.apply_delta(base, clvr.delta(tuned, base))
    assert jax.tree.all(jax.tree.map(lambda *leaves: ulps(*leaves) <= 1, applied, tuned, base))


def test_weights_by_pattern_hold_for_the_leaves_they_are_found_in():
    base, distill, align = (tree(seed) for seed in range(3))
    merged = clvr.dswm(base, distill, align, {r"stack|bias": 0.0, r"convolution$": 0.5}, {r".": 0.0})["layer"]
    for name, weight in {"stack": 0.0, "bias": 0.0, "convolution": 0.5, "kernel": 1.0}.items():
        expected = base["layer"][name] + weight * (distill["layer"][name] - base["layer"][name])
        assert np.allclose(merged[name], expected, atol=1e-6), name
    with pytest.raises(ClvrError, match=r"matched first by 'attn'; parameters are layer\.bias, layer\.convolution"):
        clvr.dswm(base, distill, align, {"attn": 0.5})


def test_a_counter_is_no_weight():
    base = {"kernel": jnp.ones((2, 2)), "steps": jnp.asarray(7)}
    tuned = {"kernel": jnp.zeros((2, 2)), "steps": jnp.asarray(9)}
    assert clvr.dswm(base, tuned, tuned)["steps"] == 7
    assert clvr.delta(tuned, base)["steps"] == 0
    assert clvr.apply_delta(base, clvr.delta(tuned, base))["steps"] == 7


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda layer: layer.pop("bias"), r"1 only in base: layer\.bias"),
        (lambda layer: layer.update(more=jnp.ones(1)), r"1 only in distill: layer\.more"),
        (lambda layer: layer.update(bias=jnp.ones(5)), r"base floating \(6,\), distill floating \(5,\)"),
        (lambda layer: layer.update(bias=jnp.ones(6, int)), r"base floating \(6,\), distill int32 \(6,\)"),
    ],
)
def test_trees_that_do_not_match_are_refused_with_both_sides(edit, message):
    base, distill = tree(0), tree(1)
    edit(distill["layer"])
    with pytest.raises(ClvrError, match=message) as caught:
        clvr.dswm(base, distill, base)
    assert "\n" not in str(caught.value)


def test_an_nnx_state_keeps_structure_and_shardings():
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    size = 2 * jax.device_count()

    def state(seed):
        return jax.device_put(nnx.state(nnx.Linear(size, size, rngs=nnx.Rngs(seed))), sharding)

    base, distill, align = (state(seed) for seed in range(3))
    lora = init_lora(base, ["kernel"], 2, 4.0, jax.random.key(0))
    for result in (
        clvr.dswm(base, distill, align),
        clvr.delta(align, base),
        clvr.apply_delta(base, clvr.delta(align, base), 0.5),
        clvr.apply_delta(base, lora),
    ):
        assert jax.tree.structure(result) == jax.tree.structure(base)
        assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_sharded_merge_is_the_unsharded_one_bit_for_bit(dtype, compiled):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shardings = {
        "kernel": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "fsdp")),
        "stack": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp")),
        "bias": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    }
    shapes = {"kernel": (24, 36), "stack": (3, 8, 5), "bias": (7,)}
    random = np.random.default_rng(4)
    base = {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}
    sides = [
        jax.tree.map(lambda leaf: (leaf + 0.02 * random.normal(size=leaf.shape)).astype(dtype), base) for _ in range(2)
    ]
    merge = jax.jit(clvr.dswm) if compiled else clvr.dswm
    plain = merge(base, *sides, 0.7, 1.3)
    sharded = merge(*(jax.device_put(tree, shardings) for tree in (base, *sides)), 0.7, 1.3)
    for name, leaf in sharded.items():
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)
        assert np.asarray(leaf).tobytes() == np.asarray(plain[name]).tobytes(), name


@pytest.mark.slow
def test_three_unets_merge_into_one_that_runs():
    kind = KINDS["sd15"]
    base = nnx.state(kind.make_pair()[0])
    random = np.random.default_rng(0)
    distill, align = (
        jax.tree.map(lambda leaf: (leaf + 0.05 * random.normal(size=leaf.shape)).astype(np.float32), wide(base))
        for _ in range(2)
    )
    merge = jax.jit(clvr.dswm)  # one program in place of one for each shape
    alone = outputs(kind, merge(base, distill, align, 0.0, 1.0))
    assert relative_error(alone, outputs(kind, align)) < TOLERANCE
    by_hand = jax.tree.map(
        lambda b, d, a: (b + 0.3 * (d - b) + 0.6 * (a - b)).astype(np.float32), *map(wide, (base, distill, align))
    )
    merged = outputs(kind, merge(base, distill, align, 0.3, 0.6))
    assert relative_error(merged, outputs(kind, by_hand)) < TOLERANCE
    assert relative_error(merged, alone) > 0.01


@pytest.mark.slow
def test_a_lora_tree_applied_is_its_products_added():
    base = {"layer": {"q": {"kernel": (8, 6)}, "stack": {"kernel": (3, 8, 6)}, "conv": {"kernel": (3, 3, 4, 5)}}}
    is_shape = {"is_leaf": lambda node: isinstance(node, tuple)}
    base = jax.tree.map(lambda shape: jax.random.normal(jax.random.key(len(shape)), shape), base, **is_shape)
    lora = init_lora(base, ["."], 2, 3.0, jax.random.key(1))
    unchanged = clvr.apply_delta(base, lora)
    assert jax.tree.all(jax.tree.map(np.array_equal, unchanged, base))
    lora = jax.tree.map(lambda leaf: leaf + 1.0, lora)
    lora["layer"]["stack"]["kernel"] = LoRAPair(*jax.tree.leaves(lora["layer"]["stack"]), scale=(0.5, 0.0, 2.0))
    fused = jax.jit(clvr.apply_delta)(base, lora, 0.5)["layer"]
    pairs = {path[1]: pair for path, pair in leaves_by_path(lora, is_pair).items()}
    products = {
        "q": 1.5 * np.einsum("ir,ro->io", pairs["q"].a, pairs["q"].b),
        "stack": np.einsum("l,lir,lro->lio", (0.5, 0.0, 2.0), pairs["stack"].a, pairs["stack"].b),
        "conv": 1.5 * np.einsum("hwir,ro->hwio", pairs["conv"].a, pairs["conv"].b[0, 0]),
    }
    for name, product in products.items():
        assert np.allclose(fused[name]["kernel"], base["layer"][name]["kernel"] + 0.5 * product, atol=1e-5), name
    again = clvr.apply_delta({"layer": fused}, lora, -0.5)
    assert jax.tree.all(jax.tree.map(lambda one, other: np.allclose(one, other, atol=1e-5), again, base))


def test_a_lora_tree_trains_with_optax_and_its_base_stays():
    base = {"kernel": jax.random.normal(jax.random.key(0), (5, 4)), "bias": jnp.ones(4)}
    target = jax.random.normal(jax.random.key(1), (5, 1)) * jax.random.normal(jax.random.key(2), (1, 4))
    lora = init_lora(base, ["kernel"], 1, 1.0, jax.random.key(3))
    optimizer = optax.adam(3e-2)

    def loss(lora):
        return jnp.square(clvr.apply_delta(base, lora)["kernel"] - base["kernel"] - target).mean()

    @jax.jit
    def step(lora, state):
        updates, state = optimizer.update(jax.grad(loss)(lora), state)
        return optax.apply_updates(lora, updates), state

    state = optimizer.init(lora)
    for _ in range(500):
        lora, state = step(lora, state)
    assert len(jax.tree.leaves(lora)) == 2
    assert lora["kernel"].scale == 1.0
    assert loss(lora) < 1e-4 * jnp.square(target).mean()


def test_ranks_that_are_zero_in_both_factors_stay_zero_in_training():
    base = {"kernel": jnp.ones((3, 2))}
    pair = LoRAPair(jnp.ones((3, 2)).at[:, 1].set(0), jnp.ones((2, 2)).at[1].set(0), 0.5)
    gradients = jax.grad(lambda lora: jnp.square(clvr.apply_delta(base, lora)["kernel"]).sum())({"kernel": pair})
    assert np.all(gradients["kernel"].a[:, 1] == 0)
    assert np.all(gradients["kernel"].b[1] == 0)
    assert np.all(gradients["kernel"].a[:, 0] != 0)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"k": {"kernel": LoRAPair(np.ones((5, 2)), np.ones((2, 6)))}}, "only in delta: k.kernel"),
        ({"kernel": LoRAPair(np.ones((5, 2)), np.ones((2, 6)))}, r"LoRA a \(5, 2\) b \(2, 6\)"),
        ({"kernel": LoRAPair(np.ones((5, 2)), np.ones((3, 4)))}, r"base floating \(5, 4\)"),
        ({"kernel": LoRAPair(np.ones((5, 2)), np.ones((2, 4)), (1.0, 2.0))}, r"scale \(1\.0, 2\.0\)"),
        ({"bias": LoRAPair(np.ones((5, 2)), np.ones((2, 4)))}, r"base floating \(4,\)"),
    ],
)
def test_a_lora_tree_of_another_model_is_refused(lora, message):
    with pytest.raises(ClvrError, match=message):
        clvr.apply_delta({"kernel": np.ones((5, 4)), "bias": np.ones(4)}, lora)
