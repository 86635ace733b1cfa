"""Networks of tests on loopback: an HTTP proxy that counts, and servers that fail in one chosen way."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Answer = Callable[[socket.socket], None]


@contextmanager
def listening(answer: Answer) -> Iterator[int]:
    """A port of 127.0.0.1 whose every connection is answered in a thread of its own."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        connections: list[socket.socket] = []

        def one(connection: socket.socket) -> None:
            with suppress(OSError):
                answer(connection)
            with suppress(OSError):
                connection.close()

        def loop() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connections.append(connection)
                    threading.Thread(target=one, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for connection in connections:
                with suppress(OSError):
                    connection.close()


class ConnectProxy:
    """A real HTTP proxy for CONNECT: `targets` are those asked for, `refused` answers that were not 200.

    `routes` says where a host:port really is: names that nobody else can resolve.
    """

    def __init__(self, credentials: str | None = None, routes: dict[str, int] | None = None, status: int = 200) -> None:
        self._wanted = credentials and "Basic " + base64.b64encode(credentials.encode()).decode()
        self._routes, self._status = routes or {}, status
        self.targets: list[str] = []
        self.refused = 0

    def __call__(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(4096)
            if not data:
                return
            head += data
        first, *lines = head.decode("ascii").split("\r\n")
        method, target, _ = first.split(" ")
        shown = {name.strip().lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
        status = 407 if self._wanted and shown.get("proxy-authorization") != self._wanted else self._status
        if method != "CONNECT" or status != 200:
            self.refused += 1
            client.sendall(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
            return
        self.targets.append(target)
        port = self._routes.get(target) or int(target.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 5) as server:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=passed, args=(server, client), daemon=True)
            back.start()
            passed(client, server)
            back.join(5)


def passed(source: socket.socket, target: socket.socket) -> None:
    """Until the source ends."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def tls_server(pem: Path, change: Callable[[ssl.SSLContext], None] = lambda _: None) -> Answer:
    """TLS with key and certificate of a PEM file, and then an HTTP answer without a body."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    change(context)
    context.load_cert_chain(pem)

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            head = b""
            while b"\r\n\r\n" not in head and (data := secure.recv(4096)):
                head += data
            secure.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            secure.recv(1)

    return answer
