"""/v1/loops/{id}/plan, /rollback and /branch: a user changes a running loop, or starts another one from its images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.reasoning.loop.editable import EditablePromptState, branch_off
from clvr_jax.reasoning.trajectories.edits import EditError, check_instruction, check_requirements
from clvr_jax.reasoning.trajectories.trajectory import Step, Trajectory
from clvr_jax.serving.api.bodies import BoundedRoute
from clvr_jax.serving.api.loops import OWN_FIELDS, entry_of, loop_item, running_loop
from clvr_jax.serving.errors import ApiError
from clvr_jax.serving.index.records import Run
from clvr_jax.serving.index.shared import SharedStore
from clvr_jax.serving.jobs import LoopJob, LoopSpec
from clvr_jax.serving.replicas.remote import carry_out_elsewhere
from clvr_jax.serving.requests import BranchRequest, PlanRequest, RollbackRequest, stored_request
from clvr_jax.serving.scheduling.scheduler import EndedError
from clvr_jax.serving.service import Service


def edit_routes(service: Service) -> APIRouter:
    """Returns the endpoints."""
    router = APIRouter(route_class=BoundedRoute)

    @router.post("/v1/loops/{loop_id}/plan")
    async def plan(loop_id: str, body: PlanRequest) -> Response:
        """Changes the requirements of a running loop, or gives the instruction for its next image."""
        loop, prompt = await _editable(service, loop_id)
        await asyncio.to_thread(_check, service, prompt, body.instruction, body.requirements)
        if isinstance(loop, Run):
            await carry_out_elsewhere(service, loop, "plan", body.model_dump())
        else:
            state = _state(loop)
            await _change(service, loop, lambda: state.edit_plan(body.requirements, body.instruction))
        return JSONResponse(await asyncio.to_thread(loop_item, service, loop_id))

    @router.post("/v1/loops/{loop_id}/rollback")
    async def rollback(loop_id: str, body: RollbackRequest) -> Response:
        """Returns to an earlier image of a running loop."""
        loop, _ = await _editable(service, loop_id)
        if isinstance(loop, Run):
            await carry_out_elsewhere(service, loop, "rollback", body.model_dump())
        else:
            state = _state(loop)
            await _change(service, loop, lambda: state.roll_back_to(body.step))
        return JSONResponse(await asyncio.to_thread(loop_item, service, loop_id))

    @router.post("/v1/loops/{loop_id}/branch", status_code=202)
    async def branch(loop_id: str, body: BranchRequest) -> Response:
        """Starts another loop from an image of a running or finished one."""
        (job,) = await service.start_loops([await asyncio.to_thread(_branch, service, loop_id, body)])
        item = await asyncio.to_thread(loop_item, service, job.id)
        return JSONResponse(item, 202, {"Location": f"/v1/loops/{job.id}"})

    return router


async def _change(service: Service, job: LoopJob, function: Callable[[], None]) -> None:
    """Changes a job between its works.

    Raises: ApiError, 400 if the job has ended by then, 422 if it cannot be changed so.
    """
    try:
        await asyncio.wrap_future(service.scheduler.change(job, function))
    except EndedError as error:
        raise ApiError(400, str(error), code="not_running") from error
    except EditError as error:
        raise _refusal(error) from error


def _branch(service: Service, loop_id: str, body: BranchRequest) -> LoopSpec:
    entry = entry_of(service, loop_id)
    if entry["mode"] == "one-shot":
        raise _one_shot("send its image to POST /v1/loops to start a loop from it")
    job = service.jobs.get(loop_id)
    steps: Sequence[Step]
    images: Sequence[ImageLike]
    if job is not None:
        steps, images = job.state.steps, job.spec.images
    elif (running := _running_trajectory(service, loop_id)) is not None:
        steps, images = running.steps, running.given_images
    elif entry["images"]:
        trajectory = service.store.trajectory(loop_id)
        steps, images = trajectory.steps, trajectory.given_images
    else:
        raise ApiError(409, "the loop has no image to branch off from", code="no_image")
    prompt = entry["prompt"] if body.prompt is None else body.prompt
    _check(service, prompt, body.instruction)
    # The limits and the sampling of the other loop, whichever endpoint it came from.
    fields: dict[str, Any] = {**entry["request"], "prompt": prompt, "seed": body.seed}
    for name in OWN_FIELDS:
        fields.pop(name, None)
    (spec,) = service.specs(stored_request(fields, loop_id), images)
    has_new_prompt = prompt != entry["prompt"]
    try:
        branch = branch_off(loop_id, steps, body.step, has_new_prompt=has_new_prompt, instruction=body.instruction)
    except EditError as error:
        raise _refusal(error) from error
    return replace(spec, branch=branch, request={**spec.request, "parent": {"id": loop_id, "step": body.step}})


def _running_trajectory(service: Service, loop_id: str) -> Trajectory | None:
    """Returns what a loop of another replica has so far; None if no other one runs it."""
    run = service.run_elsewhere(loop_id)
    return None if run is None or not isinstance(service.store, SharedStore) else service.store.running_trajectory(run)


async def _editable(service: Service, loop_id: str) -> tuple[LoopJob | Run, str]:
    """Returns a running loop and its prompt. Raises: ApiError: 404, 400 if it has ended, 409 for a one-shot image."""
    loop = await running_loop(service, loop_id)
    mode, prompt = (
        (loop.spec["mode"], loop.spec["prompt"]) if isinstance(loop, Run) else (loop.spec.mode, loop.spec.prompt)
    )
    if mode == "one-shot":
        raise _one_shot("start a loop to change its plan")
    return loop, prompt


def _state(job: LoopJob) -> EditablePromptState:
    assert isinstance(job.state, EditablePromptState)  # as its mode is loop
    return job.state


def _check(service: Service, prompt: str, instruction: str | None, requirements: Sequence[str] | None = None) -> None:
    """Raises ApiError, 422, for texts that the models cannot read."""
    try:
        if requirements is not None:
            check_requirements(requirements)
        if instruction is not None:
            marks = [""] * service.limits.max_loop_steps  # of the images before it
            service.models.flux.fit_history(prompt, [*marks, check_instruction(instruction)])
    except EditError as error:
        raise _refusal(error) from error
    except ClvrError as error:
        raise ApiError(422, str(error), "instruction", "invalid_value") from error


def _refusal(error: EditError) -> ApiError:
    return ApiError(422, str(error), error.param, "invalid_value")


def _one_shot(advice: str) -> ApiError:
    return ApiError(409, f"a one-shot image has no plan; {advice}", code="one_shot")
