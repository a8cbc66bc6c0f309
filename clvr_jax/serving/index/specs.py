"""What a replica stores of a job, so that another one can run it, and the job made again from that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.image_io import encode_png
from clvr_jax.json_input import JsonObject
from clvr_jax.reasoning.budget import Budget
from clvr_jax.reasoning.editable import Branch
from clvr_jax.reasoning.edits import Parent
from clvr_jax.reasoning.resumable import ResumablePromptState
from clvr_jax.reasoning.trajectory import Trajectory
from clvr_jax.serving.event_log import Event
from clvr_jax.serving.index.records import Progress, Run
from clvr_jax.serving.index.shared import SharedStore
from clvr_jax.serving.jobs import LoopJob, LoopSpec
from clvr_jax.serving.models import Sampling


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


def restore(run: Run, store: SharedStore, make_job: Callable[[LoopSpec, list[Event]], LoopJob]) -> LoopJob:
    """Makes the job of a loop again.

    Args:
      run: the loop, which this replica has taken over.
      store: has its images.
      make_job: makes a new job of a spec and of the events so far.
    Raises: ClvrError if something is missing or damaged.
    """
    content = JsonObject(run.spec, f"{run.loop_id}: the stored loop")
    images = store.given_images(run.loop_id, content.integer("given", low=0))
    trajectory = store.running_trajectory(run)
    try:
        size = run.spec["sampling"]["size"]
        sampling = Sampling(**{**run.spec["sampling"], "size": None if size is None else (size[0], size[1])})
        spec = LoopSpec(
            content.text("prompt"),
            content.integer("seed"),
            "one-shot" if content.text("mode") == "one-shot" else "loop",
            Budget(**run.spec["budget"]),
            sampling,
            images,
            run.request,
            _branch(run, trajectory),
        )
    except (TypeError, KeyError, IndexError, UsageError) as error:
        raise ClvrError(f"{content.where}: is damaged ({type(error).__name__}: {error})") from error
    events, _ = store.events_after(run.loop_id, -1)
    job = make_job(spec, events)
    elapsed = 0.0
    if isinstance(job.state, ResumablePromptState) and run.snapshot is not None and trajectory is not None:
        snapshot = JsonObject(run.snapshot, f"{run.loop_id}: the snapshot")
        job.state.restore(snapshot, trajectory)
        elapsed = snapshot.number("elapsed", low=0)
    job.resume(run.loop_id, run.created, run.started, elapsed)
    return job


def _branch(run: Run, trajectory: Trajectory | None) -> Branch | None:
    """Returns where a loop branched off; its steps are in the snapshot."""
    parent: Parent | None = None if trajectory is None else trajectory.parent
    if parent is None:
        return None
    instruction = None if run.snapshot is None else run.snapshot["instruction"]
    return Branch(parent, (), None, instruction)
