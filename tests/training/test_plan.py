"""Programs for chips that are not here: what fits, what is counted, what is said where it cannot be."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.cli import main
from clvr_jax.cost_model import parse_topology
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.plan import DoesNotFitError, meshes, plan, ranked, search
from clvr_jax.training.recipes import Recipe, load_recipe
from clvr_jax.training.trainer import Task
from tests.training import drawing_recipe

RECIPE = "tests/training/drawing_recipe.py"


def changed(config=drawing_recipe.CONFIG, mesh=None, **changes):
    train = dataclasses.replace(config.train, mesh=mesh or config.train.mesh)
    return dataclasses.replace(config, train=train, **changes)


SMALL = changed(mesh=MeshConfig(fsdp=4, tensor=2), depth=1)
# The same configuration on a command line, so that the program is compiled once.
SMALL_OPTIONS = ["--train.mesh.fsdp", "4", "--train.mesh.tensor", "2", "--depth", "1"]


# 1,024 image tokens, so that attention is the TPU's kernel there, as at full size.
WIDE = changed(mesh=MeshConfig(fsdp=2, sequence=2), side=32, head_dim=32, batch_size=4)


@pytest.mark.slow
def test_a_small_recipe_compiles_for_v6e():
    report = plan(load_recipe(RECIPE), dataclasses.replace(WIDE, depth=2), "v6e:2x2")
    assert report.memory.fits
    assert report.memory.total < 2**30
    assert set(report.sent) >= {"fsdp", "sequence"}
    assert "all-to-all" in {one.kind for one in report.collectives}  # tokens cut, then heads


@pytest.mark.slow
def test_depth_changes_neither_program_nor_messages():
    """Compiled for a CPU, whose compiler is not ten times as slow as that of a TPU; the layers are one loop on both."""
    recipe = load_recipe(RECIPE)
    shallow, deep = (plan(recipe, dataclasses.replace(WIDE, depth=depth), "cpu:4") for depth in (2, 6))
    assert shallow.memory.total < deep.memory.total
    assert abs(deep.instructions / shallow.instructions - 1) < 0.1
    # Blocks send in proportion to their number; what is outside of them sends little.
    assert 2 < sum(deep.sent.values()) / sum(shallow.sent.values()) <= 3


@pytest.mark.slow
def test_the_plan_of_a_cpu_counts_what_the_recipe_counts():
    recipe = load_recipe(RECIPE)
    report = plan(recipe, SMALL, "cpu:8", dollars_per_chip_hour=2.0)
    task = drawing_recipe.task(SMALL)
    size = sum(leaf.size for leaf in jax.tree.leaves(task.params))
    assert report.flops == task.flops(task.batches(0))
    assert size / 8 < report.parameters < size / 6  # vectors are whole everywhere
    # Master weights, average and two moments.
    assert report.memory.arguments > 4 * 4 * report.parameters
    assert report.cost.chip_hours == pytest.approx(report.roofline.overlapped * 20 * 8 / 3600)
    assert report.cost.dollars == pytest.approx(2 * report.cost.chip_hours)


@pytest.mark.slow
def test_search_ranks_what_fits_and_says_why_the_others_do_not():
    def task(config):
        w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (config.batch_size, 64)))
        flops = 6 * config.batch_size * 64 * 64

        def loss(params, frozen, x, key):
            return jnp.mean((x @ params["w"]) ** 2), {}

        return Task(
            "small", {"w": w}, {}, loss, lambda step: x, lambda ema, folder: None, flops=lambda batch: flops,
            hardware_flops=lambda batch: flops,
        )  # fmt: skip

    recipe = Recipe("small", drawing_recipe.CONFIG, task, abstract_task=task)
    trials = ranked(list(search(recipe, changed(), "cpu:2", batch_sizes=(1, 16))))
    assert len(trials) == 2 * len(meshes(parse_topology("cpu:2")))
    fitting = [trial for trial in trials if trial.report]
    rates = [trial.report.roofline.mfu for trial in fitting]
    assert rates == sorted(rates, reverse=True)
    assert trials[: len(fitting)] == fitting
    assert {trial.batch_size for trial in trials[len(fitting) :]} == {1}
    assert all("cannot be sharded into" in trial.reason for trial in trials[len(fitting) :])


def matrix_recipe(rows, columns):
    """A recipe that trains one matrix."""

    def task(config):
        w = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        batch = jax.ShapeDtypeStruct((4, rows), jnp.float32)

        def loss(params, frozen, x, key):
            return jnp.mean((x @ params["w"]) ** 2), {}

        return Task("matrix", {"w": w}, {}, loss, lambda step: batch, lambda ema, folder: None)

    return Recipe("matrix", drawing_recipe.CONFIG, task, abstract_task=task)


def test_what_does_not_fit_is_told_with_both_sizes():
    """16 GiB of weights on a chip that has 15.75 GiB: the TPU's compiler itself says so."""
    with pytest.raises(DoesNotFitError, match=r"needs [\d.]+GiB of 15\.75GiB"):
        plan(matrix_recipe(1024, 4 * 2**20), changed(mesh=MeshConfig(fsdp=1)), "v5e:1x1")


@pytest.mark.filterwarnings("error::UserWarning:jax")
def test_a_second_plan_for_a_tpu_says_the_same_and_warns_of_nothing():
    """Programs for chips that are not here can be written to JAX's cache, but not read from it."""
    jax.jit(lambda x: x + 1)(0.0)  # from here on the cache is in use
    first, second = (plan(matrix_recipe(64, 64), changed(mesh=MeshConfig(fsdp=1)), "v5e:1x1") for _ in range(2))
    assert second == first


def test_meshes_and_batches_that_cannot_be_are_refused():
    recipe = load_recipe(RECIPE)
    with pytest.raises(UsageError, match="fsdp 3"):
        plan(recipe, changed(mesh=MeshConfig(fsdp=3)), "cpu:8")
    with pytest.raises(UsageError, match="12 rows cannot be sharded into 8"):
        plan(recipe, changed(batch_size=12), "cpu:8")
    with pytest.raises(ClvrError, match="XLA_FLAGS"):
        plan(recipe, changed(), "h100:64")


@pytest.mark.slow
def test_the_command_writes_its_report(tmp_path, capsys):
    out = tmp_path / "report.json"
    assert main(["plan", RECIPE, "--topology", "cpu:8", "--out", str(out), *SMALL_OPTIONS, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["chips"] == 8
    assert printed["memory"]["fits"]
    assert np.isclose(
        printed["roofline"]["overlapped"] * printed["roofline"]["peak_flops"],
        printed["flops"] / 8 / printed["roofline"]["mfu"],
    )


@pytest.mark.parametrize("topology", ["cpu:1000000", "v5p:4x4x999999", "h100:99999999999999999999"])
def test_a_topology_that_no_machine_has_is_refused_before_anything_is_measured(topology):
    from clvr_jax.commands.recipes.training import Plan

    with pytest.raises(UsageError, match="give at most"):
        Plan(config=Path("recipe.py"), topology=topology).run_recipe(None, None)
