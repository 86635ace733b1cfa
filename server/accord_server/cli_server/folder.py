"""`accord server init|up|audit|authority|backup`: what works on the coordinator's folder itself."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_server.cli_server.options import DEFAULT_FOLDER, Folder, asked_status, obstacle, opened
from accord_shared.cli_daemon import WAIT_S, Timeout, WaitUp, start_detached, stop_daemon
from accord_shared.cli_output import Json, fields, moment, show
from accord_shared.errors import BadInput, OutputError

if TYPE_CHECKING:
    from accord_server.audit import AuditLog
    from accord_server.authority import Authority
    from accord_server.database import Database
    from accord_server.settings import CoordinatorFolder, CoordinatorSettings

audit_app = typer.Typer(help="The log of every administrative and round event.", no_args_is_help=True)
authority_app = typer.Typer(help="The authority that certifies the server and the sites.", no_args_is_help=True)


def init(
    federation: Annotated[str, typer.Option(help="The federation's name, as on its roster.")],
    host: Annotated[str, typer.Option(help="Where the daemon listens, and what sites dial.")] = "127.0.0.1",
    name: Annotated[
        list[str] | None, typer.Option(help="Further host names or addresses of the certificate; may be repeated.")
    ] = None,
    database: Annotated[str | None, typer.Option(help="An SQLAlchemy URL (default: a file in the folder).")] = None,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Make a coordinator's folder: settings, keys, certificates and the database."""
    from accord_server.settings import CoordinatorFolder, CoordinatorSettings, template

    text = template(federation, host, tuple(name or ()), database)
    settings = CoordinatorSettings.made(_table(text))
    paths = CoordinatorFolder(folder.absolute())
    with _new_folder(paths):
        facts = _filled(paths, settings, text)
    show(facts, fields(facts), as_json)


