"""`accord site up|status|pause|resume|check`: the agent, and how its operator speaks to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_client.cli_site.options import CALL_S, DEFAULT_FOLDER, Folder, opened
from accord_shared.cli_daemon import WAIT_S, Timeout, Wait, WaitUp, start_detached, stop_daemon, wait_ready
from accord_shared.cli_output import Json, duration, fields, moment, show
from accord_shared.errors import NotRunning, Refused

if TYPE_CHECKING:
    from accord_client.preparation import Progress
    from accord_client.settings import SiteFolder
    from accord_shared.plan import Plan
    from accord_shared.service.pb import accord_pb2 as pb

_READY = ("ready", "training", "preparing")
_Offline = Annotated[bool, typer.Option("--offline", help="Do not contact the coordinator.")]


def add_agent_commands(app: typer.Typer) -> None:
    """Add the commands to `accord site`."""
    for command in (up, down, status, pause, resume, check, prepare):
        app.command()(command)


@contextmanager
def agent_stub(path: Path) -> Iterator[Any]:
    """The agent of a folder. Errors inside are typed.

    Raises:
        NotRunning: there is none, or it does not answer.
    """
    from accord_shared.service.pb import accord_pb2_grpc
    from accord_shared.service.rpc import local_channel

    with local_channel(opened(path).control, "agent", "the agent") as channel:
        yield accord_pb2_grpc.AgentStub(channel)


def up(
    folder: Folder = DEFAULT_FOLDER,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
    wait: WaitUp = False,
    timeout: Timeout = WAIT_S,
) -> None:
    """Run the site's agent until it is told to stop. It only connects outwards."""
    path = opened(folder).path
    if wait:
        start_detached("site", path, log_level, lambda: _obstacle(folder), lambda: _asked(folder).process_id, timeout)
        return
    from accord_client import agent

    agent.run(path, log_level)


def down(timeout: Timeout = WAIT_S, folder: Folder = DEFAULT_FOLDER) -> None:
    """Stop the agent: the message that it works on is answered first."""
    stop_daemon(lambda: _asked(folder).process_id, timeout)


def _asked(folder: Path) -> pb.AgentStatus:
    from accord_shared.service.pb import accord_pb2 as pb

    with agent_stub(folder) as agent:
        status: pb.AgentStatus = agent.Status(pb.Empty(), timeout=CALL_S)
        return status


def _obstacle(folder: Path) -> str:
    """Why the agent is not ready to take part; empty: it is."""
    found = _asked(folder)
    return "" if found.state in _READY else f"{found.state}: {found.detail}"


def status(
    wait: Wait = False, timeout: Timeout = WAIT_S, folder: Folder = DEFAULT_FOLDER, as_json: Json = False
) -> None:
    """How the site stands, and what it waits for."""
    if wait:
        wait_ready(lambda: _obstacle(folder), timeout)
    try:
        facts = _facts(_asked(folder))
    except NotRunning:
        facts = _stopped(folder)
    facts["plans_waiting"] = _waiting(folder)
    show(facts, fields(facts | {key: [shown(one) for one in facts.get(key, [])] for key, shown in _LISTS}), as_json)


