"""gRPC between Accord's processes: typed errors across the wire, TLS with AEAD suites, local sockets with a token.

grpcio lets nobody set a lowest TLS version: it speaks 1.3 with our own ends, and would accept 1.2 with the suites below
from others. A front that refuses 1.2 is in deploy/.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

AEAD_SUITES = ":".join(
    f"ECDHE-{key}-{cipher}"
    for key in ("ECDSA", "RSA")
    for cipher in ("AES256-GCM-SHA384", "AES128-GCM-SHA256", "CHACHA20-POLY1305")
)
os.environ["GRPC_SSL_CIPHER_SUITES"] = AEAD_SUITES  # read when grpc makes its first credentials
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what fails is told by typed errors

import grpc  # noqa: E402
from cryptography import x509  # noqa: E402
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # noqa: E402
from grpc_reflection.v1alpha import reflection  # noqa: E402

from accord_shared import errors  # noqa: E402
from accord_shared.errors import AccordError, NotRunning, OutputError, Refused, Unreachable, printable  # noqa: E402
from accord_shared.files import write_atomic  # noqa: E402
from accord_shared.service.actor import act_as, os_user  # noqa: E402
from accord_shared.service.causes import unreachable  # noqa: E402
from accord_shared.service.egress import Proxy  # noqa: E402

log = logging.getLogger(__name__)

MOST_MESSAGE = 16 * 2**20
"""Longest message over the network; models travel in chunks."""
MOST_LOCAL = 2**30
"""Longest message over a local socket, which only its own operator can reach: a run's initial weights."""
MOST_REQUEST = 256 * 1024
"""Longest message that a site or a stranger sends."""
CHUNK = 1 << 20
TOKEN = "accord-token"  # noqa: S105 - the name of the metadata key
_USER = "accord-user-bin"
_PATH_LIMIT = 104
"""Longest path of a Unix socket that every system takes."""
_CODES: dict[type[AccordError], grpc.StatusCode] = {
    Refused: grpc.StatusCode.PERMISSION_DENIED,
    errors.BadInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Aborted: grpc.StatusCode.ABORTED,
}
_OF_THIS_MACHINE = (errors.IdentityError, errors.OutputError, errors.SettingsError, errors.CheckpointError)
"""Their lines name files."""
T = TypeVar("T")
Add = Callable[[grpc.Server], object]
"""Adds servicers to a server."""


# --- typed errors


def _code(error: AccordError) -> grpc.StatusCode:
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), grpc.StatusCode.FAILED_PRECONDITION)


def _abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    """End a call by an error: a typed one goes over with its line, any other is a bug and stays in the log.

    So does one of this machine's files, unless it is the operator who calls, over a local socket.
    """
    local = str(context.peer()).startswith("unix:")
    if isinstance(error, AccordError) and (local or not isinstance(error, _OF_THIS_MACHINE)):
        context.abort(_code(error), f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000])
    log.exception("a call failed")
    context.abort(grpc.StatusCode.INTERNAL, "internal error")
    raise error


