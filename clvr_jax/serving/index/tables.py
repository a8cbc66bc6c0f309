"""The tables of the index, and the engines that reach them: a file of SQLite, or a PostgreSQL server by URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from clvr_jax.errors import ClvrError, UsageError

VERSION = 2
"""Of the tables: in SQLite's user_version, and in the table `clvr_index` of PostgreSQL."""
_TABLES = sql.MetaData()
LOOPS = sql.Table(
    "loops",
    _TABLES,
    sql.Column("id", sql.Text, primary_key=True),
    sql.Column("created", sql.Double, nullable=False),
    sql.Column("finished", sql.Double),
    sql.Column("status", sql.Text, nullable=False),
    sql.Column("mode", sql.Text, nullable=False),
    sql.Column("prompt", sql.Text, nullable=False),
    sql.Column("model", sql.Text, nullable=False),
    sql.Column("seed", sql.BigInteger, nullable=False),
    sql.Column("request", sql.Text, nullable=False),
    sql.Column("outcome", sql.Text),
    sql.Column("best", sql.BigInteger),
    sql.Column("images", sql.BigInteger),
    sql.Column("nfe", sql.BigInteger),
    sql.Column("seconds", sql.Double),
    sql.Column("error", sql.Text),
    sql.Column("bytes", sql.BigInteger, nullable=False, server_default="0"),
    sql.Column("folded", sql.Text, nullable=False, server_default=""),
    sql.Index("loops_by_age", "created", "id"),
)
"""All loops. folded: the prompt without case, which is searched."""
RUNS = sql.Table(
    "runs",
    _TABLES,
    sql.Column("loop_id", sql.Text, primary_key=True),
    sql.Column("owner", sql.Text),
    sql.Column("expires", sql.Double, nullable=False, index=True),
    sql.Column("resumptions", sql.BigInteger, nullable=False, server_default="0"),
    sql.Column("started", sql.Double),
    sql.Column("images", sql.BigInteger, nullable=False, server_default="0"),
    sql.Column("best", sql.BigInteger),
    sql.Column("spec", sql.Text, nullable=False),
    sql.Column("snapshot", sql.Text),
)
"""Running loops of replicas. owner: the replica that runs it, until `expires`, in seconds of the database's clock; null
if it was handed back. spec: what to run; snapshot: its latest state; both are JSON."""
EVENTS = sql.Table(
    "events",
    _TABLES,
    sql.Column("loop_id", sql.Text, primary_key=True),
    sql.Column("id", sql.BigInteger, primary_key=True),
    sql.Column("content", sql.Text, nullable=False),
)
"""Events of running loops of replicas, as JSON."""
COMMANDS = sql.Table(
    "commands",
    _TABLES,
    sql.Column("id", sql.Text, primary_key=True),
    sql.Column("loop_id", sql.Text, nullable=False, index=True),
    sql.Column("created", sql.Double, nullable=False),
    sql.Column("kind", sql.Text, nullable=False),
    sql.Column("content", sql.Text, nullable=False),
    sql.Column("outcome", sql.Text),
)
"""What users asked for at one replica of loops that another one runs. outcome: JSON, once it was carried out."""

_INDEX_VERSION = sql.Table("clvr_index", sql.MetaData(), sql.Column("version", sql.Integer, nullable=False))
_LOCK = 0x636C7672
"""Number of the advisory lock under which the tables are made."""
_TIMEOUT_SECONDS = 10
_DAMAGED = """
SELECT id FROM loops WHERE typeof(id) <> 'text' OR length(id) <> 29 OR id NOT GLOB 'loop_*'
    OR id GLOB 'loop_*[^0-9a-f]*'
    OR typeof(created) <> 'real' OR typeof(finished) NOT IN ('real', 'null') OR typeof(status) <> 'text'
    OR typeof(mode) <> 'text' OR typeof(prompt) <> 'text' OR typeof(model) <> 'text' OR typeof(seed) <> 'integer'
    OR typeof(best) NOT IN ('integer', 'null') OR typeof(images) NOT IN ('integer', 'null')
    OR typeof(bytes) <> 'integer' OR NOT json_valid(request) LIMIT 1
"""
"""Finds an entry that this program has not written; an id becomes a path of what is deleted."""


