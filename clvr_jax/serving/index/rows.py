"""Rows of the index as values, each checked before it is used.

A row may be damaged, or written by another program. Only what is wrong with it is lost then: a loop is listed as failed
with one line that says what, a command is refused, and nothing else that the server does is disturbed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sql

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JsonObject, check_unicode, parse_object
from clvr_jax.serving.index.records import FAILED, STATES, Command, Run

MAX_CHARACTERS = 16 << 20
"""Of a JSON text in the index. The texts of a loop, its prompt in each of its steps included, have far fewer."""
_MAX_GIVEN = 1000


class DamagedRowError(ClvrError):
    """A row of the index is not as this program writes it."""


def bounded(column: sql.Column[str]) -> sql.ColumnElement[str]:
    """Returns a column of JSON, cut off just above the limit, so that the database never sends a larger text."""
    return sql.func.substr(column, 1, MAX_CHARACTERS + 1).label(column.name)


def entry_from(row: Any) -> dict[str, Any]:
    """Returns a row of the table of loops; a damaged one as failed, with those of its fields that can be read."""
    fields = JsonObject(dict(row._mapping), f"the entry of loop {row.id!s:.60}")

    def count(key: str) -> int:
        return fields.integer(key, low=0)

    def optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
        return lambda key: fields.optional(key, read)

    readers: dict[str, tuple[Callable[[str], Any], Any]] = {
        "id": (fields.text, f"{row.id!s:.60}"),
        "created": (fields.number, 0.0),
        "finished": (optional(fields.number), None),
        "status": (lambda key: _one_of(fields, key, STATES), FAILED),
        "mode": (fields.text, "loop"),
        "prompt": (fields.text, ""),
        "model": (fields.text, ""),
        "seed": (fields.integer, 0),
        "request": (lambda _: dict(_request(fields).content), {}),
        "outcome": (optional(fields.text), None),
        "best": (optional(count), None),
        "images": (optional(count), None),
        "nfe": (optional(count), None),
        "seconds": (optional(fields.number), None),
        "error": (optional(fields.text), None),
    }
    entry: dict[str, Any] = {}
    damage = None
    for name, (read, default) in readers.items():
        try:
            entry[name] = read(name)
        except ClvrError as error:
            entry[name], damage = default, damage or f"{error}; delete the loop"
    return entry if damage is None else {**entry, "status": FAILED, "error": damage}


def run_from(row: Any) -> Run:
    """Returns a row of the tables of running loops and of loops, joined; of a damaged one what is wrong with it."""
    fields = JsonObject(dict(row._mapping), f"the running loop {row.loop_id!s:.60}")
    try:
        started = fields.optional("started", fields.number)
        best = fields.optional("best", lambda key: fields.integer(key, low=0))
        snapshot = fields.optional("snapshot", lambda key: _json(fields, key))
        spec = _json(fields, "spec")
        spec.text("prompt")
        _one_of(spec, "mode", ("loop", "one-shot"))
        spec.integer("given", low=0, high=_MAX_GIVEN)
        return Run(
            row.loop_id,
            fields.number("created"),
            row.owner,
            started,
            fields.integer("images", low=0),
            best,
            dict(spec.content),
            None if snapshot is None else dict(snapshot.content),
            dict(_request(fields).content),
            fields.integer("resumptions", low=0),
        )
    except ClvrError as error:
        return Run(row.loop_id, 0.0, row.owner, None, 0, None, {}, None, {}, 0, damage=f"{error}; it cannot be resumed")


def command_from(row: Any) -> Command:
    """Returns a row of the table of commands. Raises: DamagedRowError."""
    fields = JsonObject(dict(row._mapping), f"a command for {row.loop_id!s:.60}")
    try:
        kind = _one_of(fields, "kind", ("accept", "cancel", "plan", "rollback"))
        content = _json(fields, "content")
        if kind == "plan":
            content.optional("requirements", content.texts)
            content.optional("instruction", content.text)
        elif kind == "rollback":
            content.integer("step", low=0)
        return Command(row.id, row.loop_id, kind, dict(content.content))
    except ClvrError as error:
        raise DamagedRowError(f"{error}; send it again") from error


def outcome_from(text: Any, loop_id: str) -> dict[str, Any]:
    """Returns what a command has led to. Raises: DamagedRowError."""
    try:
        outcome = _json(JsonObject({"outcome": text}, f"a command for {loop_id:.60}"), "outcome")
        outcome.integer("status", low=200, high=599)
        for name in ("message", "param", "code"):
            if name in outcome.content:
                outcome.optional(name, outcome.text)
        return dict(outcome.content)
    except ClvrError as error:
        raise DamagedRowError(f"{error}; send it again") from error


def event_from(value: Any, where: str) -> dict[str, Any]:
    """Returns an event. Raises: DamagedRowError if it has no id or no type.

    Args:
      value: its JSON text, or the object that was read from it.
      where: of which loop, for messages.
    """
    try:
        event = _json(JsonObject({"event": value}, where), "event")
        event.integer("id", low=0)
        event.text("type")
        return dict(event.content)
    except ClvrError as error:
        raise DamagedRowError(f"{error}; delete the loop") from error


def _request(fields: JsonObject) -> JsonObject:
    """Returns the stored request, which is sent to clients as JSON."""
    request = _json(fields, "request")
    try:
        json.dumps(request.content, allow_nan=False)
    except ValueError as error:
        raise ClvrError(f"{request.where}: has a number that is not finite") from error
    check_unicode(request.content, request.where)
    return request


def _json(fields: JsonObject, key: str) -> JsonObject:
    """Returns a field that is a JSON object, or the text of one."""
    if isinstance(fields.content.get(key), dict):
        return fields.nested(key)
    return parse_object(fields.text(key, max_characters=MAX_CHARACTERS), f"{fields.where}: {key}")


def _one_of(fields: JsonObject, key: str, choices: tuple[str, ...]) -> str:
    found = fields.text(key)
    if found not in choices:
        raise ClvrError(f"{fields.where}: {key} must be one of {', '.join(choices)}, got {found!r:.60}")
    return found
