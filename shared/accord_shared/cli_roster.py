"""`accord roster`: identities of members and the roster that they trust. Private keys are files of mode 0600."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_shared.errors import AccordError, OutputError, PlanError, RosterError

if TYPE_CHECKING:
    from accord_shared.identity import Identity
    from accord_shared.roster import RosterDraft, RosterFile

PASSPHRASE = "ACCORD_PASSPHRASE"  # noqa: S105 - the variable's name
_WARNING = (
    "The roster key decides who belongs to the federation: keep it away from the coordinator. Whoever has it and "
    "runs the coordinator can invent members and so read single updates."
)
_SECRET = f"The environment variable {PASSPHRASE} holds its passphrase, if it has one."

roster_app = typer.Typer(help=f"Make identities and the signed list of members. {_WARNING}", no_args_is_help=True)

_File = Annotated[Path, typer.Argument(metavar="ROSTER", help="The roster as JSON.")]
_Key = Annotated[Path, typer.Option(help=f"The roster key, never on the coordinator. {_SECRET}")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def register(app: typer.Typer) -> None:
    """Add `accord roster` to `accord`."""
    app.add_typer(roster_app, name="roster")


@roster_app.command()
def identity(
    name: Annotated[str, typer.Argument(help="The member's name on the roster.")],
    out: Annotated[Path, typer.Option(help=f"The new private key, a file of mode 0600. {_SECRET}")],
    public: Annotated[Path | None, typer.Option(help="Where the public entry goes (default: standard output).")] = None,
    as_json: _Json = False,
) -> None:
    """Make a member's identity: a private key that stays, and a public entry for the roster."""
    from accord_shared.files import write_atomic
    from accord_shared.identity import Identity

    made = Identity.generate()
    member = made.public(name)
    with _new_key(out, made):
        if public is not None:
            _refuse_existing(public)
            write_atomic(public, f"{member.to_json(indent=2)}\n".encode())
        told = member.to_json() if public is None else f"{public}: {member.name}, fingerprint {member.fingerprint}"
        facts = {"name": member.name, "fingerprint": member.fingerprint, "key": str(out), "member": dict(member)}
        _told(facts | {"public": str(public) if public is not None else None}, told, as_json)


@roster_app.command(epilog=_WARNING)
def init(
    federation: Annotated[str, typer.Option(help="The federation's name.")],
    minimum: Annotated[int, typer.Option(help="Least sites whose sum may be opened (2 or more).")],
    colluders: Annotated[int, typer.Option(help="Most sites that may help the coordinator (less than the minimum).")],
    key: Annotated[Path, typer.Option(help=f"The new roster key, a file of mode 0600. {_SECRET}")],
    out: Annotated[Path, typer.Option(help="The new roster, not signed yet.")],
    as_json: _Json = False,
) -> None:
    """Make a roster key and a roster without members."""
    from accord_shared.identity import Identity
    from accord_shared.roster import RosterDraft, RosterFile, RosterKey

    given = {"federation": federation, "serial": 0, "minimum": minimum, "colluders": colluders}
    draft, made = RosterDraft.made(given), Identity.generate()
    file = RosterFile(roster=draft, key=RosterKey.made(dict(made.keys)))
    with _new_key(key, made):
        _refuse_existing(out)
        _write(out, file)
    told = f"{out}: no members yet; {key}: roster key {file.key.fingerprint}, never on the coordinator"
    _told({"roster": str(out), "key": str(key), "roster_key": file.key.fingerprint, "members": 0}, told, as_json)


@roster_app.command()
def add(
    roster: _File,
    members: Annotated[list[Path], typer.Argument(help="Public entries (`accord roster identity`).")],
    as_json: _Json = False,
) -> None:
    """Add members. A signature is removed: the roster must be signed again."""
    from accord_shared.identity import Member

    entries = [_parsed(Member, path) for path in members]
    file = _read(roster)
    _change(roster, file, file.roster.added(*entries), as_json)


@roster_app.command()
def remove(
    roster: _File, name: Annotated[str, typer.Argument(help="The member's name.")], as_json: _Json = False
) -> None:
    """Remove a member. A signature is removed: the roster must be signed again."""
    file = _read(roster)
    _change(roster, file, file.roster.without(name), as_json)