class IndexUnavailableError(ClvrError):
    """The index cannot be reached, or refuses what is written."""


def open_sqlite(path: Path) -> sql.Engine:
    """Opens the index of one server, and creates or updates its tables.

    Raises: ClvrError if the file is no index, is damaged, or is of a later version.
    """
    if path.exists() and not path.is_file():  # SQLite would wait for a pipe
        raise ClvrError(f"{path}: is not a file; choose another --out")
    url = sql.URL.create("sqlite", database=str(path))
    engine = sql.create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
    sql.event.listen(engine, "connect", _prepare_sqlite)
    try:
        with engine.begin() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version not in range(VERSION + 1):
                raise ClvrError(f"{path}: has version {version}, this program reads version {VERSION}")
            if version == 1:
                connection.exec_driver_sql("ALTER TABLE loops ADD COLUMN folded TEXT NOT NULL DEFAULT ''")
                connection.exec_driver_sql("UPDATE loops SET folded = casefold(prompt)")
            _TABLES.create_all(connection, [LOOPS])
            connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
            for row in connection.exec_driver_sql(_DAMAGED):
                raise ClvrError(f"{path}: the entry of loop {row.id!r:.60} is damaged; choose another --out")
    except DBAPIError as error:
        raise ClvrError(f"{path}: cannot be written ({error.orig}); choose another --out") from error
    return engine


def open_postgresql(url: str) -> sql.Engine:
    """Connects to the index that replicas share, and creates its tables if there are none.

    Args:
      url: postgresql://USER:PASSWORD@HOST:PORT/DATABASE.
    Raises: UsageError for another URL; ClvrError if the server cannot be reached, or the index is of another version.
      No message has the password.
    """
    parsed = _parsed(url)
    place = parsed.set(drivername="postgresql", query={}).render_as_string(hide_password=True)
    try:
        engine = sql.create_engine(
            parsed,
            pool_pre_ping=True,  # a connection may have died with the server
            pool_size=5,
            pool_timeout=_TIMEOUT_SECONDS,
            hide_parameters=True,  # prompts are not for the log
            connect_args={
                "connect_timeout": _TIMEOUT_SECONDS,
                "tcp_user_timeout": _TIMEOUT_SECONDS * 1000,
                "options": f"-c statement_timeout={_TIMEOUT_SECONDS * 1000} -c lock_timeout={_TIMEOUT_SECONDS * 1000}",
            },
        )
    except ModuleNotFoundError as error:
        raise ClvrError(f"an index in PostgreSQL needs {error.name}: pip install 'clvr-jax[replicas]'") from error
    try:
        with engine.begin() as connection:
            connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_LOCK)))  # replicas may start at the same time
            _INDEX_VERSION.create(connection, checkfirst=True)
            version = connection.execute(sql.select(_INDEX_VERSION.c.version)).scalar()
            if version is None:
                connection.execute(sql.insert(_INDEX_VERSION).values(version=VERSION))
            elif version != VERSION:
                raise ClvrError(f"{place}: has version {version}, this program reads version {VERSION}")
            _TABLES.create_all(connection)
    except DBAPIError as error:
        raise ClvrError(f"{place}: the index cannot be opened ({_one_line(error)}); check the URL") from error
    return engine


def unavailable(error: SQLAlchemyError) -> IndexUnavailableError:
    """Returns an error of the database as one of ours, in one line."""
    return IndexUnavailableError(f"the index of loops cannot be reached or written ({_one_line(error)})")


def _parsed(url: str) -> sql.URL:
    try:
        parsed = sql.make_url(url)
    except (ArgumentError, ValueError) as error:  # its message has the URL, and so the password
        raise UsageError(
            "the URL of the index cannot be read; give postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from error
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise UsageError(f"the index is SQLite or postgresql://..., not {parsed.drivername[:40]}")
    return parsed.set(drivername="postgresql+psycopg")


def _one_line(error: SQLAlchemyError) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())[:300]


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.text_factory = lambda content: content.decode(errors="replace")
    connection.create_function("casefold", 1, str.casefold, deterministic=True)  # SQLite knows ASCII only
    # The write-ahead log survives kill -9 of the process; full durability would cost a disk flush per loop.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