class _TypedErrors(grpc.ServerInterceptor):
    """Lets servicers raise `AccordError`."""

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _streaming(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _answering(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )


def _answering(behaviour: Any) -> Any:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        act_as(_operator(context))
        try:
            return behaviour(request, context)
        except Exception as error:
            if context.code() is not None:  # type: ignore[attr-defined]
                raise
            _abort(context, error)

    return answer


def _streaming(behaviour: Any) -> Any:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        act_as(_operator(context))
        try:
            yield from behaviour(request, context)
        except Exception as error:
            if context.code() is not None:  # type: ignore[attr-defined]
                raise
            _abort(context, error)

    return answer


def _operator(context: grpc.ServicerContext) -> str:
    """Whom a call over a local socket is of; a call over the network is of nobody until a certificate says it."""
    if not str(context.peer()).startswith("unix:"):
        return ""
    shown = next((value for key, value in context.invocation_metadata() if key == _USER), b"")
    return "operator " + (shown.decode("utf-8", "replace") if isinstance(shown, bytes) else shown)


@contextmanager
def typed_errors(peer: str, proxy: Proxy | None = None) -> Iterator[None]:
    """Around calls to `peer` (its name in words): raises the typed error that the other side raised.

    Raises:
        Unreachable: nobody answers, in time or at all.
        Refused: any other failure.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise _typed(error, peer, proxy) from None


def _typed(error: Any, peer: str, proxy: Proxy | None) -> AccordError:
    code, details = error.code(), printable(str(error.details() or ""))
    name, _, line = details.partition(": ")
    kind = getattr(errors, name, None) if name.isidentifier() else None
    if isinstance(kind, type) and issubclass(kind, AccordError):
        return kind(line)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return unreachable(peer, details, proxy.address if proxy is not None else None)
    return Refused(f"{peer} refused: {code.name.lower()} {details[:200]}".strip())


# --- servers


class _FewStreams(grpc.ServerInterceptor):
    """At most so many calls at one time of each method that streams: each keeps a thread for as long as it lasts."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: dict[str, threading.Semaphore] = {}

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = continuation(details)
        if handler is None or not (handler.request_streaming or handler.response_streaming):
            return handler
        free = self._free.setdefault(details.method, threading.Semaphore(self._most))
        make, behaviour = (
            (grpc.stream_stream_rpc_method_handler, handler.stream_stream)
            if handler.request_streaming
            else (grpc.unary_stream_rpc_method_handler, handler.unary_stream)
        )
        return make(_few(behaviour, free), handler.request_deserializer, handler.response_serializer)


def _few(behaviour: Any, free: threading.Semaphore) -> Any:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if not free.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many of these calls at one time")
        if not context.add_callback(free.release):
            free.release()
            return
        yield from behaviour(request, context)

    return answer


def _server(workers: int, *interceptors: grpc.ServerInterceptor, most: int = MOST_MESSAGE) -> grpc.Server:
    return grpc.server(
        ThreadPoolExecutor(max_workers=workers, thread_name_prefix="rpc"),
        interceptors=[*interceptors, _TypedErrors()],
        options=[
            ("grpc.max_receive_message_length", most),
            ("grpc.max_concurrent_streams", 64),
            ("grpc.so_reuseport", 0),
            ("grpc.max_metadata_size", 16 * 1024),
        ],
    )


def add_health_and_reflection(server: grpc.Server, *services: str) -> None:
    """grpc.health.v1 (all serving) and reflection for these services, by their full names."""
    checks = health.HealthServicer()
    for name in ("", *services):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)


@dataclass(frozen=True)
class KeyPair:
    """A private key and the certificate chain for it, both PEM. It does not print the key."""

    key: bytes
    chain: bytes

    def __repr__(self) -> str:
        return "KeyPair(...)"