def _table(text: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise BadInput("a name or host has a character that settings cannot hold") from None


@contextmanager
def _new_folder(paths: CoordinatorFolder) -> Iterator[None]:
    """A private folder without a coordinator; what is made in it goes again if that fails."""
    import shutil

    from accord_shared.service.rpc import private_folder

    private_folder(paths.path)
    made = (paths.settings, paths.keys, paths.certificates, paths.database)
    there = [path.name for path in made if path.exists()]
    if there:
        raise OutputError(f"{paths.path} holds a coordinator already, or a part of one: {', '.join(there)}")
    try:
        yield
    except BaseException:
        for path in (paths.keys, paths.certificates):
            shutil.rmtree(path, ignore_errors=True)
        for file in paths.path.glob("state.db*"):
            file.unlink()
        raise


def _filled(paths: CoordinatorFolder, settings: CoordinatorSettings, text: str) -> dict[str, Any]:
    from accord_server.authority import Authority
    from accord_shared.files import write_atomic
    from accord_shared.identity import Identity
    from accord_shared.service.keyfile import new_private, passphrase
    from accord_shared.service.rpc import private_folder

    identity = Identity.generate()
    private_folder(paths.keys)
    with new_private(paths.identity, identity.to_pem(passphrase())):
        authority = Authority.create(paths.path, settings)
        facts = {
            "folder": str(paths.path),
            "federation": settings.federation,
            "coordinator": identity.keys.fingerprint,
            "authority": _fingerprint(authority.certificate()),
            "enrolment": settings.enrolment_address,
            "keys_encrypted": passphrase() is not None,
        }
        with _audit(paths, settings) as log:
            log.note("coordinator.created", settings.federation, coordinator=identity.keys.fingerprint)
        write_atomic(paths.settings, text.encode(), mode=0o600)  # last: without it there is no coordinator
    return facts


def up(
    folder: Folder = DEFAULT_FOLDER,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
    wait: WaitUp = False,
    timeout: Timeout = WAIT_S,
) -> None:
    """Run the coordinator until it is told to stop."""
    paths, _ = opened(folder)
    if wait:
        process_of = partial(_process, folder)
        start_detached("server", paths.path, log_level, lambda: obstacle(folder), process_of, timeout)
        return
    from accord_server import daemon

    daemon.run(paths.path, log_level)


def down(timeout: Timeout = WAIT_S, folder: Folder = DEFAULT_FOLDER) -> None:
    """Stop the coordinator: rounds come to their end. Runs go on at the next `up`."""
    stop_daemon(partial(_process, folder), timeout)


def _process(folder: Path) -> int:
    return asked_status(folder).process_id


def backup(
    file: Annotated[Path, typer.Argument(help="The new archive, tar. It holds the private keys: guard it.")],
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Write the whole folder into one consistent archive, also while the coordinator runs."""
    from accord_server.cli_server.backup import write_backup

    paths, settings = opened(folder)
    facts = write_backup(paths, settings, file)
    show(facts, fields(facts), as_json)


# --- audit


@audit_app.command()
def verify(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Check every entry against those before it. Damage ends with exit code 2.

    Keep the hash of the newest entry elsewhere: it tells whether the whole log was written anew.
    """
    with _audit(*opened(folder)) as log:
        count = log.verify()
        _, head = log.head()
    show({"sound": True, "entries": count, "head": head}, [f"sound: {count} entries, the newest is {head}"], as_json)


@audit_app.command("show")
def show_audit(
    last: Annotated[int, typer.Option(min=1, help="How many entries, the newest.")] = 50,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """The newest entries, oldest first."""
    with _audit(*opened(folder)) as log:
        entries = log.entries(last)
    facts = [
        {
            "seq": entry.seq,
            "time": moment(entry.time_us),
            "kind": entry.kind,
            "subject": entry.subject,
            "actor": entry.actor,
            "facts": entry.facts,
            "hash": entry.hash,
        }
        for entry in entries
    ]
    lines = [
        f"{one['seq']:6} {one['time']}  {one['kind']:20} {one['subject']}  by {one['actor'] or '-'}  "
        f"{json.dumps(one['facts'])}"
        for one in facts
    ]
    show({"entries": facts}, lines, as_json)


# --- authority


@authority_app.command("show")
def show_authority(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Who is trusted, until when, and which sites have a certificate of an older authority."""
    with _authority(folder) as (authority, database, _):
        _shown(authority, database, as_json)


@authority_app.command()
def rotate(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Make a new authority. Both are trusted until `retire`; sites renew their certificates by themselves."""
    with _authority(folder) as (authority, database, log):
        made = authority.rotate()
        log.note("authority.rotated", _fingerprint(made))
        _shown(authority, database, as_json)


@authority_app.command()
def retire(
    force: Annotated[bool, typer.Option("--force", help="Also if that shuts sites out.")] = False,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Trust the newest authority alone."""
    from accord_server.sites import old_certificates

    with _authority(folder) as (authority, database, log):
        late = old_certificates(database, authority)
        if late and authority.rotating and not force:
            raise BadInput(f"these sites have no certificate of the new authority yet: {', '.join(late)}")
        left = authority.retire()
        log.note("authority.retired", _fingerprint(left), shut_out=list(late))
        _shown(authority, database, as_json)


def _shown(authority: Authority, database: Database, as_json: bool) -> None:
    from cryptography import x509

    from accord_server.sites import old_certificates

    trusted = [
        {
            "fingerprint": _fingerprint(one),
            "expires": one.not_valid_after_utc.isoformat(),
            "signs": one == authority.certificate(),
        }
        for one in x509.load_pem_x509_certificates(authority.authorities())
    ]
    facts = {
        "authorities": trusted,
        "server_expires": authority.server_expiry().isoformat(),
        "sites_of_older": list(old_certificates(database, authority)),
    }
    lines = [
        f"{one['fingerprint']}  until {one['expires']}{'  signs' if one['signs'] else '  trusted'}" for one in trusted
    ]
    show(facts, [*lines, *fields({key: facts[key] for key in ("server_expires", "sites_of_older")})], as_json)


def _fingerprint(certificate: Any) -> str:
    from cryptography.hazmat.primitives.hashes import SHA256

    return str(certificate.fingerprint(SHA256()).hex())


@contextmanager
def _database(paths: CoordinatorFolder, settings: CoordinatorSettings) -> Iterator[Database]:
    from accord_server.database import Database
    from accord_server.settings import database_password
    from accord_shared.service.actor import acting, os_user

    with (
        acting(f"operator {os_user()}"),
        closing(Database(paths.database_url(settings), database_password())) as database,
    ):
        yield database


@contextmanager
def _audit(paths: CoordinatorFolder, settings: CoordinatorSettings) -> Iterator[AuditLog]:
    from accord_server.audit import AuditLog

    with _database(paths, settings) as database:
        yield AuditLog(database)


@contextmanager
def _authority(folder: Path) -> Iterator[tuple[Authority, Database, AuditLog]]:
    from accord_server.audit import AuditLog
    from accord_server.authority import Authority

    paths, settings = opened(folder)
    with _database(paths, settings) as database:
        yield Authority.load(paths.path, settings), database, AuditLog(database)
