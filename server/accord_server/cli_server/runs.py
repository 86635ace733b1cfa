"""`accord server run|runs|watch|stop|resume|give-up`: what the federation trains."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_server.cli_server.options import CALL_S, DEFAULT_FOLDER, Folder, coordinator
from accord_shared.cli_output import Json, fields, moment, show
from accord_shared.errors import Aborted, AccordError, BadInput

if TYPE_CHECKING:
    from accord_shared.plan import Plan
    from accord_shared.service.pb import accord_pb2 as pb


_SHOWN = 8
"""Absent sites on one line."""
_Run = Annotated[str, typer.Argument(metavar="RUN", help="The run, as `accord server runs` shows it.")]


def run(
    plan: Annotated[Path, typer.Argument(help="A plan as TOML.")],
    initial: Annotated[
        Path | None,
        typer.Option(help="Weights to start from: little-endian float32 (default: what the installed client makes)."),
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="Somebody else's signature of the plan, as JSON (default: the coordinator's).")
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Start a run. It waits until enough sites are there."""
    from accord_shared.plan import read_plan
    from accord_shared.service.pb import accord_pb2 as pb

    made = read_plan(plan)
    request = pb.StartRunRequest(
        plan=made.to_json(),
        signature=_signature(signature, made.hash) if signature is not None else "",
        initial=_checked(initial) if initial is not None else _made(made),
    )
    with coordinator(folder) as server:
        started = server.StartRun(request, timeout=CALL_S)
        if follow:
            typer.echo(f"run {started.run}", err=True)
            _follow(server.WatchRun(pb.RunName(run=started.run)), as_json)
            return
    _shown(started, as_json)


def _signature(path: Path, plan_hash: str) -> str:
    from accord_shared.signatures import PlanSignature

    try:
        found = PlanSignature.from_json(path.read_bytes())
        found.verify(plan_hash)
    except AccordError as error:
        raise BadInput(f"{path}: {error}") from None
    return found.to_json()


def _checked(path: Path) -> bytes:
    import numpy as np

    data = path.read_bytes()
    if not data or len(data) % 4 or not np.isfinite(np.frombuffer(data, "<f4")).all():
        raise BadInput(f"{path} is not a vector of finite little-endian float32 numbers")
    return _fitting(data)


def _made(plan: Plan) -> bytes:
    from accord_shared.cli import initial_weights

    return _fitting(initial_weights(plan).astype("<f4").tobytes())


def _fitting(data: bytes) -> bytes:
    from accord_shared.service.rpc import MOST_LOCAL

    most = MOST_LOCAL - 2**23  # beside the plan
    if len(data) > most:
        raise BadInput(f"the initial weights are {len(data)} bytes, more than the {most} that a call takes")
    return data


def runs(
    last: Annotated[bool, typer.Option("--last", help="Print the name of the newest run alone.")] = False,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """All runs, the oldest first."""
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(folder) as server:
        if last:
            name = _newest(server)
            show({"run": name}, [name], as_json)
            return
        found = [_facts(info) for info in server.ListRuns(pb.Empty(), timeout=CALL_S).runs]
    show({"runs": found}, [_line(facts) for facts in found] or ["no run was started"], as_json)


def _newest(server: Any) -> str:
    """Name of the run that was started last.

    Raises:
        BadInput: there is none.
    """
    from accord_shared.service.pb import accord_pb2 as pb

    found = server.ListRuns(pb.Empty(), timeout=CALL_S).runs
    if not found:
        raise BadInput("no run was started")
    return str(found[-1].run)


def watch(
    name: Annotated[str | None, typer.Argument(metavar="RUN", help="The run (default: the newest).")] = None,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Follow a run until it ends. Exit code 3: it stands still and can be resumed."""
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(folder) as server:
        _follow(server.WatchRun(pb.RunName(run=name or _newest(server))), as_json)


def stop(name: _Run, folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Stop a run after the trip that it is in. It can be resumed."""
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(folder) as server:
        _shown(server.StopRun(pb.RunName(run=name), timeout=CALL_S), as_json)


def resume(name: _Run, folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Go on with a run at its next round."""
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(folder) as server:
        _shown(server.ResumeRun(pb.RunName(run=name), timeout=CALL_S), as_json)


def give_up(name: _Run, folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """End a stopped or aborted run for good: its alert ends, and its plan may have a new run."""
    from accord_shared.service.pb import accord_pb2 as pb

    with coordinator(folder) as server:
        _shown(server.GiveUpRun(pb.RunName(run=name), timeout=CALL_S), as_json)


def _follow(events: Iterable[pb.RunEvent], as_json: bool) -> None:
    last: pb.RunInfo | None = None
    told = ""
    for event in events:
        last = event.info
        line = _line(_facts(last))
        if line != told:
            typer.echo(line, err=as_json)
            told = line
    if last is None:
        raise Aborted("the coordinator told nothing of the run")
    if as_json:
        typer.echo(json.dumps(_facts(last)))
    if last.state != "finished":
        raise Aborted(f"run {last.run} is {last.state}: {last.detail or 'it can be resumed'}")


def _facts(info: pb.RunInfo) -> dict[str, Any]:
    return {
        "run": info.run,
        "name": info.name,
        "plan_hash": info.plan_hash,
        "state": info.state,
        "round": info.round,
        "rounds": info.rounds,
        "detail": info.detail,
        "started": moment(info.started_us),
        "changed": moment(info.changed_us),
        "metrics": json.loads(info.metrics or "{}"),
        "absent": [{"site": one.site, "why": one.why} for one in info.absent],
    }


def _line(facts: dict[str, Any]) -> str:
    metrics = " ".join(f"{key}={value}" for key, value in facts["metrics"].items())
    without = _without(facts["absent"])
    rounds = f"round {facts['round']} of {facts['rounds']}"
    words = (facts["run"], facts["state"], rounds, facts["detail"], metrics, without)
    return "  ".join(word for word in words if word)


def _without(absent: list[dict[str, str]]) -> str:
    """Who does not take part now; of many, a few and their number."""
    few = [f"{one['site']} ({one['why']})" for one in absent[:_SHOWN]]
    more = [f"{len(absent) - _SHOWN} more"] if len(absent) > _SHOWN else []
    return f"without {', '.join([*few, *more])}" if absent else ""


def _shown(info: pb.RunInfo, as_json: bool) -> None:
    facts = _facts(info)
    lines = fields(facts | {"absent": [f"{one['site']}: {one['why']}" for one in facts["absent"]]})
    show(facts, lines, as_json)
