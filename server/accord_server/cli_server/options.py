"""What all commands of `accord server` have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from accord_server.settings import CoordinatorFolder, CoordinatorSettings
    from accord_shared.service.pb import accord_pb2 as pb

DEFAULT_FOLDER = Path("accord-server")
Folder = Annotated[Path, typer.Option("--folder", envvar="ACCORD_SERVER_FOLDER", help="The coordinator's folder.")]
Name = Annotated[str, typer.Argument(help="The site's name.")]
CALL_S = 60.0


def opened(path: Path) -> tuple[CoordinatorFolder, CoordinatorSettings]:
    """The folder and its settings; see `CoordinatorSettings.read`."""
    from accord_server.settings import CoordinatorFolder, CoordinatorSettings

    settings = CoordinatorSettings.read(path)
    return CoordinatorFolder(path.absolute()), settings


@contextmanager
def coordinator(path: Path) -> Iterator[Any]:
    """The running coordinator of a folder. Errors inside are typed.

    Raises:
        NotRunning: there is none, or it does not answer.
    """
    from accord_shared.service.pb import accord_pb2_grpc
    from accord_shared.service.rpc import local_channel

    folder, _ = opened(path)
    with local_channel(folder.control, "coordinator", "the coordinator") as channel:
        yield accord_pb2_grpc.CoordinatorStub(channel)


def asked_status(path: Path) -> pb.StatusReply:
    """What the running coordinator says of itself; see `coordinator`."""
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(path) as server:
        reply: pb.StatusReply = server.Status(pb.Empty(), timeout=CALL_S)
        return reply


def obstacle(path: Path) -> str:
    """Why the coordinator is not ready for sites; empty: it is."""
    return "" if asked_status(path).superlink else "the SuperLink does not answer"
