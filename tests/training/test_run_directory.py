"""The directory of a run: what is refused changes nothing in it, and two runs never share it."""

import gc
import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.locks import LOCK
from clvr_jax.training.checkpoint import Checkpoints, restore_part
from clvr_jax.training.recipes import RECIPE, load_recipe, train
from tests.commands.command_line import RECIPE as TEXT


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "vector.py").write_text(TEXT)
    return load_recipe(tmp_path / "vector.py")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raise_(error):
    raise error


def target(recipe, value):
    return type(recipe.config)(recipe.config.train, value)


def test_a_refused_run_leaves_the_finished_one_as_it_was(recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe, target(recipe, 3.0), out)
    before = content(out)
    with pytest.raises(UsageError, match="already holds step 4; add --resume"):
        train(recipe, target(recipe, 5.0), out)
    assert content(out) == before
    assert json.loads(before[RECIPE])["config"]["target"] == 3.0


def test_a_resumed_run_of_another_model_leaves_the_recipe_of_the_first(recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe, recipe.config, out)
    before = content(out)[RECIPE]
    (tmp_path / "other.py").write_text(TEXT.replace("jnp.zeros(3)", "jnp.zeros(4)").replace("full(3", "full(4"))
    other = load_recipe(tmp_path / "other.py")
    with pytest.raises(ClvrError, match="not a checkpoint of this recipe"):
        train(other, target(other, 5.0), out, resume=True)
    assert content(out)[RECIPE] == before


def test_a_second_run_into_one_directory_is_told_of_the_first(recipe, tmp_path):
    out, said = tmp_path / "run", []
    real = recipe.task

    def task(config):
        for resume in (False, True):
            with pytest.raises(ClvrError, match=r"run: process \d+ .* has been writing to it since") as caught:
                train(recipe, recipe.config, out, resume=resume)
            said.append(caught.value)
        return real(config)

    train(replace(recipe, task=task), recipe.config, out)
    assert len(said) == 2
    assert not (out / LOCK).exists()


def test_a_run_that_cannot_be_built_leaves_no_directory(recipe, tmp_path):
    broken = replace(recipe, task=lambda config: raise_(ClvrError("it cannot be built")))
    with pytest.raises(ClvrError, match="it cannot be built"):
        train(broken, broken.config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_killed_run_left_half_written_is_removed_when_it_is_resumed(recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe, recipe.config, out)
    torn = out / "checkpoints" / "9.orbax-checkpoint-tmp"
    (torn / "state").mkdir(parents=True)
    with pytest.raises(UsageError):
        train(recipe, recipe.config, out)
    assert torn.exists()  # what is refused touches nothing
    train(recipe, recipe.config, out, resume=True)
    assert not torn.exists()
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name.isdecimal()] == ["4"]


EXITS = {
    "at import": "raise SystemExit(0)",
    "in the task": TEXT.replace("def loss", "raise SystemExit(0)\n    def loss"),
}


@pytest.mark.parametrize("where", EXITS)
def test_a_recipe_that_exits_is_an_error(tmp_path, where):
    (tmp_path / "leaves.py").write_text(EXITS[where])

    def run():
        leaves = load_recipe(tmp_path / "leaves.py")
        train(leaves, leaves.config, tmp_path / "run")

    with pytest.raises(ClvrError, match=re.escape("leaves.py: the recipe calls sys.exit(0)")):
        run()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that Orbax left
def test_a_damaged_checkpoint_is_one_line_that_names_it(tmp_path):
    state = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}, "step": jnp.int32(3)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state["params"])
    with Checkpoints(tmp_path / "good") as checkpoints:
        checkpoints.save(3, state, {"position": 1})
    damage = {
        "_CHECKPOINT_METADATA": (b"[]", b"[" * 100_000),
        "state/_METADATA": (b"null", b'{"tree_metadata": {"w": {"key_metadata": null, "value_metadata": {}}}}', b"{"),
        "state/manifest.ocdbt": (b"", b"no database"),
    }
    for name, contents in damage.items():
        for content in contents:
            run = shutil.copytree(tmp_path / "good", tmp_path / "run")
            (run / "3" / name).write_bytes(content)
            for read in (
                lambda run=run: restore_part(run, "params", abstract),
                lambda run=run: resumed(run, state),
            ):
                with pytest.raises(
                    ClvrError, match=r"not a checkpoint of this|metadata of a checkpoint is damaged"
                ) as caught:
                    read()
                assert str(run) in str(caught.value)
                assert "\n" not in str(caught.value)
            shutil.rmtree(run)
    gc.collect()


def resumed(run, state):
    with Checkpoints(run) as checkpoints:
        return checkpoints.restore(state, resume=True)
