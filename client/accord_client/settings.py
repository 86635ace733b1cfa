"""A site's folder and its settings, `site.toml`."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator, model_validator

from accord_client.connectors import DataSpec
from accord_shared.errors import PlanError, SettingsError
from accord_shared.plan import Table, first_problem, read_toml
from accord_shared.service.egress import Proxy, proxy_address
from accord_shared.service.keyfile import read_private
from accord_shared.service.rpc import private_folder
from accord_shared.service.token import entity_name

if TYPE_CHECKING:
    from accord_client.trainer import Runtime

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
PROXY_CREDENTIALS = "ACCORD_PROXY_CREDENTIALS"
T = TypeVar("T", bound=Table)

DataName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
"""A data set's name is also the name of a file in `quarantine/`."""
Port = Annotated[int, Field(ge=0, le=65535)]


@dataclass(frozen=True)
class SiteFolder:
    """Where a site keeps everything: mode 0700, keys 0600."""

    path: Path

    @classmethod
    def opened(cls, path: Path) -> Self:
        """The folder of a site that exists.

        Raises:
            SettingsError: it is not a site's.
            OutputError: it belongs to somebody else, or is open to others.
        """
        folder = cls(path)
        if not folder.settings.is_file():
            raise SettingsError(f"{path} is not the folder of a site: `accord site enrol` makes one")
        private_folder(path)
        return folder

    def make(self) -> None:
        """Create it, or check that it is closed to others.

        Raises:
            OutputError: it is not, or cannot be made.
        """
        for folder in (self.path, self.keys, self.plans, self.models, self.quarantine, self.cache):
            private_folder(folder)

    @property
    def settings(self) -> Path:
        """`SiteSettings` as TOML."""
        return self.path / "site.toml"

    @property
    def policy(self) -> Path:
        """`Policy` as TOML."""
        return self.path / "policy.toml"

    @property
    def keys(self) -> Path:
        """Private keys; see `Keys`."""
        return self.path / "keys"

    @property
    def certificate(self) -> Path:
        """The site's certificate, PEM."""
        return self.path / "certificate.pem"

    @property
    def authorities(self) -> Path:
        """PEM of every authority that may have signed the coordinator's certificate."""
        return self.path / "authorities.pem"

    @property
    def enrolment(self) -> Path:
        """JSON of `Enrolment`."""
        return self.path / "enrolment.json"

    @property
    def roster(self) -> Path:
        """JSON of the accepted `SignedRoster`."""
        return self.path / "roster.json"

    @property
    def plans(self) -> Path:
        """Plans that were ever offered; see `PlanBook`."""
        return self.path / "plans"

    @property
    def models(self) -> Path:
        """Finished models that were fetched."""
        return self.path / "models"

    @property
    def quarantine(self) -> Path:
        """Rows that did not fit."""
        return self.path / "quarantine"

    @property
    def cache(self) -> Path:
        """Embeddings of this site's texts."""
        return self.path / "cache"

    @property
    def control(self) -> Path:
        """The agent's socket and the token of its start."""
        return self.path / "control"

    def model(self, run: str) -> Path:
        """Where a run's model goes.

        Raises:
            SettingsError: no run has such a name.
        """
        if not _RUN.fullmatch(run):
            raise SettingsError(f"{run[:64]!r} is not the name of a run")
        return self.models / run


class DeviceSettings(Table):
    """Where training runs: it never changes a result's meaning."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of torch (None: torch's own choice)."""

    def runtime(self) -> Runtime:
        """What these settings are on this machine. Threads are set for the whole process.

        Raises:
            SettingsError: there is no GPU where one is asked for.
        """
        import torch

        from accord_client.trainer import Runtime

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        found = torch.cuda.is_available()
        if self.device == "cuda" and not found:
            raise SettingsError('device.device = "cuda", but torch finds no GPU here')
        return Runtime(device="cuda" if found and self.device != "cpu" else "cpu")


