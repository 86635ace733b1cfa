"""The coordinator's folder and the settings in it (`coordinator.toml`)."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from accord_shared.errors import PlanError, SettingsError
from accord_shared.plan import Table, first_problem, read_toml
from accord_shared.service.token import entity_name

FOLDER = "ACCORD_SERVER_FOLDER"
"""The environment variable that names the folder."""
DEFAULT_FOLDER = "accord-server"
DATABASE_PASSWORD = "ACCORD_DATABASE_PASSWORD"  # noqa: S105 - the variable's name

Port = Annotated[int, Field(ge=1, le=65535)]
Days = Annotated[int, Field(ge=1, le=36500)]
Seconds = Annotated[float, Field(gt=0, le=10**8, allow_inf_nan=False)]
_ALL_HOSTS = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


def _host(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        if not _HOST.fullmatch(value):
            raise ValueError(f"{value!r} is neither a host name nor an address") from None
    return value


def host_port(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _dialled(value: int | str) -> int | str:
    if isinstance(value, int):
        if not 0 < value < 65536:
            raise ValueError(f"{value} is no port")
        return value
    host, _, port = value.rpartition(":")
    plain = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536 or (":" in plain) != (plain != host):
        raise ValueError(f"{value[:300]!r} is neither a port nor HOST:PORT")
    return host_port(_host(plain), int(port))


Dialled = Annotated[int | str, AfterValidator(_dialled)]
"""A port, or host:port."""


class ListenSpec(Table):
    """Where the daemon listens. Nothing is reachable from outside unless `host` says so."""

    host: str = "127.0.0.1"
    fleet: Port = 9400
    api: Port = 9401
    enrolment: Port = 9402
    metrics: Port = 9403
    metrics_host: str = "127.0.0.1"

    @field_validator("host", "metrics_host")
    @classmethod
    def _hosts(cls, value: str) -> str:
        return _host(value)


class PublicSpec(Table):
    """What sites dial, where it is not what `[listen]` says, and what the certificate names."""

    host: str | None = None
    names: tuple[str, ...] = ()
    fleet: Dialled | None = None
    """A port of `host`; or HOST:PORT, where a front tells the three apart by the name that is asked for."""
    api: Dialled | None = None
    enrolment: Dialled | None = None

    @field_validator("names", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("host")
    @classmethod
    def _is_host(cls, value: str | None) -> str | None:
        return None if value is None else _host(value)

    @field_validator("names")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_host(name) for name in value)


class CertificatesSpec(Table):
    """How long certificates hold, and how long before their end the operator is warned."""

    authority_days: Days = 3650
    server_days: Days = 90
    site_days: Days = 90
    warn_days: Days = 30


class RoundsSpec(Table):
    """How long the coordinator waits for sites."""

    trip_timeout_s: Seconds = 600.0
    """For one answer of a site within a round."""
    join_timeout_s: Seconds = 86400.0
    """For enough sites, at a run's start and before each round."""
    encrypt_checkpoints: bool = False


class FlowerSpec(Table):
    """The SuperLink's own state: nodes, and the messages of a round on their way."""

    state: Literal["memory", "file"] = "memory"
    """Nothing of it outlives the coordinator in either case: nodes are admitted and runs begun anew from the
    coordinator's database at each start. In a file a trip takes more than twice as long."""


class ClockSpec(Table):
    """How far a site's clock may be off."""

    most_skew_s: Seconds = 60.0


