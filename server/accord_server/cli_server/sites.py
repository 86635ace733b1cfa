"""`accord server status|invite|sites|roster`: who belongs to the federation."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_server.cli_server.options import (
    CALL_S,
    DEFAULT_FOLDER,
    Folder,
    Name,
    asked_status,
    coordinator,
    obstacle,
    opened,
)
from accord_shared.cli_daemon import WAIT_S, Timeout, Wait, wait_ready
from accord_shared.cli_output import Json, fields, moment, show
from accord_shared.errors import BadInput, NotRunning, OutputError, RosterError

if TYPE_CHECKING:
    from accord_shared.roster import SignedRoster
    from accord_shared.service.pb import accord_pb2 as pb

sites_app = typer.Typer(help="The institutions that enrolled.", no_args_is_help=True)
roster_app = typer.Typer(
    help="The signed list of members, which `accord roster` makes elsewhere.", no_args_is_help=True
)


def status(
    wait: Wait = False, timeout: Timeout = WAIT_S, folder: Folder = DEFAULT_FOLDER, as_json: Json = False
) -> None:
    """How the coordinator stands."""
    if wait:
        wait_ready(lambda: obstacle(folder), timeout)
    found = asked_status(folder)
    facts = {
        "federation": found.federation,
        "version": found.version,
        "superlink": found.superlink,
        "roster": found.roster,
        "certificate_expires": moment(found.certificate_expires_us),
        "authority_expires": moment(found.authority_expires_us),
        "sites_online": found.sites_online,
        "runs_active": found.runs_active,
        "process_id": found.process_id,
        "warnings": list(found.warnings),
    }
    show(facts, fields(facts), as_json)


def invite(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The sites' names.")],
    out: Annotated[
        Path | None,
        typer.Option(help="A new file of mode 0600 for the token; for several sites a folder, with NAME.token in it."),
    ] = None,
    valid_days: Annotated[float, typer.Option(help="How long a token holds.")] = 7.0,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Make a token with which one site enrols, once. It is a secret: send it by a channel that you trust."""
    from accord_shared.service.pb import accord_pb2 as pb

    if not 0 < valid_days <= 90:
        raise BadInput(f"--valid-days {valid_days:g} is not between 0 and 90")
    files = _token_files(names, out)
    valid_s = max(1, round(valid_days * 86400))
    with coordinator(folder) as server:
        facts = [
            _invited(name, server.Invite(pb.InviteRequest(name=name, valid_s=valid_s), timeout=CALL_S), files.get(name))
            for name in names
        ]
    lines = [str(one.get("out") or one["token"]) for one in facts]
    show(facts[0] if len(facts) == 1 else {"invitations": facts}, lines, as_json)


def _invited(name: str, reply: pb.InviteReply, path: Path | None) -> dict[str, Any]:
    """What is told of a token; the token itself only where it does not go into a file, which is written here."""
    from accord_shared.service.keyfile import new_private

    expires = moment(reply.expires_us)
    if path is None:
        return {"name": name, "token": reply.token, "expires": expires}
    with new_private(path, f"{reply.token}\n".encode()):
        return {"name": name, "out": str(path), "expires": expires}


def _token_files(names: list[str], out: Path | None) -> dict[str, Path]:
    """Where each token goes, before one is made.

    Raises:
        OutputError: a file is there already.
        BadInput: a name comes twice, or can name no file.
    """
    from accord_shared.service.token import entity_name

    if len(set(names)) < len(names):
        raise BadInput("a name is given twice")
    if out is None:
        return {}
    try:
        files = {name: out / f"{entity_name(name)}.token" for name in names}
    except ValueError as error:
        raise BadInput(str(error)) from None
    if len(names) == 1 and not out.is_dir():
        files = {names[0]: out}
    else:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    there = [str(path) for path in files.values() if path.exists() or path.is_symlink()]
    if there:
        raise OutputError(f"{there[0]} exists already and is not overwritten")
    return files


# --- sites


