import itertools
import time

import pytest
import sqlalchemy as sql
from sqlalchemy.exc import OperationalError

from tests.serving.index.postgres import postgresql

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_server():
    """The URL of a PostgreSQL server that accepts connections."""
    with postgresql() as url:
        engine = sql.create_engine(url.replace("postgresql:", "postgresql+psycopg:") + "/postgres")
        for _ in range(600):
            try:
                engine.connect().close()
                break
            except OperationalError:
                time.sleep(0.1)
        engine.dispose()
        yield url


@pytest.fixture
def postgres_url(postgres_server):
    """The URL of an empty database."""
    name = f"test_{next(_numbers)}"
    engine = sql.create_engine(
        postgres_server.replace("postgresql:", "postgresql+psycopg:") + "/postgres", isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return f"{postgres_server}/{name}"