@roster_app.command(epilog=_WARNING)
def sign(roster: _File, key: _Key, as_json: _Json = False) -> None:
    """Sign the roster with the roster key."""
    from accord_shared.roster import Roster, RosterFile, RosterKey, sign_roster

    file, signer = _read(roster), read_key(key)
    if RosterKey.made(dict(signer.keys)) != file.key:
        raise RosterError(f"{key} is not the key of {roster}: it has the fingerprint {signer.keys.fingerprint}")
    signed = sign_roster(Roster.made(dict(file.roster)), signer)
    _write(roster, RosterFile(roster=file.roster, key=file.key, signature=signed.signature))
    told = f"{roster}: signed; sites pin this roster hash:\n{signed.roster.hash}"
    _told({"roster": str(roster), "roster_hash": signed.roster.hash, "serial": signed.roster.serial}, told, as_json)


@roster_app.command()
def show(
    roster: _File,
    only_hash: Annotated[bool, typer.Option("--hash", help="Print the hash of a signed roster alone.")] = False,
    as_json: _Json = False,
) -> None:
    """Verify a roster and print it. A signature that does not verify ends with exit code 2."""
    file = _read(roster)
    problem = _problem(file)
    if only_hash:
        if problem is not None:
            raise RosterError(f"{roster}: {problem}")
        typer.echo(file.roster.hash)
        return
    facts = _facts(file, problem)
    typer.echo(json.dumps(facts) if as_json else _text(facts))
    if file.signature is not None and problem is not None:
        raise RosterError(f"{roster}: {problem}")


def _problem(file: RosterFile) -> str | None:
    try:
        file.signed().verify()
    except RosterError as error:
        return str(error)
    return None


def _facts(file: RosterFile, problem: str | None) -> dict[str, Any]:
    state = "none" if file.signature is None else "valid" if problem is None else "invalid"
    roster = file.roster
    return {
        "federation": roster.federation,
        "serial": roster.serial,
        "minimum": roster.minimum,
        "colluders": roster.colluders,
        "roster_hash": roster.hash,
        "roster_key": file.key.fingerprint,
        "signature": state,
        **_thresholds(roster),
        "members": [{"name": member.name, "fingerprint": member.fingerprint} for member in roster.members],
    }


def _text(facts: dict[str, Any]) -> str:
    members = facts["members"]
    lines = [f"{key.replace('_', ' '):12} {value}" for key, value in facts.items() if key != "members"]
    lines.append(f"{'members':12} {len(members)}")
    return "\n".join([*lines, *(f"  {member['fingerprint']}  {member['name']}" for member in members)])


def _thresholds(roster: RosterDraft) -> dict[str, Any]:
    """What a cohort of all members needs at the roster's own minimum; why not, if it is refused."""
    from accord_shared.secagg.thresholds import COMPLETE_MAX, thresholds

    n = len(roster.members)
    if n > COMPLETE_MAX:
        return {"thresholds": f"of the sparse graph, from the plan: more than {COMPLETE_MAX} members"}
    try:
        found = thresholds(n, roster.minimum, roster.colluders, "malicious", own_noise=True)
        return {"t_sign": found.sign, "t_share": found.share}
    except PlanError as error:
        return {"thresholds": f"a cohort of all members is refused: {error}"}


# --- files


def _parsed(kind: Any, path: Path) -> Any:
    try:
        return kind.from_json(path.read_bytes())
    except AccordError as error:
        raise RosterError(f"{path}: {error}") from None


def _read(path: Path) -> RosterFile:
    from accord_shared.roster import RosterFile

    file: RosterFile = _parsed(RosterFile, path)
    return file


def _write(path: Path, file: RosterFile) -> None:
    from accord_shared.files import write_atomic

    write_atomic(path, f"{file.to_json(indent=2)}\n".encode())


def _told(facts: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(facts) if as_json else text)


def _change(path: Path, file: RosterFile, roster: RosterDraft, as_json: bool) -> None:
    from accord_shared.roster import RosterFile

    _write(path, RosterFile(roster=roster, key=file.key))
    gone = "the signature was removed: sign it again" if file.signature is not None else "not signed yet"
    told = f"{path}: {len(roster.members)} members, serial {roster.serial}; {gone}"
    facts = {"roster": str(path), "serial": roster.serial, "members": [member.name for member in roster.members]}
    _told(facts | {"signed": False}, told, as_json)


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} exists already and is not overwritten")


def read_key(path: Path) -> Identity:
    """An identity's private keys; see `keyfile.read_identity`."""
    from accord_shared.service.keyfile import read_identity

    return read_identity(path)


@contextmanager
def _new_key(path: Path, key: Identity) -> Iterator[None]:
    """Write a new key file of mode 0600; it goes again if the command then fails."""
    from accord_shared.service.keyfile import new_private, passphrase

    with new_private(path, key.to_pem(passphrase())):
        yield