class CoordinatorSettings(Table):
    """`coordinator.toml`."""

    version: Literal[1] = 1
    federation: str
    database: str = "sqlite:///state.db"
    """An SQLAlchemy URL; a relative SQLite path is relative to the folder."""
    listen: ListenSpec = ListenSpec()
    public: PublicSpec = PublicSpec()
    certificates: CertificatesSpec = CertificatesSpec()
    rounds: RoundsSpec = RoundsSpec()
    flower: FlowerSpec = FlowerSpec()
    clock: ClockSpec = ClockSpec()

    @field_validator("federation")
    @classmethod
    def _plain(cls, value: str) -> str:
        return entity_name(value)

    @field_validator("database")
    @classmethod
    def _known_database(cls, value: str) -> str:
        try:
            url = make_url(value)
        except (ArgumentError, ValueError):
            raise ValueError("database is not a URL such as sqlite:///state.db") from None
        if url.password is not None or any("password" in key.lower() for key in url.query):
            raise ValueError(f"database holds a password: set it in the environment variable {DATABASE_PASSWORD}")
        driver = url.drivername
        if driver not in ("sqlite", "postgresql+psycopg"):
            raise ValueError(f"database: {driver} is not supported, only sqlite:/// and postgresql+psycopg://")
        return value

    @model_validator(mode="after")
    def _sites_can_dial(self) -> Self:
        if self.public_host in _ALL_HOSTS:
            raise ValueError(f"public.host must be what sites dial (accord server init --name), not {self.public_host}")
        if len({self.fleet_address, self.api_address, self.enrolment_address}) < 3:
            raise ValueError("public: fleet, api and enrolment are dialled at one address: give each a port or a name")
        return self

    @property
    def public_host(self) -> str:
        """What sites dial."""
        return self.public.host or self.listen.host

    @property
    def names(self) -> tuple[str, ...]:
        """Host names and addresses of the server's certificate."""
        dialled = (self.fleet_address, self.api_address, self.enrolment_address)
        hosts = (address.rpartition(":")[0].strip("[]") for address in dialled)
        return tuple(dict.fromkeys((self.public_host, *hosts, *self.public.names)))

    def _address(self, public: int | str | None, listen: int) -> str:
        return public if isinstance(public, str) else host_port(self.public_host, public or listen)

    @property
    def fleet_address(self) -> str:
        """host:port of the SuperLink, as sites dial it."""
        return self._address(self.public.fleet, self.listen.fleet)

    @property
    def api_address(self) -> str:
        """host:port of `Federation`, as sites dial it."""
        return self._address(self.public.api, self.listen.api)

    @property
    def enrolment_address(self) -> str:
        """host:port of `Enrolment`, as sites dial it."""
        return self._address(self.public.enrolment, self.listen.enrolment)

    @classmethod
    def made(cls, table: dict[str, object]) -> Self:
        """Validate a nested table.

        Raises:
            SettingsError: one line that names the key.
        """
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            raise SettingsError(first_problem(error)) from None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the settings of a coordinator's folder.

        Raises:
            SettingsError: the file is missing, malformed, or has unknown keys.
        """
        path = CoordinatorFolder(folder).settings
        if not path.exists():
            raise SettingsError(f"{folder} is no coordinator's folder: `accord server init` makes one")
        try:
            return cls.made(read_toml(path))
        except PlanError as error:
            raise SettingsError(str(error)) from None
        except SettingsError as error:
            raise SettingsError(f"{path}: {error}") from None


@dataclass(frozen=True)
class CoordinatorFolder:
    """The paths of a coordinator's folder (mode 0700)."""

    path: Path

    @property
    def settings(self) -> Path:
        """coordinator.toml."""
        return self.path / "coordinator.toml"

    @property
    def keys(self) -> Path:
        """Private keys, mode 0600."""
        return self.path / "keys"

    @property
    def identity(self) -> Path:
        """Signs plans and models."""
        return self.keys / "identity.pem"

    @property
    def server_key(self) -> Path:
        """Of the server's certificate."""
        return self.keys / "server.pem"

    @property
    def authority_key(self) -> Path:
        """Of the authority that signs now, with its certificates."""
        return self.keys / "authority.pem"

    @property
    def certificates(self) -> Path:
        """Public certificates."""
        return self.path / "certificates"

    @property
    def server_certificate(self) -> Path:
        """The server's chain."""
        return self.certificates / "server.pem"

    @property
    def authority(self) -> Path:
        """The authority that signs now."""
        return self.certificates / "authority.pem"

    @property
    def authorities(self) -> Path:
        """All authorities to trust."""
        return self.certificates / "authorities.pem"

    @property
    def database(self) -> Path:
        """The default database."""
        return self.path / "state.db"

    @property
    def roster(self) -> Path:
        """The signed roster."""
        return self.path / "roster.json"

    @property
    def flower(self) -> Path:
        """The SuperLink's database and socket."""
        return self.path / "flower"

    @property
    def control(self) -> Path:
        """The operator's socket and its token."""
        return self.path / "control"

    @property
    def runs(self) -> Path:
        """A folder per run."""
        return self.path / "runs"

    def database_url(self, settings: CoordinatorSettings) -> str:
        """The database's URL with an absolute path, where it is a file."""
        url = make_url(settings.database)
        if url.drivername != "sqlite":
            return settings.database
        if not url.database or url.database == ":memory:":
            raise SettingsError("database: SQLite needs a file, such as sqlite:///state.db")
        return f"sqlite:///{(self.path / url.database).absolute()}"


def database_password() -> str | None:
    """The database's password from the environment, if it is there."""
    return os.environ.get(DATABASE_PASSWORD) or None


def template(federation: str, host: str = "127.0.0.1", names: tuple[str, ...] = (), database: str | None = None) -> str:
    """The text of a new `coordinator.toml`."""
    public = names[0] if host in _ALL_HOSTS and names else host
    others = [name for name in names if name != public]
    kept = f"database = {_quoted(database)}" if database else '# database = "sqlite:///state.db"'
    return f"""\
# The coordinator of one federation. Unknown keys are errors; what stands behind # is the default.
version = 1
federation = {_quoted(federation)}
{kept}   # or postgresql+psycopg://user@host/database; its password: {DATABASE_PASSWORD}

[listen]                            # nothing listens beyond this host unless you say so
host = {_quoted(host)}
# fleet = 9400                      # Flower's Fleet API, TLS 1.3
# api = 9401                        # for enrolled sites, with their certificates
# enrolment = 9402                  # for invited sites, with a token
# metrics = 9403
# metrics_host = "127.0.0.1"

[public]                            # what sites dial, and what the server's certificate names
host = {_quoted(public)}
names = [{", ".join(map(_quoted, others))}]
# fleet, api, enrolment: ports of a front, where they differ from those above, or "HOST:PORT" by name on one port

[certificates]
# authority_days = 3650
# server_days = 90                  # renewed by the daemon
# site_days = 90                    # renewed by the agents
# warn_days = 30

[rounds]
# trip_timeout_s = 600.0            # for one answer of a site
# join_timeout_s = 86400.0          # for enough sites
# encrypt_checkpoints = false       # needs a passphrase

[flower]
# state = "memory"                  # of Flower's own tables, which are filled anew at each start; or "file"

[clock]
# most_skew_s = 60.0
"""


def _quoted(text: str) -> str:
    """A TOML string; names hold no control characters (`entity_name`, `_host`)."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
