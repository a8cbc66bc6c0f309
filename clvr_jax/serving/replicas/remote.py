"""Loops that another replica runs, as the endpoints of this one serve them: their events, and commands for them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from clvr_jax.serving.errors import ApiError
from clvr_jax.serving.event_log import Event
from clvr_jax.serving.index.records import Command, Run
from clvr_jax.serving.index.shared import SharedStore

if TYPE_CHECKING:
    from clvr_jax.serving.service import Service

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 60.0
STOP_SECONDS = 10.0
"""How long an accept or cancel waits for the replica that runs the loop."""


async def follow_elsewhere(service: Service, loop_id: str, after: int) -> AsyncIterator[Event | None]:
    """Yields the events of a loop of any replica with an id above `after`, and None after each long silence."""
    store, keepalive, heard = _store(service), service.limits.keepalive_seconds, time.monotonic()
    while True:
        events, is_running = await asyncio.to_thread(store.events_after, loop_id, after)
        for event in events:
            yield event
            after, heard = event["id"], time.monotonic()
        if not is_running and not events:
            return
        if time.monotonic() - heard >= keepalive:
            yield None
            heard = time.monotonic()
        if is_running:
            await asyncio.sleep(min(_POLL_SECONDS, keepalive))


async def stop_elsewhere(service: Service, run: Run, kind: str) -> bool:
    """Sends "accept" or "cancel" to the replica that runs a loop, and waits for some seconds until that has it.

    Returns: whether it has it, or the loop has ended meanwhile; else the command is carried out later, by the next
      replica if need be.
    Raises: ApiError as the other replica answers.
    """
    store, command = _store(service), Command(secrets.token_hex(12), run.loop_id, kind, {})
    try:
        outcome = await _outcome(store, command, STOP_SECONDS)
    except _EndedError:
        return True
    if outcome is not None:
        await asyncio.to_thread(store.retract, command.id)
        _raise_refusal(outcome)
    return outcome is not None


async def carry_out_elsewhere(service: Service, run: Run, kind: str, content: dict[str, Any]) -> None:
    """Sends a command and waits until it has taken effect.

    Raises: ApiError: as the other replica answers; 400 if the loop ended before; 503, with the name of the other
      replica, if it does not answer in time. The command is withdrawn then.
    """
    store, command = _store(service), Command(secrets.token_hex(12), run.loop_id, kind, content)
    try:
        outcome = await _outcome(store, command, _ANSWER_SECONDS)
    except _EndedError as error:
        raise ApiError(400, "the loop has ended already", code="not_running") from error
    await asyncio.to_thread(store.retract, command.id)
    if outcome is None:
        message = f"{run.owner or 'the next replica'}, which runs the loop, has not answered; try again later"
        raise ApiError(503, message, code="replica_silent", retry_after=10)
    _raise_refusal(outcome)


class _EndedError(Exception):
    """The loop has ended before the command was carried out."""


async def _outcome(store: SharedStore, command: Command, seconds: float) -> dict[str, Any] | None:
    """Sends a command and returns what it has led to; None if that is not known after some seconds."""
    await asyncio.to_thread(store.send, command)
    end = time.monotonic() + seconds
    while True:
        # In this order: what is answered before the loop ends is found.
        is_running = bool(await asyncio.to_thread(store.owners, [command.loop_id]))
        outcome = await asyncio.to_thread(store.outcome, command.id)
        if outcome is not None or (is_running and time.monotonic() > end):
            return outcome
        if not is_running:
            await asyncio.to_thread(store.retract, command.id)  # the loop may have ended before it was sent
            raise _EndedError
        await asyncio.sleep(_POLL_SECONDS / 2)


def _raise_refusal(outcome: dict[str, Any]) -> None:
    if outcome["status"] >= 400:
        message = outcome.get("message") or "the other replica has refused it"
        raise ApiError(outcome["status"], message, outcome.get("param"), outcome.get("code"))


def _store(service: Service) -> SharedStore:
    assert isinstance(service.store, SharedStore)  # only replicas have loops elsewhere
    return service.store