def secure_server(
    address: str,
    pair_of: Callable[[], KeyPair],
    add: Add,
    *,
    clients_of: Callable[[], bytes] | None = None,
    workers: int = 16,
) -> grpc.Server:
    """A TLS server that is not started yet. `pair_of` and `clients_of` are asked at every handshake.

    With `clients_of` (PEM of the authorities) only holders of their certificates get through.

    Raises:
        Unreachable: the address cannot be bound.
    """

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = pair_of()
        roots = clients_of() if clients_of is not None else None
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)], roots)

    credentials = grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=clients_of is not None
    )
    server = _server(workers, _FewStreams(workers // 4), most=MOST_REQUEST)
    add(server)
    try:
        bound = server.add_secure_port(address, credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise Unreachable(f"cannot listen on {address}")
    return server


def peer_certificate(context: grpc.ServicerContext) -> x509.Certificate:
    """The certificate with which a client came."""
    shown: Any = context.auth_context()["x509_pem_cert"]
    return x509.load_pem_x509_certificate(shown[0])


# --- clients


def secure_channel(
    address: str, authorities: bytes, pair: KeyPair | None = None, proxy: Proxy | None = None
) -> grpc.Channel:
    """A channel to a TLS server whose certificate one of `authorities` (PEM) signed, with a client certificate.

    Through a proxy if one is given; the environment's proxies are never used.
    """
    credentials = grpc.ssl_channel_credentials(
        authorities, pair.key if pair is not None else None, pair.chain if pair is not None else None
    )
    options: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", MOST_MESSAGE),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.enable_http_proxy", 0),
    ]
    if proxy is None:
        return grpc.secure_channel(address, credentials, options)
    return grpc.secure_channel(f"dns:///{proxy.address}", credentials, [*options, *_through(proxy, address)])


def _through(proxy: Proxy, address: str) -> Iterator[tuple[str, str]]:
    """What gRPC's own look at the environment would set, where `no_proxy` has a say over the option `grpc.http_proxy`.

    TLS is made with `address` and its certificate must name it: the proxy sees host and port alone.
    """
    yield "grpc.http_connect_server", address
    yield "grpc.default_authority", address
    if proxy.authorization is not None:
        yield "grpc.http_connect_headers", f"Proxy-Authorization:{proxy.authorization}"


# --- local sockets


class _TokenCheck(grpc.ServerInterceptor):
    """Nobody gets through who cannot read the token file."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

        def refuse(_: Any, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token of this start is missing or wrong")

        self._refuse: Any = grpc.unary_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        shown = next((value for key, value in details.invocation_metadata if key == TOKEN), "")
        data = shown if isinstance(shown, bytes) else shown.encode()
        return continuation(details) if secrets.compare_digest(data, self._token) else self._refuse


def private_folder(path: Path) -> Path:
    """Make a folder of mode 0700, or check that it is one of ours.

    Raises:
        OutputError: somebody else owns it, it is open to others, or it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise OutputError(f"cannot create {path}: {error.strerror}") from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise OutputError(f"{path} must belong to this user and be closed to others (mode 0700)")
    return path


def local_server(folder: Path, name: str, add: Add, *, workers: int = 8) -> grpc.Server:
    """A server on `folder/name.sock` for whoever can read `folder/name.token`, which is new at each start.

    grpcio makes the socket open to all and tells no peer's user: the folder (mode 0700) and the token keep others out.
    Not started yet. `local_channel` speaks to it.

    Raises:
        OutputError: the folder is not private, or its path is too long for a socket.
    """
    socket = private_folder(folder) / f"{name}.sock"
    if len(str(socket.resolve())) > _PATH_LIMIT:
        raise OutputError(f"{socket} is too long for a socket: at most {_PATH_LIMIT} characters")
    token = secrets.token_hex(32)
    server = _server(workers, _TokenCheck(token), most=MOST_LOCAL)
    add(server)
    socket.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{socket.resolve()}")
    write_atomic(folder / f"{name}.token", token.encode(), mode=0o600)
    return server


@contextmanager
def local_channel(folder: Path, name: str, what: str) -> Iterator[grpc.Channel]:
    """A channel to `local_server`; `what` names the daemon in words. Errors inside are typed.

    Raises:
        NotRunning: there is no such daemon, or it does not answer.
    """
    try:
        token = (folder / f"{name}.token").read_text()
    except FileNotFoundError:
        raise NotRunning(f"{what} is not running in {folder.parent}") from None
    socket = (folder / f"{name}.sock").resolve()
    with grpc.insecure_channel(f"unix:{socket}", [("grpc.max_receive_message_length", MOST_LOCAL)]) as channel:
        shown = grpc.intercept_channel(channel, _Token(token))
        try:
            with typed_errors(what):
                yield shown
        except Unreachable:
            raise NotRunning(f"{what} is not running in {folder.parent}") from None


class _Token(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Shows the token, and who calls."""

    def __init__(self, token: str) -> None:
        self._token = token

    def _details(self, details: Any) -> Any:
        shown = (TOKEN, self._token), (_USER, os_user().encode("utf-8", "replace"))
        return details._replace(metadata=[*(details.metadata or ()), *shown])

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._details(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._details(client_call_details), request)


def chunks(data: bytes) -> Sequence[bytes]:
    """Pieces of a long byte string that fit into messages."""
    return [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
