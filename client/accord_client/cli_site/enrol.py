"""`accord site enrol` and `accord site roster`: how a site becomes a member, and whom it trusts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_client.cli_site.options import DEFAULT_FOLDER, Folder, opened
from accord_shared.cli_output import Json, fields, show
from accord_shared.errors import BadInput, NotAdmitted, Unreachable

if TYPE_CHECKING:
    from accord_client.coordinator import CoordinatorClient, OfferedRoster
    from accord_client.rosters import RosterBook
    from accord_client.settings import CoordinatorSpec
    from accord_shared.roster import SignedRoster

roster_app = typer.Typer(help="The list of members that this site trusts.", no_args_is_help=True)


def enrol(
    token: Annotated[str, typer.Argument(help="The one-time token of the coordinator's operator; - reads it.")],
    name: Annotated[str | None, typer.Option(help="The name that the token is expected to be for.")] = None,
    again: Annotated[bool, typer.Option("--again", help="New certificate for a folder that is enrolled.")] = False,
    new_key: Annotated[bool, typer.Option("--new-key", help="With --again, after a revocation.")] = False,
    proxy: Annotated[
        str | None,
        typer.Option(metavar="URL", help="http://HOST:PORT that every connection takes; goes into site.toml."),
    ] = None,
    proxy_credentials: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="USER:PASSWORD, mode 0600, relative to the folder (or ACCORD_PROXY_CREDENTIALS)."
        ),
    ] = None,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Make keys, which stay here, and enrol with the coordinator that the token names."""
    from accord_client.enrolment import enrol as enrol_site
    from accord_client.keystore import Keys

    text = sys.stdin.read(65536) if token == "-" else token  # noqa: S105 - read from standard input
    way = _way(proxy, proxy_credentials)
    made = enrol_site(text, folder, name, again=again, new_key=new_key, way=way)
    facts = {
        "name": made.name,
        "federation": made.federation,
        "folder": str(folder),
        "fingerprint": Keys.load(opened(folder)).member(made.name).fingerprint,
        "coordinator": made.coordinator.fingerprint,
    }
    next_steps = [
        "Tell this fingerprint, by another way, to whoever makes the roster and to the coordinator's operator.",
        f"Then describe the data in {folder / 'site.toml'}, what is allowed in {folder / 'policy.toml'},",
        "and look at `accord site check`.",
    ]
    show(facts, [*fields(facts), *next_steps], as_json)


def _way(proxy: str | None, credentials: str | None) -> CoordinatorSpec | None:
    from pydantic import ValidationError

    from accord_client.settings import CoordinatorSpec
    from accord_shared.plan import first_problem

    if proxy is None and credentials is None:
        return None
    try:
        return CoordinatorSpec(proxy=proxy, proxy_credentials=credentials)
    except ValidationError as error:
        raise BadInput(f"--proxy: {first_problem(error)}") from None


@roster_app.command("show")
def show_roster(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """The accepted roster, and the one that the coordinator offers."""
    with _session(folder) as (client, book):
        offered, problem = _asked(client)
    accepted = book.accepted
    facts = {
        "accepted": _roster_facts(accepted),
        "offered": _roster_facts(offered.signed) if offered is not None else None,
        **_endorsements(book, offered),
        "problem": problem or _problem(book, offered),
    }
    lines = ["accepted:", *_roster_lines(accepted)]
    if offered is not None and offered.signed is not None and offered.signed != accepted:
        lines += ["offered:", *_roster_lines(offered.signed)]
    show(facts, [*lines, *fields({k: v for k, v in facts.items() if k not in ("accepted", "offered")})], as_json)


@roster_app.command()
def accept(
    wanted: Annotated[str, typer.Argument(metavar="HASH", help="The roster's hash, from a source you trust.")],
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Trust the offered roster if it has this hash; a later one once enough members do."""
    with _session(folder) as (client, book):
        signed = client.roster().signed
        if signed is None:
            raise BadInput("the coordinator offers no roster yet")
        answer = client.endorse(book.endorse(wanted, signed))
        done = book.accept(wanted, signed, answer.endorsements)
    facts = {"roster": signed.roster.hash, **done.facts()}
    told = "adopted" if done.adopted else f"endorsed by {done.endorsed} of {done.needed} members that it needs"
    show(facts, [f"roster {signed.roster.hash}: {told}"], as_json)


@contextmanager
def _session(path: Path) -> Iterator[tuple[CoordinatorClient, RosterBook]]:
    from accord_client.coordinator import CoordinatorClient
    from accord_client.keystore import Keys
    from accord_client.rosters import RosterBook

    folder = opened(path)
    keys = Keys.load(folder)
    with CoordinatorClient(folder, keys) as client:
        enrolment = client.enrolment
        yield client, RosterBook(folder, keys.identity, enrolment.name, enrolment.federation)


def _asked(client: CoordinatorClient) -> tuple[OfferedRoster | None, str | None]:
    """What is accepted is shown without the coordinator too."""
    try:
        return client.roster(), None
    except (Unreachable, NotAdmitted) as error:
        return None, str(error)


def _problem(book: RosterBook, offered: OfferedRoster | None) -> str | None:
    """Why the offered roster cannot be accepted."""
    from accord_shared.errors import RosterError

    if offered is None or offered.signed is None:
        return None
    try:
        book.check(offered.signed)
    except RosterError as error:
        return str(error)
    return None


def _endorsements(book: RosterBook, offered: OfferedRoster | None) -> dict[str, Any]:
    if offered is None or offered.signed is None:
        return {}
    endorsed, needed = book.endorsed(offered.signed, offered.endorsements)
    return {"endorsed": endorsed, "needed": needed}


def _roster_facts(signed: SignedRoster | None) -> dict[str, Any] | None:
    if signed is None:
        return None
    roster = signed.roster
    return {
        "hash": roster.hash,
        "federation": roster.federation,
        "serial": roster.serial,
        "minimum": roster.minimum,
        "colluders": roster.colluders,
        "roster_key": signed.key.fingerprint,
        "members": [{"name": member.name, "fingerprint": member.fingerprint} for member in roster.members],
    }


def _roster_lines(signed: SignedRoster | None) -> list[str]:
    facts = _roster_facts(signed)
    if facts is None:
        return ["  none"]
    members = [f"    {member['fingerprint']}  {member['name']}" for member in facts.pop("members")]
    return [*(f"  {line}" for line in fields(facts)), "  members", *members]
