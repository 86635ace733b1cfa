"""What all commands of `accord server` have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from accord_server.settings import CoordinatorFolder, CoordinatorSettings

DEFAULT_FOLDER = Path("accord-server")
Folder = Annotated[Path, typer.Option("--folder", envvar="ACCORD_SERVER_FOLDER", help="The coordinator's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
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


def show(facts: dict[str, Any], lines: Sequence[str], as_json: bool) -> None:
    """Print the facts as one JSON object, or as lines."""
    typer.echo(json.dumps(facts) if as_json else "\n".join(lines))


def fields(facts: dict[str, Any]) -> list[str]:
    """Lines of names and values; what is empty is left out."""
    given = {key: value for key, value in facts.items() if value not in (None, "", [], {})}
    return [f"{key.replace('_', ' '):20} {_word(value)}" for key, value in given.items()]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def moment(microseconds: int) -> str | None:
    """Microseconds since the epoch as RFC 3339; None for 0, which is never."""
    if not microseconds:
        return None
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")
