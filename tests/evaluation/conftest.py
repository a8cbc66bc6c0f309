from tests.providers.conftest import endpoint, server

__all__ = ["endpoint", "server"]
