"""A restarted run finds its compiled programs in its directory, and compiles nothing."""

import contextlib
import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from clvr_jax.programs import ProgramStore, StoredFunction, program_store
from clvr_jax.rl.trainer import fit as fit_rl
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.monitoring.clock import active_goodput
from clvr_jax.training.trainer import fit
from tests.rl.pprl_toy import CONFIG as RL_CONFIG
from tests.rl.pprl_toy import make_dataset, make_task
from tests.training import line_recipe

TRAIN = dataclasses.replace(line_recipe.CONFIG.train, steps=6)
"""On eight devices, by the default mesh."""


@contextlib.contextmanager
def machine(directory):
    """A machine with a store and nothing in memory; yields the names of what it compiles, other than to save.

    Orbax slices arrays of which several devices hold copies when it writes the first checkpoint, by operations that it
    does not jit.
    """
    store, compiled = ProgramStore(directory, 10**9), list[str]()
    assert store.prepare()
    jax.clear_caches()

    def listen(event, seconds, fun_name="", **_):
        clock = active_goodput()  # None outside of the run, where a task is made
        if event.endswith("backend_compile_duration") and clock and clock._stack[-1] != "save":
            compiled.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with program_store(store):
            yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def programs(out):
    return sorted(path.name for path in (out / "programs").glob("*.program"))


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(devices=1)])
def test_a_restart_on_another_machine_compiles_nothing_and_has_the_same_losses(tmp_path, mesh):
    train, task = dataclasses.replace(TRAIN, mesh=mesh), line_recipe.task(line_recipe.CONFIG)
    with program_store(None):
        fit(task, train, tmp_path / "whole")
    with machine(tmp_path / "first") as compiled:
        fit(task, train, tmp_path / "run", stop_after=3)
    assert {"start", "train_step"} <= set(compiled)
    stored = programs(tmp_path / "run")
    assert stored
    with machine(tmp_path / "second") as compiled:
        state = fit(task, train, tmp_path / "run", resume=True, stop_after=5)
    assert compiled == []
    assert programs(tmp_path / "run") == stored
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")[:5]
    assert len(state.params["w"].sharding.device_set) == (mesh.devices or 8)


def test_the_state_is_donated_to_a_stored_step(tmp_path, monkeypatch):
    """Otherwise a run would need the memory of two states."""
    given, call = [], StoredFunction.__call__

    def watched(self, *args, **named):
        out = call(self, *args, **named)
        given.extend(args[0].params.values() if hasattr(args[0], "opt_state") else ())
        return out

    task = line_recipe.task(line_recipe.CONFIG)
    for stop in (2, 4):
        with machine(tmp_path / str(stop)), monkeypatch.context() as patched:
            patched.setattr(StoredFunction, "__call__", watched)
            fit(task, TRAIN, tmp_path / "run", resume=True, stop_after=stop)
    assert len(given) == 4
    assert all(leaf.is_deleted() for leaf in given)


def test_another_configuration_is_another_program(tmp_path):
    task = line_recipe.task(line_recipe.CONFIG)
    with machine(tmp_path / "first"):
        fit(task, TRAIN, tmp_path / "run", stop_after=2)
    before = programs(tmp_path / "run")
    with machine(tmp_path / "second") as compiled:
        fit(task, dataclasses.replace(TRAIN, ema_decay=0.5), tmp_path / "run", resume=True, stop_after=3)
    assert compiled == ["train_step"]
    assert set(before) < set(programs(tmp_path / "run"))


def test_a_damaged_program_is_made_anew(tmp_path, caplog):
    task = line_recipe.task(line_recipe.CONFIG)
    with machine(tmp_path / "first"):
        fit(task, TRAIN, tmp_path / "run", stop_after=2)
    for path in (tmp_path / "run" / "programs").iterdir():
        path.write_bytes(b"no program")
    with machine(tmp_path / "second") as compiled:
        fit(task, TRAIN, tmp_path / "run", resume=True, stop_after=4)
    assert compiled
    assert "damaged, or of another format; the program is made anew" in caplog.text


def test_a_second_run_takes_the_programs_of_the_process_and_keeps_its_own(tmp_path):
    task = line_recipe.task(line_recipe.CONFIG)
    for name in ("one", "two"):
        with machine(tmp_path / "store") as compiled:
            fit(task, TRAIN, tmp_path / name, stop_after=2)
    assert compiled == []
    assert programs(tmp_path / "one") == programs(tmp_path / "two")


def test_a_step_that_calls_python_is_not_stored_and_trains(tmp_path, caplog):
    """A compiled program holds the address of the Python function, which another process does not have."""
    task, seen = line_recipe.task(line_recipe.CONFIG), []

    def loss(params, frozen, batch, key):
        jax.debug.callback(seen.append, batch[1][0])
        return task.loss(params, frozen, batch, key)

    with machine(tmp_path / "store"), caplog.at_level(logging.INFO, "clvr.programs"):
        fit(dataclasses.replace(task, loss=loss), TRAIN, tmp_path / "run", stop_after=2)
    jax.effects_barrier()
    assert len(seen) == 2
    assert "its program cannot be stored" in caplog.text


def test_where_nothing_is_stored_a_run_stores_nothing(tmp_path):
    with program_store(None):
        fit(line_recipe.task(line_recipe.CONFIG), TRAIN, tmp_path / "run", stop_after=2)
    assert not (tmp_path / "run" / "programs").exists()


@pytest.mark.slow
def test_a_restart_of_rl_compiles_only_what_cannot_be_stored(tmp_path, caplog):
    """XLA cannot serialize a program for CPUs that sorts, as the update does: timesteps are in random order."""
    dataset, config = (
        make_dataset(tmp_path / "dataset"),
        dataclasses.replace(RL_CONFIG, epochs=3, mesh=MeshConfig(fsdp=8)),
    )
    with program_store(None):
        expected = fit_rl(make_task(dataset), config, tmp_path / "whole")
    with machine(tmp_path / "first"), caplog.at_level(logging.INFO, "clvr.programs"):
        fit_rl(make_task(dataset), config, tmp_path / "run", stop_after=2)
    with machine(tmp_path / "second") as compiled:
        state = fit_rl(make_task(dataset), config, tmp_path / "run", resume=True)
    names = {"start", "rollout", "accumulate", "apply", "end_epoch", "zero_grads"}
    assert names & set(compiled) == {"accumulate"}
    assert "`LessThan` is not serializable" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