class AgentSettings(Table):
    """How the agent speaks to its coordinator."""

    poll_s: Annotated[float, Field(ge=0.01, le=60)] = 0.05
    """Shortest time between two questions for work."""
    most_poll_s: Annotated[float, Field(ge=0.1, le=600)] = 2.0
    """Longest: between runs questions become rarer."""
    metrics: Port = 0
    """Port of Prometheus metrics; 0: none."""
    metrics_host: str = Field(default="127.0.0.1", pattern=r"^[0-9A-Za-z.:_-]+$")
    most_skew_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Most that the clocks of site and coordinator may differ."""


class CoordinatorSpec(Table):
    """The way to the coordinator: one for enrolment, API and fleet. The environment's proxies apply to none of them."""

    proxy: str | None = None
    """http://HOST:PORT of a proxy that is asked to CONNECT; None: straight."""
    proxy_credentials: str | None = Field(default=None, min_length=1)
    """A file of mode 0600, relative to the site's folder, with one line USER:PASSWORD."""

    @field_validator("proxy")
    @classmethod
    def _is_proxy(cls, value: str | None) -> str | None:
        return None if value is None else f"http://{proxy_address(value)}"

    @model_validator(mode="after")
    def _credentials_need_a_proxy(self) -> Self:
        if self.proxy_credentials is not None and self.proxy is None:
            raise ValueError("proxy_credentials without a proxy")
        return self

    def way_out(self, folder: Path) -> Proxy | None:
        """The proxy, with its credentials from the file or the environment variable ACCORD_PROXY_CREDENTIALS.

        Raises:
            IdentityError: the file cannot be read, or others can read it.
            SettingsError: the credentials are not USER:PASSWORD.
        """
        if self.proxy is None:
            return None
        given, where = os.environ.get(PROXY_CREDENTIALS, ""), PROXY_CREDENTIALS
        if self.proxy_credentials is not None:
            path = folder / self.proxy_credentials
            given, where = read_private(path).decode("utf-8", "replace").strip("\r\n"), str(path)
        if given and (":" not in given or not given.isprintable()):
            raise SettingsError(f"{where} is not one line USER:PASSWORD")
        return Proxy(proxy_address(self.proxy), SecretStr(given) if given else None)


class SiteSettings(Table):
    """`site.toml`: unknown keys are errors."""

    version: Literal[1] = 1
    name: Annotated[str, AfterValidator(entity_name)]
    coordinator: CoordinatorSpec = CoordinatorSpec()
    device: DeviceSettings = DeviceSettings()
    data: dict[DataName, DataSpec] = Field(default_factory=dict)
    agent: AgentSettings = AgentSettings()

    @classmethod
    def read(cls, folder: SiteFolder) -> Self:
        """Read a folder's settings.

        Raises:
            SettingsError: missing, malformed, or an unknown key; one line that names the file and the key.
        """
        return read_settings(cls, folder.settings)


def read_settings(kind: type[T], path: Path) -> T:
    """A file of settings.

    Raises:
        SettingsError: missing, malformed, or an unknown key; one line that names the file and the key.
    """
    try:
        return kind.model_validate(read_toml(path))
    except ValidationError as error:
        raise SettingsError(f"{path}: {first_problem(error)}") from None
    except PlanError as error:
        raise SettingsError(str(error)) from None


def settings_template(name: str, way: CoordinatorSpec | None = None) -> str:
    """`site.toml` of a site that was just enrolled."""
    given = (way or CoordinatorSpec()).model_dump(exclude_none=True)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in given.items()]
    return _TEMPLATE.format(name=json.dumps(name, ensure_ascii=False), way="".join(lines) or _NO_PROXY)


_NO_PROXY = """# proxy = "http://proxy.example:3128"   # for all connections; the environment's proxies apply to none
# proxy_credentials = "proxy-credentials" # a file of mode 0600, USER:PASSWORD; or ACCORD_PROXY_CREDENTIALS
"""


_TEMPLATE = """# Settings of this site. Paths are relative to this folder. Unknown keys are errors.
version = 1
name = {name}

[coordinator]
{way}
[device]
device = "auto"               # "auto" | "cpu" | "cuda"
# threads = 4

[agent]
most_skew_s = 60.0            # of the clocks of site and coordinator
metrics = 0                   # port of Prometheus metrics on 127.0.0.1; 0: none

# The records. They never leave this machine; `policy.toml` names the data set that plans may train on.
# [data.cases]
# kind = "csv"
# path = "cases.csv"
# text = "text"
# label = "label"
"""