@sites_app.command("list")
def list_sites(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """All sites, and how they stand."""
    found = [_site(site) for site in _listed(folder)]
    lines = [
        f"{site['name']:32} {site['state']:9} {_presence(site):9} certificate until "
        f"{site['certificate_expires'] or '-'}  {site['fingerprint']}"
        for site in found
    ]
    show({"sites": found}, lines or ["no site has enrolled"], as_json)


def _presence(site: dict[str, Any]) -> str:
    return "offline" if not site["online"] else site["says"] or "online"


@sites_app.command()
def approve(name: Name, folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Let a site take part. Compare its fingerprint with what its operator reads out."""
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(folder) as server:
        _shown(server.ApproveSite(pb.SiteName(name=name), timeout=CALL_S), as_json)


@sites_app.command()
def revoke(name: Name, folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Refuse a site from its next call on. Its keys never serve again."""
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(folder) as server:
        _shown(server.RevokeSite(pb.SiteName(name=name), timeout=CALL_S), as_json)


@sites_app.command()
def rotate(name: Name, folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Ask a site for a new key and certificate, at its next call."""
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(folder) as server:
        _shown(server.RotateSite(pb.SiteName(name=name), timeout=CALL_S), as_json)


@sites_app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files NAME.json go.")],
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Write the public entries of all sites that are not revoked, for `accord roster add`."""
    from accord_shared.files import make_folder
    from accord_shared.identity import Member

    entries = [Member.from_json(site.member) for site in _listed(folder) if site.state != "revoked"]
    make_folder(directory)
    for member in entries:
        _write_entry(directory, member.name, f"{member.to_json(indent=2)}\n".encode())
    lines = [f"{directory}: {len(entries)} entries", *(f"  {member.fingerprint}  {member.name}" for member in entries)]
    show({"out": str(directory), "names": [member.name for member in entries]}, lines, as_json)


def _write_entry(directory: Path, name: str, text: bytes) -> None:
    """A name is safe for a file (`entity_name`); what is there stays."""
    from accord_shared.files import write_atomic
    from accord_shared.service.token import entity_name

    path = directory / f"{entity_name(name)}.json"
    if path.exists() and path.read_bytes() != text:
        raise OutputError(f"{path} exists already, with other keys, and is not overwritten")
    write_atomic(path, text)


def _listed(folder: Path) -> list[pb.SiteInfo]:
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(folder) as server:
        return list(server.ListSites(pb.Empty(), timeout=CALL_S).sites)


def _site(site: pb.SiteInfo) -> dict[str, Any]:
    return {
        "name": site.name,
        "state": site.state,
        "fingerprint": site.fingerprint,
        "online": site.online,
        "paused": site.paused,
        "says": site.says,
        "enrolled": moment(site.enrolled_us),
        "seen": moment(site.seen_us),
        "certificate_expires": moment(site.certificate_expires_us),
        "skew_s": round(site.skew_s, 3),
        "version": site.version,
        "roster": site.roster,
    }


def _shown(site: pb.SiteInfo, as_json: bool) -> None:
    facts = _site(site)
    show(facts, fields(facts), as_json)


# --- roster


@roster_app.command("set")
def set_roster(
    file: Annotated[Path, typer.Argument(help="The signed roster as JSON.")],
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Offer a signed roster to the sites. Its serial must be greater than that of the one before."""
    from accord_shared.service.pb import accord_pb2 as pb

    signed = _verified(file)
    with coordinator(folder) as server:
        made = server.SetRoster(pb.RosterReply(roster=signed.to_json()), timeout=CALL_S)
    facts = {"hash": made.hash, "serial": made.serial, "members": made.members, **_endorsed(made)}
    show(facts, fields(facts), as_json)


def _endorsed(info: pb.RosterInfo) -> dict[str, Any]:
    return {"endorsements": info.endorsements, "quorum": info.quorum}


@roster_app.command("show")
def show_roster(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """The roster that the coordinator offers, and while it runs who endorses it."""
    from accord_shared.service.pb import accord_pb2 as pb

    path = opened(folder)[0].roster
    if not path.exists():
        raise BadInput("the coordinator has no roster: `accord server roster set` gives it one")
    signed = _verified(path)
    roster = signed.roster
    facts: dict[str, Any] = {
        "federation": roster.federation,
        "hash": roster.hash,
        "serial": roster.serial,
        "minimum": roster.minimum,
        "colluders": roster.colluders,
        "roster_key": signed.key.fingerprint,
    }
    with suppress(NotRunning), coordinator(folder) as server:
        facts |= _endorsed(server.SetRoster(pb.RosterReply(), timeout=CALL_S))
    members = [{"name": member.name, "fingerprint": member.fingerprint} for member in roster.members]
    lines = [*fields(facts), *(f"  {member['fingerprint']}  {member['name']}" for member in members)]
    show(facts | {"members": members}, lines, as_json)


def _verified(path: Path) -> SignedRoster:
    from accord_shared.roster import SignedRoster

    try:
        signed = SignedRoster.from_json(path.read_bytes())
        signed.verify()
    except RosterError as error:
        raise RosterError(f"{path}: {error}") from None
    return signed
