"""A PostgreSQL server of the tests' own: Debian's programs, a new cluster in a temporary directory, on loopback."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

USER, PASSWORD = "clvr", "a-password-of-the-tests"


def binary(name: str) -> str | None:
    """Returns the path of one of PostgreSQL's programs; Debian keeps those of each version in a directory."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return str(versions[-1]) if versions else shutil.which(name)


@contextmanager
def postgresql() -> Iterator[str]:
    """Yields the URL of a running server without the name of a database; skips the test where there is no PostgreSQL.

    With CLVR_REQUIRE_POSTGRES=1, as in CI, a missing server is a failure.
    """
    initdb, postgres = binary("initdb"), binary("postgres")
    if initdb is None or postgres is None:
        if os.environ.get("CLVR_REQUIRE_POSTGRES") == "1":
            pytest.fail("CLVR_REQUIRE_POSTGRES=1, but there is no PostgreSQL: apt-get install postgresql")
        pytest.skip("there is no PostgreSQL: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
    place = Path(tempfile.mkdtemp(prefix="clvr-postgres-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = None
    try:
        (place / "password").write_text(PASSWORD)
        if user is not None:
            for path in (place, place / "password"):
                shutil.chown(path, user)
        data = str(place / "data")
        options = ["--username", USER, "--pwfile", str(place / "password"), "--auth", "scram-sha-256", "--no-sync"]
        subprocess.run(
            [initdb, "--pgdata", data, "--encoding", "UTF8", "--locale", "C", *options],
            user=user, cwd=place, check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": place, "fsync": "off"}
        command = [postgres, "-D", data, *(f"--{name}={value}" for name, value in settings.items())]
        server = subprocess.Popen(command, user=user, cwd=place, stderr=subprocess.DEVNULL)
        yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}"
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # at once, without waiting for clients
            server.wait(60)
        shutil.rmtree(place, ignore_errors=True)
