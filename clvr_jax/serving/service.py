"""The service behind the endpoints: checks requests against the models, runs jobs, and stores what they give."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import ImageLike, as_pil, lazy_image, pixels
from clvr_jax.pipelines.flux2.settings import MAX_REFERENCE_PIXELS
from clvr_jax.pipelines.images import check_size
from clvr_jax.providers.base64_text import decode_base64, read_data_url
from clvr_jax.providers.failures import Failure
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.trajectories.trajectory import CANCELED, Trajectory
from clvr_jax.serving.errors import ApiError, api_error, message_of
from clvr_jax.serving.event_log import EventLog
from clvr_jax.serving.index import records as states
from clvr_jax.serving.index.records import Run
from clvr_jax.serving.index.shared import LostLeaseError, SharedStore
from clvr_jax.serving.index.store import LoopStore
from clvr_jax.serving.jobs import INTERRUPTED, ChatJob, LoopJob, LoopSpec
from clvr_jax.serving.models import ChatWork, Sampling, ServedModels
from clvr_jax.serving.replicas.replica import Replica
from clvr_jax.serving.requests import MEDIUM_STEPS, ImageRequest, LoopFields
from clvr_jax.serving.scheduling.futures import deliver, deliver_error
from clvr_jax.serving.scheduling.limits import Limits
from clvr_jax.serving.scheduling.metrics import Metrics
from clvr_jax.serving.scheduling.scheduler import DrainingError, QueueFullError, Scheduler, split_by_job

_NOT_STORED = "the result cannot be stored"
_log = logging.getLogger("clvr.serving")
_IMAGE_ID = re.compile(r"(loop_[0-9a-f]{24})_(\d{1,4})(?:\.(png|jpeg|webp))?")


class Service:
    """One server.

    Args:
      models: what it serves.
      limits: what requests may take.
      store: of finished loops.
      warm_up: specs whose loops run, in batches of each given size, before the server is ready.
    """

    def __init__(self, models: ServedModels, limits: Limits, store: LoopStore, warm_up: Sequence[list[LoopSpec]] = ()):
        self.models, self.limits, self.store = models, limits, store
        self.metrics = Metrics()
        self.metrics.image_rows = limits.image_rows
        self._warm_up = warm_up
        self.scheduler = Scheduler(models.perform, limits, self.metrics, self._prepare)
        self.jobs: dict[str, LoopJob] = {}
        self._writer = ThreadPoolExecutor(1, "clvr-store")
        self.replica = Replica(self, store, self._writer) if isinstance(store, SharedStore) else None
        self.loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Starts the device thread; called in the event loop of the connections."""
        self.loop = asyncio.get_running_loop()
        self.scheduler.start()
        if self.replica is not None:
            self.replica.start()

    def drain(self) -> None:
        """Refuses further jobs; running loops get some time to end, the rest is interrupted.

        Interrupted loops are stored as such, or resumed by another replica if there are replicas.
        """
        if self.replica is not None:
            self.replica.stop_taking()
        self.scheduler.drain(self.limits.drain_seconds, INTERRUPTED)

    def close(self) -> None:
        """Drains, writes what is left, and closes the store."""
        self.drain()
        self._writer.shutdown()
        if self.replica is not None:
            self.replica.close()  # only now: while loops run, their leases are renewed
        self.store.close()

    # --- requests -> jobs

    def specs(self, request: LoopFields, images: Sequence[ImageLike], count: int = 1) -> list[LoopSpec]:
        """Returns the loops that a request asks for, with the seeds SEED, SEED + 1 and so on.

        Raises: ApiError for what the models or the limits do not allow.
        """
        models, limits = self.models, self.limits
        self.check_model(request.model, models.name)
        mode = request.chosen_mode or ("loop" if models.has_loop else "one-shot")
        if mode == "loop" and not models.has_loop:
            raise ApiError(422, "this server has no controller; ask for mode one-shot", "mode", "unsupported_parameter")
        self._check_limits(request)
        size = request.height_and_width
        try:
            if size is not None:
                check_size(*size, models.token_pixels)
        except UsageError as error:
            raise ApiError(422, str(error), "size", "invalid_value") from error
        try:
            models.flux.check_prompts([request.prompt])
        except ClvrError as error:
            raise ApiError(422, str(error), "prompt", "invalid_value") from error
        number = _pixel_count(size or (None if images else models.default_size), images)
        if number > limits.max_pixels:
            message = f"the image would have {number:,} pixels, at most {limits.max_pixels:,} are allowed; give a size"
            raise ApiError(422, message, "size", "invalid_value")
        steps = MEDIUM_STEPS if isinstance(request, ImageRequest) and request.level == "medium" else request.max_steps
        try:
            budget = Budget(
                max_steps=min(steps or Budget.max_steps, limits.max_loop_steps),
                max_nfe=request.max_nfe,
                max_seconds=request.max_seconds or limits.max_seconds,
                stop_when=request.stop_when or "controller",
                candidates=request.candidates or 1,
            )
        except UsageError as error:
            raise ApiError(422, str(error), None, "invalid_value") from error
        first = secrets.randbelow(2**31 - count) if request.seed is None else request.seed
        sampling = Sampling(size, request.num_inference_steps, request.guidance_scale)
        stored = request.model_dump(exclude_none=True, exclude={"images", "prompt"})
        return [
            LoopSpec(request.prompt, (first + number) % 2**31, mode, budget, sampling, tuple(images), stored)
            for number in range(count)
        ]

    def _check_limits(self, request: LoopFields) -> None:
        limits, settings = self.limits, self.models.flux.settings
        checks: list[tuple[str, float | None, float]] = [
            ("num_inference_steps", request.num_inference_steps, limits.max_inference_steps),
            ("max_steps", request.max_steps, limits.max_loop_steps),
            ("max_seconds", request.max_seconds, limits.max_seconds),
        ]
        for name, value, limit in checks:
            if value is not None and value > limit:
                raise ApiError(422, f"{name}: at most {limit:g} on this server, got {value:g}", name, "invalid_value")
        if request.guidance_scale is not None and settings.is_distilled:
            reason = "the model is distilled and uses no guidance"
            raise ApiError(422, f"guidance_scale is not supported: {reason}", "guidance_scale", "unsupported_parameter")

    def check_model(self, given: str | None, name: str | None) -> None:
        """Raises ApiError if a request names another model than the one that serves it."""
        if given is not None and given != name:
            known = ", ".join(each for each in (self.models.name, self.models.chat_name) if each)
            message = f"the model {given[:100]!r} does not serve this endpoint; GET /v1/models lists: {known}"
            raise ApiError(404, message, "model", "model_not_found")

    def read_image(self, content: bytes, param: str) -> Image.Image:
        """Decodes an image of a user. Raises: ApiError, 400, for anything else."""
        try:
            image = lazy_image(content, param)
            if image.width * image.height > self.limits.max_pixels * 4:
                raise ClvrError(f"{param}: has more than {self.limits.max_pixels * 4:,} pixels; make it smaller")
            array = pixels(image)
        except ClvrError as error:
            raise ApiError(400, str(error), param, "invalid_image") from error
        token = self.models.token_pixels
        if min(array.shape[:2]) < token:
            raise ApiError(400, f"{param}: each side needs at least {token} pixels", param, "invalid_image")
        return as_pil(array)

    def decode_image(self, text: str, param: str) -> Image.Image:
        """Decodes base64 or a data URL. Raises: ApiError, 400, also for URLs, which are never fetched."""
        if re.match(r"[a-zA-Z][\w+.-]*://", text):
            raise ApiError(400, f"{param}: URLs are not fetched; send the image as a data URL", param, "invalid_image")
        try:
            content = read_data_url(text) if text.startswith("data:") else decode_base64(text)
        except Failure as error:
            raise ApiError(400, f"{param}: {error}; send base64 or a data URL", param, "invalid_image") from error
        return self.read_image(content, param)

    async def start_loops(self, specs: Sequence[LoopSpec]) -> list[LoopJob]:
        """Starts loops as `submit`, without blocking connections while an index elsewhere is written."""
        return self.submit(specs) if self.replica is None else await asyncio.to_thread(self.submit, specs)

    def submit(self, specs: Sequence[LoopSpec]) -> list[LoopJob]:
        """Starts loops, all or none. Raises: ApiError, 429 or 503, if they cannot start now."""
        self.check_ready()
        assert self.loop is not None
        jobs = [self.make_job(spec, EventLog(self.loop)) for spec in specs]
        try:
            with _refusals():
                self.scheduler.check_room(len(jobs))  # before anything is written
            for job in jobs:
                job.log.append("queued")
                self._list(job)
                self.jobs[job.id] = job
            self._submit(jobs)
        except ClvrError as error:
            self._withdraw(jobs)
            raise api_error(error) from error
        except ApiError:
            self._withdraw(jobs)
            raise
        return jobs

    def make_job(self, spec: LoopSpec, log: EventLog) -> LoopJob:
        """Returns a job of this service that is not submitted yet."""
        on_turn = (lambda _: None) if self.replica is None else self.replica.save
        return LoopJob(spec, self.models, log, self._on_end, on_turn)

    def run_elsewhere(self, loop_id: str) -> Run | None:
        """Returns a loop that another replica runs, or will resume; None for any other, and if its row is damaged."""
        run = None if self.replica is None or loop_id in self.jobs else self.store.run(loop_id)
        return None if run is None or run.damage is not None else run

    def is_running(self, entry: Mapping[str, Any]) -> bool:
        """Whether a loop of the index runs, here or at another replica."""
        return entry["id"] in self.jobs or entry["status"] == states.RUNNING

    def _list(self, job: LoopJob) -> None:
        if self.replica is not None:
            self.replica.accept(job)
        else:
            self.store.add(job.listing())

    def _withdraw(self, jobs: Sequence[LoopJob]) -> None:
        for job in jobs:
            self.jobs.pop(job.id, None)
        with contextlib.suppress(ClvrError):  # an index that cannot be reached has an error of its own
            self.store.withdraw([job.id for job in jobs])

    def submit_chat(self, work: ChatWork) -> ChatJob:
        """Starts a reply. Raises: ApiError as `submit`."""
        self.check_ready()
        job = ChatJob(work, self.models)
        self._submit([job])
        return job

    def check_ready(self) -> None:
        """Raises ApiError, 503, while the server starts or after it failed."""
        if not self.scheduler.is_ready or not self.scheduler.is_alive:
            raise ApiError(503, "the server is not ready; try again later", code="not_ready", retry_after=5)

    def _submit(self, jobs: Sequence[Any]) -> None:
        with _refusals():
            self.scheduler.submit(jobs)

    # --- results

    def _on_end(self, job: LoopJob, trajectory: Trajectory | None, error: BaseException | None) -> None:
        """Stores the result of a loop on another thread, so that the device does not wait."""
        self._writer.submit(self._store, job, trajectory, error)

    def _store(self, job: LoopJob, trajectory: Trajectory | None, error: BaseException | None) -> None:
        try:
            if self.replica is not None and (job.is_interrupted or (error and error is self.scheduler.failure)):
                give_away = self.replica.hand_back if job.is_interrupted else self.replica.give_up
                give_away(job)
                raise LostLeaseError(f"{job.id}: is handed back")
            if trajectory is not None:
                self._count(trajectory)
                status = _status(job, trajectory)
                done = {"status": status, "outcome": trajectory.outcome, "best": trajectory.best,
                        "nfe": trajectory.nfe, "seconds": round(trajectory.seconds, 4)}  # fmt: skip
                self._finish(job, status, trajectory, {"id": job.log.next_id, "type": "done", **done})
                job.log.append("done", **done)
                deliver(job.result, trajectory)
            else:
                assert error is not None
                self.store.fail(job.id, message_of(error))
                self.metrics.outcomes.labels("failed").inc()
                job.log.append("done", status=states.FAILED, error=message_of(error))
                deliver_error(job.result, error)
        except LostLeaseError:  # whoever follows the loop here is sent to another replica by the load balancer
            advice = f"it is at /v1/loops/{job.id}"
            message = f"this server stops, and another one continues the loop; {advice}"
            deliver_error(job.result, ApiError(503, message, code="moved", retry_after=10))
        except Exception as problem:  # noqa: BLE001 - the client must get an answer even if the disk is full
            _log.exception("%s cannot be stored", job.id)
            self._list_as_lost(job)
            job.log.append("done", status=states.FAILED, error=_NOT_STORED)
            deliver_error(job.result, problem)
        finally:
            self.metrics.job_seconds.observe(time.time() - job.created)
            job.log.complete()
            self.jobs.pop(job.id, None)
            if self.replica is not None:
                self.replica.forget(job)

    def _finish(self, job: LoopJob, status: str, trajectory: Trajectory, done: dict[str, Any]) -> None:
        def write() -> None:
            self.store.finish(job.id, status, trajectory, [*job.log.events, done])

        write() if self.replica is None else self.replica.patiently(write)

    def _list_as_lost(self, job: LoopJob) -> None:
        """Lists a loop as failed that would else be listed as running; without a disk that waits for a restart."""
        try:
            self.store.fail(job.id, _NOT_STORED)
        except Exception:  # noqa: BLE001 - the client must get an answer all the same
            _log.exception("%s cannot be listed as failed", job.id)

    def _count(self, trajectory: Trajectory) -> None:
        self.metrics.outcomes.labels(trajectory.outcome).inc()
        self.metrics.generations.observe(len(trajectory.generated))
        self.metrics.nfe.observe(trajectory.nfe)
        self.metrics.verifications.inc(sum(step.verification is not None for step in trajectory.steps))

    def image(self, image_id: str) -> tuple[bytes, str]:
        """Returns the bytes and the media type of an image id. Raises: ApiError, 404, if there is no such image."""
        found = _IMAGE_ID.fullmatch(image_id)
        if found is None:
            raise ApiError(404, "no such image", "id", "not_found")
        loop_id, step, kind = found[1], int(found[2]), found[3] or "png"
        job = self.jobs.get(loop_id)
        if job is not None and step < len(job.state.steps):
            image = job.state.steps[step].image
        else:
            try:
                image = self.store.image(loop_id, step)
            except ClvrError:
                image = None
        if image is None:
            raise ApiError(404, "no such image; it may have been deleted", "id", "not_found")
        return encode(image, kind), f"image/{kind}"

    # --- warm-up

    def _prepare(self) -> None:
        """Runs loops on the device thread, so that their programs are compiled before the first request."""
        for specs in self._warm_up:
            jobs = [LoopJob(spec, self.models, EventLog(None), lambda *_: None) for spec in specs]
            while tasks := [task for job in jobs for task in job.tasks(0.0)]:
                for key in dict.fromkeys(task.key for task in tasks):
                    batch = [task for task in tasks if task.key == key]
                    for part in split_by_job(batch, self.limits.concurrent_calls, self.limits.image_rows):
                        self.models.perform(key, part)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns the refusals of the scheduler into errors of the API."""
    try:
        yield
    except QueueFullError as error:
        raise ApiError(429, str(error), code="queue_full", retry_after=error.seconds) from error
    except DrainingError as error:
        raise ApiError(503, str(error), code="shutting_down", retry_after=10) from error


def encode(image: ImageLike, kind: str, compression: int | None = None) -> bytes:
    """Encodes an image.

    Args:
      image: the image.
      kind: "png", "jpeg" or "webp".
      compression: quality of jpeg and webp in percent; 100 if None.
    """
    buffer = io.BytesIO()
    pillow = Image.fromarray(np.ascontiguousarray(pixels(image)))
    options = {} if kind == "png" else {"quality": 100 if compression is None else compression}
    pillow.save(buffer, format=kind.upper(), **options)
    return buffer.getvalue()


def _pixel_count(size: tuple[int, int] | None, images: Sequence[ImageLike]) -> int:
    """Returns the pixels of an image of this size; None takes the size of the first image, as the pipeline does."""
    if size is not None:
        return size[0] * size[1]
    first = as_pil(images[0])
    return min(first.height * first.width, MAX_REFERENCE_PIXELS)


def _status(job: LoopJob, trajectory: Trajectory) -> str:
    if job.is_interrupted:
        return states.INTERRUPTED
    return states.CANCELED if trajectory.outcome == CANCELED else states.FINISHED
