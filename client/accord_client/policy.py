"""What a site's operator allows, `policy.toml`. Whatever it does not allow is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from accord_client.connectors import DataSpec, check_plan
from accord_client.ledger.entries import DataSet, Limits
from accord_client.settings import DataName, read_settings
from accord_shared.errors import DataError, PolicyRefused, printable
from accord_shared.plan import Noise, Plan, Table

_NOISE: dict[str, int] = {"none": 0, "cohort": 1, "participant": 1, "site": 2}
"""How little of its update a site trusts others with."""
_SECURE: dict[str, int] = {"off": 0, "semi_honest": 1, "malicious": 2}
_HOURS = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Task = Literal["classification"]


class Finding(NamedTuple):
    """One thing that a policy asks of a plan."""

    key: str
    wanted: str
    given: str
    fits: bool


class DataPolicy(Limits):
    """What a data set may cost: the limits of the ledger."""

    derived_from: DataName | None = None

    def dataset(self, name: str) -> DataSet:
        """The same, for the ledger."""
        limits = Limits.model_validate(self.model_dump(include=set(Limits.model_fields)))
        return DataSet(name=name, derived_from=self.derived_from, limits=limits)


class Policy(Table):
    """`policy.toml`: default deny, unknown keys are errors."""

    model_config = ConfigDict(validate_by_name=True)

    version: Literal[1] = 1
    approval: Literal["operator", "policy"] = "operator"
    """Who lets a plan begin that is within the policy."""
    signers: tuple[Fingerprint, ...] = ()
    """Whose plans; none named: the coordinator's that this site enrolled with."""
    tasks: tuple[Task, ...] = ()
    models: tuple[Digest, ...] = ()
    dataset: DataName | None = None
    """The data set that plans train on."""
    noise: Noise = "cohort"
    secure_aggregation: Literal["malicious", "semi_honest", "off"] = "malicious"
    minimum: int = Field(default=3, ge=1)
    colluders: int = Field(default=0, ge=0)
    most_rounds: int = Field(default=1000, ge=1)
    most_extra_attempts: int = Field(default=10, ge=0)
    hours: str | None = None
    """Local time, "HH:MM-HH:MM", over midnight too."""
    limits: dict[DataName, DataPolicy] = Field(default_factory=dict, alias="datasets")
    """The tables `[datasets.NAME]`."""

    @field_validator("signers", "tasks", "models", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hours is not None:
            begin, end = _hours(self.hours)
            if begin == end:
                raise ValueError(f"hours = {self.hours!r} allows no time")
        if self.dataset is not None and self.dataset not in self.limits:
            raise ValueError(f"dataset = {self.dataset!r} has no table [datasets.{self.dataset}] with its limits")
        for name, limits in self.limits.items():
            self._check_limits(name, limits)
        return self

    def _check_limits(self, name: str, limits: DataPolicy) -> None:
        """Where privacy is asked for, both ε have a limit: silence allows nothing."""
        if limits.derived_from is not None and limits.derived_from not in self.limits:
            raise ValueError(f"datasets.{name}.derived_from = {limits.derived_from!r} is not a data set of this policy")
        if self.noise == "none":
            return
        for key in ("epsilon", "epsilon_all_collude"):
            if getattr(limits, key) is None and getattr(limits, f"run_{key}") is None:
                raise ValueError(f"missing key: datasets.{name}.{key} (or run_{key})")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a policy.

        Raises:
            SettingsError: missing, malformed, an unknown key, or a contradiction; the file and the key are named.
        """
        return read_settings(cls, path)

    def datasets(self) -> tuple[DataSet, ...]:
        """The data sets and their limits, for the ledger."""
        return tuple(limits.dataset(name) for name, limits in self.limits.items())

    # --- plans

    def check(self, plan: Plan, signer: str, coordinator: str) -> None:
        """Compare a plan, and the fingerprint of who signed it, with what is allowed.

        The ledger compares costs on its own: what was spent before, and ε if all others collude.

        Raises:
            PolicyRefused: the first key that does not fit, what is wanted and what is given.
        """
        for found in self.findings(plan, signer, coordinator):
            if not found.fits:
                raise PolicyRefused(f"{found.key}: this site's policy asks for {found.wanted}, not {found.given}")

    def findings(self, plan: Plan, signer: str, coordinator: str) -> Iterator[Finding]:
        """Everything that is compared."""
        signers, digest = self.signers or (coordinator,), plan.model.digest
        yield Finding("signer", _one_of(one[:16] + "…" for one in signers), signer[:16] + "…", signer in signers)
        yield Finding("task.kind", _one_of(self.tasks), plan.task.kind, plan.task.kind in self.tasks)
        yield Finding("model.digest", _one_of(self.models), digest or "none", digest in self.models)
        yield from self._privacy(plan)
        mode, least = plan.secure_aggregation.mode, self.secure_aggregation
        yield Finding("secure_aggregation.mode", f'"{least}" at least', f'"{mode}"', _SECURE[mode] >= _SECURE[least])
        yield _at_least("cohort.minimum", self.minimum, plan.cohort.minimum)
        yield _at_least("cohort.colluders", self.colluders, plan.cohort.colluders)
        yield _at_most("run.rounds", self.most_rounds, plan.run.rounds)
        yield _at_most("run.max_extra_attempts", self.most_extra_attempts, plan.run.max_extra_attempts)

    def _privacy(self, plan: Plan) -> Iterator[Finding]:
        noise, given = self.noise, plan.privacy.noise
        yield Finding("privacy.noise", f'"{noise}" at least', f'"{given}"', _NOISE[given] >= _NOISE[noise])
        limits = self.limits.get(self.dataset or "")
        if limits is None:
            yield Finding("dataset", "none: no data set may be trained on", "a plan", fits=False)
            return
        epsilon = plan.privacy.epsilon
        if epsilon is None:
            return
        for key in ("run_epsilon", "epsilon"):
            most = getattr(limits, key)
            if most is not None:
                yield _at_most("privacy.epsilon", most, epsilon)
        yield _at_most("privacy.delta", limits.delta, plan.privacy.delta)

    def problem(self, plan: Plan, signer: str, coordinator: str, data: Mapping[str, DataSpec]) -> str | None:
        """Why a plan is refused by this policy and the declared data, in one line; None: it is not."""
        try:
            self.check(plan, signer, coordinator)
            check_plan(self.spec(data), plan)
        except (PolicyRefused, DataError) as error:
            return printable(str(error))
        return None

    def spec(self, data: Mapping[str, DataSpec]) -> DataSpec:
        """The data set that plans train on, of those that the settings declare.

        Raises:
            PolicyRefused: the policy names none, or one that is not declared.
        """
        spec = data.get(self.dataset or "")
        if spec is None:
            raise PolicyRefused(f"dataset: {self.dataset or 'none'} of this site's policy is not among its data")
        return spec

    # --- hours

    def check_hours(self, now: datetime) -> None:
        """Is work allowed at this local time?

        Raises:
            PolicyRefused: it is not; the hours are named.
        """
        if self.hours is None:
            return
        begin, end = _hours(self.hours)
        inside = begin <= now.time() < end if begin < end else now.time() >= begin or now.time() < end
        if not inside:
            raise PolicyRefused(f"hours: this site's policy allows {self.hours}, and it is {now:%H:%M}")


def _hours(text: str) -> tuple[time, time]:
    found = _HOURS.fullmatch(text)
    if found is None:
        raise ValueError(f'hours = {text[:40]!r} is not "HH:MM-HH:MM"')
    first, second, third, fourth = map(int, found.groups())
    return time(first, second), time(third, fourth)


def _one_of(values: Any) -> str:
    return " or ".join(values) or "none: nothing is allowed"


def _at_least(key: str, least: float, given: float) -> Finding:
    return Finding(key, f"{least:g} at least", f"{given:g}", given >= least)


def _at_most(key: str, most: float, given: float) -> Finding:
    return Finding(key, f"{most:g} at most", f"{given:g}", given <= most)


POLICY_TEMPLATE = """# What this site allows. Whatever is not allowed here is refused. Unknown keys are errors.
version = 1
approval = "operator"              # a plan's first use needs `accord site plan approve`; "policy": whatever fits below
signers = []                       # fingerprints of who may propose plans; none: the coordinator enrolled with
tasks = []                         # ["classification"]
models = []                        # digests of base models: ["sha256:…"] (`accord site check` shows those found here)
# dataset = "cases"                # the data set that plans train on: a [data.NAME] of site.toml
noise = "cohort"                   # at least: "none" < "cohort" = "participant" < "site"
secure_aggregation = "malicious"   # at least: "off" < "semi_honest" < "malicious"
minimum = 3                        # least sites whose sum is opened
colluders = 0                      # plans must hold against at least so many
most_rounds = 1000
most_extra_attempts = 10
# hours = "20:00-06:00"            # local time

# [datasets.cases]
# delta = 1e-6
# accountant = "pld"
# epsilon = 8.0                    # over all plans, against coordinator and public
# epsilon_all_collude = 40.0       # over all plans, if all other sites collude with the coordinator
# run_epsilon = 1.0                # of any one plan
# run_epsilon_all_collude = 5.0
"""
