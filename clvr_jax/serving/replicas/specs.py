"""What a replica stores of a job, so that another one can run it, and the job made again from that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import encode_png
from clvr_jax.files.json_input import JsonObject
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.loop.editable import Branch
from clvr_jax.reasoning.loop.resumable import SNAPSHOT_FORMAT, ResumablePromptState
from clvr_jax.serving.event_log import Event
from clvr_jax.serving.index.records import Progress, Run
from clvr_jax.serving.index.rows import DamagedRowError
from clvr_jax.serving.index.shared import SharedStore
from clvr_jax.serving.jobs import LoopJob, LoopSpec, Mode
from clvr_jax.serving.models import Sampling
from clvr_jax.serving.scheduling.limits import Limits

_MAX_COUNT = 1000
"""Of images, candidates and retries in a stored budget."""


def spec_to_json(spec: LoopSpec) -> dict[str, Any]:
    """Returns a spec without its request, its images, and its branch, whose steps are in the first snapshot."""
    return {
        "prompt": spec.prompt,
        "seed": spec.seed,
        "mode": spec.mode,
        "budget": asdict(spec.budget),
        "sampling": asdict(spec.sampling),
        "given": len(spec.images),
    }


def capture(job: LoopJob) -> Callable[[int, int], Progress]:
    """Captures the progress of a job between two works, on the device thread, without encoding an image there.

    Returns: a function of the ids of the first event and of the first step that are not stored yet; it returns what is
      to be stored.
    """
    state, steps, events = job.state, job.state.steps, job.log.events
    started, best = job.started, job.best
    snapshot = None
    if isinstance(state, ResumablePromptState):
        snapshot = {**state.snapshot(), "elapsed": job.elapsed}

    def encoded(first_event: int, first_step: int) -> Progress:
        files = {
            f"step_{number:02d}.png": encode_png(step.image)
            for number, step in enumerate(steps)
            if number >= first_step and step.image is not None
        }
        new = [event for event in events if event["id"] >= first_event]
        return Progress(started, sum(step.image is not None for step in steps), best, snapshot, new, files)

    return encoded


def given_files(spec: LoopSpec) -> dict[str, bytes]:
    """Returns the user's own images as files."""
    return {f"given_{number:02d}.png": encode_png(image) for number, image in enumerate(spec.images)}


def restore(
    run: Run, store: SharedStore, limits: Limits, make_job: Callable[[LoopSpec, list[Event]], LoopJob]
) -> LoopJob:
    """Makes the job of a loop again.

    Args:
      run: the loop, which this replica has taken over.
      store: has its images.
      limits: of this replica.
      make_job: makes a new job of a spec and of the events so far.
    Raises: DamagedRowError if what the index has of it is damaged; ClvrError if it cannot be resumed now, because an
      image is missing, or the other replica is of another version or has larger limits.
    """
    content = JsonObject(run.spec, f"the running loop {run.loop_id}: spec")
    with _damage():
        budget, sampling = _budget(content.nested("budget")), _sampling(content.nested("sampling"))
        prompt, seed, given = content.text("prompt"), content.integer("seed"), content.integer("given", low=0)
    _check_limits(budget, sampling, limits, content.where)
    images = store.given_images(run.loop_id, given)
    trajectory = store.running_trajectory(run)
    snapshot = None if run.snapshot is None else JsonObject(run.snapshot, f"the running loop {run.loop_id}: snapshot")
    branch = None
    if trajectory is not None and trajectory.parent is not None:
        assert snapshot is not None  # the trajectory comes from it
        with _damage():
            instruction = snapshot.optional("instruction", snapshot.text)
        branch = Branch(trajectory.parent, (), None, instruction)  # its steps are in the snapshot
    mode: Mode = "one-shot" if run.spec["mode"] == "one-shot" else "loop"
    spec = LoopSpec(prompt, seed, mode, budget, sampling, images, run.request, branch)
    events, _ = store.events_after(run.loop_id, -1)
    job = make_job(spec, events)
    elapsed = 0.0
    if isinstance(job.state, ResumablePromptState) and snapshot is not None and trajectory is not None:
        if snapshot.content.get("format") != SNAPSHOT_FORMAT:
            raise ClvrError(f"{snapshot.where}: is of another version; a replica of that version resumes it")
        with _damage():
            job.state.restore(snapshot, trajectory)
            elapsed = snapshot.number("elapsed", low=0)
    job.resume(run.loop_id, run.created, run.started, elapsed)
    return job


@contextmanager
def _damage() -> Iterator[None]:
    """Turns errors of the block into those of a damaged row."""
    try:
        yield
    except ClvrError as error:
        raise DamagedRowError(f"{error}; it cannot be resumed") from error


def _budget(content: JsonObject) -> Budget:
    """Reads what `asdict` made of a budget. Raises: ClvrError."""
    fields: dict[str, Any] = {}
    for name, default in asdict(Budget()).items():
        if isinstance(default, str):
            fields[name] = content.text(name)
        elif name == "max_seconds":
            fields[name] = content.optional(name, content.number)
        elif name == "max_nfe":
            fields[name] = content.optional(name, content.integer)
        else:
            fields[name] = content.integer(name, low=0, high=_MAX_COUNT)
    _refuse_others(content, fields)
    try:
        return Budget(**fields)
    except UsageError as error:
        raise ClvrError(f"{content.where}: {error}") from error


def _sampling(content: JsonObject) -> Sampling:
    """Reads what `asdict` made of how images are generated. Raises: ClvrError."""
    size = content.optional("size", lambda key: content.integers(key, low=1))
    if size is not None and len(size) != 2:
        raise ClvrError(f"{content.where}: size must be height and width, got {len(size)} numbers")
    steps = content.optional("steps", lambda key: content.integer(key, low=1))
    guidance = content.optional("guidance", content.number)
    _refuse_others(content, {"size": size, "steps": steps, "guidance": guidance})
    return Sampling(None if size is None else (size[0], size[1]), steps, guidance)


def _refuse_others(content: JsonObject, known: Mapping[str, Any]) -> None:
    if unknown := sorted(set(content.content).difference(known)):
        raise ClvrError(f"{content.where}: has the unknown field {unknown[0]!r:.60}")


def _check_limits(budget: Budget, sampling: Sampling, limits: Limits, where: str) -> None:
    """Raises ClvrError for what this replica would not have accepted."""
    height, width = sampling.size or (0, 0)
    for name, value, limit in (
        ("max_steps", budget.max_steps, limits.max_loop_steps),
        ("max_seconds", budget.max_seconds, limits.max_seconds),
        ("num_inference_steps", sampling.steps, limits.max_inference_steps),
        ("pixels", height * width, limits.max_pixels),
    ):
        if value is not None and value > limit:
            raise ClvrError(f"{where}: {name} is {value:g}, at most {limit:g} on this replica")
