"""Flower's SuperLink, unmodified, as a child process that only its coordinator can command.

Flower serves its Fleet, Control and Runtime APIs on one port, and Control to anybody who reaches it. Here the port for
the sites speaks TLS 1.3 and passes the Fleet API alone; Control and Runtime are served on a Unix socket in a folder of
mode 0700, behind a bearer token and an HMAC that are new at each start. The process ends when its standard input does,
so it never outlives the coordinator.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import uvicorn
from flwr.supercore.auth.typing import AccountAuthCredentials, AccountAuthLoginDetails, AccountInfo
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.superlink.auth_plugin import ControlAuthnPlugin, NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from accord_shared.service import logs
from accord_shared.service.keyfile import passphrase

FLEET = "/v1/fleet/"
CLOSED = ("/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab")
"""Sites are registered by the coordinator, and no site has use for a bundle of code."""
MOST_BODY = 64 * 2**20
MOST_BODIES = 8 * MOST_BODY
"""Of all that are read at one time: nobody has shown a key before."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class SuperLinkSettings(pydantic.BaseModel):
    """What the coordinator tells the process on its standard input, one JSON object on one line."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    host: str
    port: int
    certificate: Path
    """PEM chain of the server."""
    key: Path
    socket: Path
    """For the coordinator; its folder has mode 0700."""
    database: Path | None
    """Flower's own state; None: in memory."""
    control_token: pydantic.SecretStr
    superexec_secret: pydantic.SecretStr
    """Hexadecimal."""

    @staticmethod
    def new_secret() -> pydantic.SecretStr:
        """32 random bytes, hexadecimal."""
        return pydantic.SecretStr(secrets.token_hex(32))

    def to_line(self) -> bytes:
        """The line that `main` reads; it holds the secrets."""
        value = self.model_dump(mode="json")
        value |= {name: getattr(self, name).get_secret_value() for name in ("control_token", "superexec_secret")}
        return json.dumps(value).encode() + b"\n"


class TokenAuth(ControlAuthnPlugin):
    """Whoever shows the coordinator's token commands; nobody else does."""

    def __init__(self, token: str = "") -> None:
        self._token = token
        self._nobody = NoOpControlAuthnPlugin()

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Compare in constant time."""
        shown = [value if isinstance(value, bytes) else value.encode() for _, value in metadata]
        if not self._token or not any(secrets.compare_digest(value, self._token.encode()) for value in shown):
            return False, None
        return self._nobody.validate_tokens_in_metadata(metadata)

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        """Nobody logs in."""
        return None

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:
        """Nobody gets tokens."""
        return None

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        """Nobody gets tokens."""
        return None, None


@dataclass
class FleetOnly:
    """What sites reach of the app: the Fleet API, with bodies up to a limit."""

    app: App
    reading: int = 0
    """Bytes of the bodies of requests that are not answered yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass, or answer 404, 411, 413 or 503."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        refused, length = _too_long(headers)
        if not scope["path"].startswith(FLEET) or scope["path"] in CLOSED:
            refused = 404
        elif self.reading + length > MOST_BODIES:
            refused = refused or 503
        if refused:
            await _refuse(send, refused)
            return
        self.reading += length
        try:
            await self.app(scope, receive, send)
        finally:
            self.reading -= length


def _too_long(headers: dict[bytes, bytes]) -> tuple[int, int]:
    """Why a body is refused (0: it is not), and its length. One in pieces has none, whatever it says beside."""
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not length.isdigit():
        return 411, 0
    if len(length) > 12 or int(length) > MOST_BODY:
        return 413, 0
    return 0, int(length)


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3 only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_pair(context, certificate, key)
    return context


def load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Read certificate and key, which may be encrypted; connections from now on see them."""
    context.load_cert_chain(certificate, key, password=lambda: passphrase() or b"")


def superlink_app(settings: SuperLinkSettings) -> App:
    """Flower's app, commanded by token only."""
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=settings.host,
        port=settings.port,
        insecure=False,
        certificates=None,
        superexec_auth_secret=bytes.fromhex(settings.superexec_secret.get_secret_value()),
        authn_plugin=TokenAuth(settings.control_token.get_secret_value()),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(settings.database) if settings.database is not None else FLWR_IN_MEMORY_DB_NAME,
        isolation="process",
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


async def serve(settings: SuperLinkSettings) -> None:
    """Both listeners over one app until standard input ends or a signal comes. SIGHUP: the certificate is read anew."""
    context = tls_context(settings.certificate, settings.key)
    app = superlink_app(settings)
    settings.socket.unlink(missing_ok=True)
    quiet: dict[str, Any] = {"log_config": None, "access_log": False, "workers": 1, "timeout_graceful_shutdown": 2}
    inner = uvicorn.Server(uvicorn.Config(app, uds=str(settings.socket), **quiet))
    outer = uvicorn.Server(
        uvicorn.Config(
            FleetOnly(app),
            host=settings.host,
            port=settings.port,
            lifespan="off",
            ssl_context_factory=lambda *_: context,
            limit_concurrency=1024,
            **quiet,
        )
    )

    def stop() -> None:
        inner.should_exit = outer.should_exit = True

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, lambda: load_pair(context, settings.certificate, settings.key))
    _when_input_ends(lambda: loop.call_soon_threadsafe(stop))
    await asyncio.gather(inner.serve(), outer.serve())


def _when_input_ends(then: Callable[[], object]) -> None:
    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        then()

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Entry of the process: settings on standard input, log on standard error."""
    os.umask(0o077)
    logs.configure("WARNING")
    settings = SuperLinkSettings.model_validate_json(sys.stdin.readline())
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
