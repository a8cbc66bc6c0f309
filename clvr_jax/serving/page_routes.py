"""The page at `/`, and the endpoints that it needs beside those of loops: server, files and input images of a loop."""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import IO, Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response, StreamingResponse

from clvr_jax.display.html_pages import render_page
from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike, encode_png
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.trajectories.page import shared_texts, style_sheet
from clvr_jax.serving.errors import ApiError
from clvr_jax.serving.index.shared import SharedStore
from clvr_jax.serving.requests import MAX_CANDIDATES, MAX_PROMPT_CHARACTERS
from clvr_jax.serving.service import Service

_PATH = "/page/"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # No inline script or style, no other origin, no frame, no plug-in.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_CHUNK_BYTES = 1 << 20


def is_page(path: str) -> bool:
    """Whether a path belongs to the page, which holds no data and is sent without a key."""
    return path == "/" or path.startswith(_PATH)


def page_routes(service: Service, needs_key: bool) -> APIRouter:
    """Returns the page and its endpoints.

    Args:
      service: whose loops the page shows.
      needs_key: whether the page must ask for a key.
    """
    router = APIRouter()
    files = _page_files()

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        """Returns the page."""
        html = render_page("clvr_jax.serving", "page/index.html", needs_key=needs_key)
        return Response(html, headers=_HEADERS, media_type="text/html")

    @router.get(_PATH + "{name:path}", include_in_schema=False)
    async def file(name: str) -> Response:
        """Returns a file of the page."""
        if name not in files:
            raise ApiError(404, "no such path", code="not_found")
        content, media_type = files[name]
        return Response(content, headers=_HEADERS, media_type=media_type)

    @router.get("/v1/server")
    async def server() -> Response:
        """Returns what the server can do: models, defaults and limits."""
        return JSONResponse(_description(service))

    @router.get("/v1/loops/{loop_id}/archive")
    async def archive(loop_id: str) -> Response:
        """Returns the files of a stored loop as a ZIP archive: trajectory.json, images, index.html, events.json."""
        await asyncio.to_thread(_check_stored, service, loop_id)
        try:
            content = await asyncio.to_thread(_zip, service, loop_id)
        except (ClvrError, FileNotFoundError) as error:  # deleted in the meantime
            raise _unknown() from error
        headers = {"Content-Disposition": f'attachment; filename="{loop_id}.zip"'}
        return StreamingResponse(_chunks(content), headers=headers, media_type="application/zip")

    @router.get("/v1/loops/{loop_id}/input_images")
    async def input_images(loop_id: str) -> Response:
        """Returns the user's own images that a loop started from, as base64 PNG."""
        try:
            images = await asyncio.to_thread(_given_images, service, loop_id)
        except ClvrError as error:
            raise _unknown() from error
        encoded = [base64.b64encode(await asyncio.to_thread(encode_png, image)).decode() for image in images]
        return JSONResponse({"object": "list", "data": [{"b64_json": each} for each in encoded]})

    return router


def _page_files() -> dict[str, tuple[bytes, str]]:
    """Returns path below /page/ -> (content, media type) of all files of the page but index.html."""
    texts = f"export const texts = {json.dumps(shared_texts())};\n"
    files = {"texts.js": (texts.encode(), "text/javascript"), "trajectory.css": (style_sheet().encode(), "text/css")}
    page = resources.files("clvr_jax.serving").joinpath("page")
    for prefix, directory in (("", page), ("loop/", page.joinpath("loop"))):
        for entry in directory.iterdir():
            if (kind := _TYPES.get(Path(entry.name).suffix)) is not None:
                files[prefix + entry.name] = (entry.read_bytes(), kind)
    return files


def _description(service: Service) -> dict[str, Any]:
    models, limits = service.models, service.limits
    height, width = models.default_size
    return {
        "object": "server",
        "model": models.name,
        "chat_model": models.chat_name,
        "modes": ["loop", "one-shot"] if models.has_loop else ["one-shot"],
        "default_size": f"{width}x{height}",
        "size_multiple": models.token_pixels,
        "num_inference_steps": models.flux.settings.num_inference_steps,
        "nfe_per_step": models.flux.nfe_per_step,
        "max_steps": min(Budget.max_steps, limits.max_loop_steps),
        "limits": {
            "max_prompt_characters": MAX_PROMPT_CHARACTERS,
            "max_images": limits.max_images,
            "max_body_bytes": limits.max_body_bytes,
            "max_pixels": limits.max_pixels,
            "max_steps": limits.max_loop_steps,
            "max_candidates": MAX_CANDIDATES,
            "max_inference_steps": limits.max_inference_steps,
            "max_seconds": limits.max_seconds,
        },
    }


def _check_stored(service: Service, loop_id: str) -> None:
    """Raises ApiError, 404 or 400, unless the trajectory of a loop is stored."""
    entry = service.store.entry(loop_id)
    if entry is None:
        raise _unknown()
    if service.is_running(entry):
        raise ApiError(400, "the loop is running; its files are stored at its end", code="running")
    if entry["images"] is None:
        raise ApiError(404, f"the loop has no files ({entry['status']})", "id", "not_found")


def _given_images(service: Service, loop_id: str) -> Sequence[ImageLike]:
    """Returns the user's own images of a loop. Raises: ApiError as `_check_stored`; ClvrError if they were deleted."""
    if (job := service.jobs.get(loop_id)) is not None:
        return job.spec.images
    if (run := service.run_elsewhere(loop_id)) is not None and isinstance(service.store, SharedStore):
        return service.store.given_images(loop_id, run.spec["given"])
    _check_stored(service, loop_id)
    return service.store.trajectory(loop_id).given_images


def _unknown() -> ApiError:
    return ApiError(404, "no such loop; it may have been deleted", "id", "not_found")


def _zip(service: Service, loop_id: str) -> IO[bytes]:
    """Returns a temporary file, which disappears when it is closed, with the files of a loop as a ZIP archive."""
    content = tempfile.TemporaryFile()  # noqa: SIM115 - closed after it is sent
    try:
        with (
            service.store.local(loop_id) as directory,
            zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for path in sorted(directory.iterdir()):
                kind = zipfile.ZIP_STORED if path.suffix == ".png" else zipfile.ZIP_DEFLATED
                archive.write(path, f"{loop_id}/{path.name}", kind)
    except BaseException:
        content.close()
        raise
    content.seek(0)
    return content


def _chunks(content: IO[bytes]) -> Iterator[bytes]:
    with content:
        while chunk := content.read(_CHUNK_BYTES):
            yield chunk
