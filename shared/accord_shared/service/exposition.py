"""Serves a Prometheus registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from accord_shared.errors import Unreachable


@contextmanager
def exposed(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    """Answer at `/metrics` while the context lasts; the port (0: one that is free).

    Raises:
        Unreachable: the address cannot be bound.
    """
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise Unreachable(f"cannot listen on {host}:{port}: {error.strerror}") from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