def pause(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Answer no further round until `resume`. What runs is finished."""
    from accord_shared.service.pb import accord_pb2 as pb

    with agent_stub(folder) as agent:
        facts = _facts(agent.Pause(pb.Empty(), timeout=CALL_S))
    show(facts, fields({key: facts[key] for key in ("state", "detail")}), as_json)


def resume(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Answer rounds again."""
    from accord_shared.service.pb import accord_pb2 as pb

    with agent_stub(folder) as agent:
        facts = _facts(agent.Resume(pb.Empty(), timeout=CALL_S))
    show(facts, fields({key: facts[key] for key in ("state", "detail")}), as_json)


def check(folder: Folder = DEFAULT_FOLDER, offline: _Offline = False, as_json: Json = False) -> None:
    """Try everything that a run needs, without a run: exit code 2 if anything fails."""
    from accord_client.check import check_site

    found = check_site(opened(folder), agent=_running(folder), offline=offline)
    failed = list(dict.fromkeys(one.name for one in found if one.state == "fail"))
    lines = [f"{one.state:4}  {one.name:14} {one.line}" for one in found]
    show({"ok": not failed, "checks": [one._asdict() for one in found]}, lines, as_json)
    if failed:
        raise Refused(f"checks that failed: {', '.join(failed)}")


def _running(path: Path) -> pb.AgentStatus | None:
    try:
        return _asked(path)
    except NotRunning:
        return None


def _facts(status: pb.AgentStatus) -> dict[str, Any]:
    return {
        "name": status.name,
        "state": status.state,
        "detail": status.detail,
        "coordinator": status.coordinator,
        "skew_s": status.skew_s,
        "certificate_expires": moment(status.certificate_expires_us),
        "roster": status.roster,
        "roster_offered": status.roster_offered,
        "warnings": list(status.warnings),
        "runs": [
            {"run": run.run, "plan_hash": run.plan_hash, "last_round": run.last_round, "releases": run.releases}
            for run in status.runs
        ],
        "preparations": [
            {
                "plan_hash": one.plan_hash,
                "state": one.state,
                "records": one.done,
                "of": one.total,
                "left_s": round(one.left_s, 1) if one.left_s >= 0 else None,
                "problem": one.problem,
            }
            for one in status.preparations
        ],
        "refusals": [
            {"plan_hash": one.plan_hash, "reason": one.reason, "time": moment(one.time_us)} for one in status.refusals
        ],
        "process_id": status.process_id,
    }


def _run(run: dict[str, Any]) -> str:
    return f"{run['run']}: round {run['last_round']}, {run['releases']} releases"


def _preparation(one: dict[str, Any]) -> str:
    left = "" if one["left_s"] is None else f", {duration(one['left_s'])} left"
    counts = f" {one['records']:,} of {one['of']:,} records{left}" if one["of"] else ""
    return f"{one['plan_hash'][:12]}: {one['state']}{counts}{': ' * bool(one['problem'])}{one['problem']}"


def _refusal(one: dict[str, Any]) -> str:
    return f"{one['plan_hash'][:12] or 'no plan'}: {one['reason']} (since {one['time']})"


_LISTS = (("runs", _run), ("preparations", _preparation), ("refusals", _refusal))


def prepare(
    plan: Annotated[
        str | None, typer.Argument(help="An offered plan's hash, or a plan as TOML (default: every approved plan).")
    ] = None,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Read and embed the records of plans ahead of their runs; the agent goes on meanwhile, and finds them done."""
    from accord_client.policy import Policy
    from accord_client.preparation import Progress
    from accord_client.preparation import prepare as make
    from accord_client.settings import SiteSettings

    site = opened(folder)
    settings, policy = SiteSettings.read(site), Policy.read(site.policy)
    runtime = settings.device.runtime()
    told: list[dict[str, Any]] = []
    for one in _plans(site, plan):
        progress = Progress(one.hash, told=_Teller())
        make(one, site, settings, policy, runtime, progress)
        told.append({"plan_hash": one.hash, "records": progress.total})
    lines = [f"{one['plan_hash'][:12]}: {one['records']:,} records are prepared" for one in told]
    show({"plans": told}, lines or ["no plan is approved"], as_json)


class _Teller:
    """Progress on standard error, at most once in so many seconds."""

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s, self._next = every_s, 0.0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every_s
            typer.echo(f"{progress.plan_hash[:12]}: {progress.line()}", err=True)


def _plans(site: SiteFolder, wanted: str | None) -> list[Plan]:
    from accord_client.plans import PlanBook, plan_named

    if wanted is not None:
        return [plan_named(site.plans, wanted)]
    return [record.parsed for record in PlanBook(site.plans).records() if record.state == "approved"]


def _waiting(path: Path) -> list[str]:
    from accord_client.plans import PlanBook

    return [record.hash for record in PlanBook(opened(path).plans).records() if record.state == "waiting"]


def _stopped(path: Path) -> dict[str, Any]:
    """From the folder alone."""
    from accord_client.enrolment import Enrolment
    from accord_client.keystore import Keys, expiry_warning
    from accord_client.rosters import RosterBook

    folder = opened(path)
    enrolment, keys = Enrolment.read(folder), Keys.load(folder)
    warning = expiry_warning(keys.expires)
    return {
        "name": enrolment.name,
        "state": "stopped",
        "detail": "the agent is not running: `accord site up` starts it",
        "coordinator": enrolment.api_address,
        "certificate_expires": keys.expires.isoformat(timespec="seconds"),
        "roster": RosterBook(folder, keys.identity, enrolment.name, enrolment.federation).hash,
        "warnings": [warning] if warning else [],
        "runs": [],
    }
