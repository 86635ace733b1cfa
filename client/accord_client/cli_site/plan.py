"""`accord site plan`: plans that were offered, and the operator's yes to each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_client.cli_site.options import CALL_S, DEFAULT_FOLDER, Folder, opened
from accord_shared.cli_daemon import WAIT_S, Timeout, wait_ready
from accord_shared.cli_output import Json, fields, moment, show
from accord_shared.errors import NotRunning

if TYPE_CHECKING:
    from accord_client.gate import Gate
    from accord_shared.service.pb import accord_pb2 as pb

plan_app = typer.Typer(help="Plans that were offered: what they ask for, and whether they may begin.")
Hash = Annotated[str, typer.Argument(metavar="HASH", help="A plan hash, or at least its first 8 digits.")]


@plan_app.command("list")
def list_plans(
    wait: Annotated[bool, typer.Option("--wait", help="Return when a plan waits for this site's operator.")] = False,
    timeout: Timeout = WAIT_S,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """All plans that were ever offered, the newest last."""
    from accord_shared.service.pb import accord_pb2 as pb

    if wait:
        from accord_client.plans import PlanBook

        book = PlanBook(opened(folder).plans)
        waiting = "no plan waits for this site's operator"
        wait_ready(lambda: "" if any(one.state == "waiting" for one in book.records()) else waiting, timeout)
    plans = _either(
        folder,
        lambda agent: list(agent.ListPlans(pb.Empty(), timeout=CALL_S).plans),
        lambda gate: [record.info() for record in gate.records()],
    )
    facts = {"plans": [_facts(plan) for plan in plans]}
    lines = [f"{plan.hash[:12]}  {plan.state:8}  {_name(plan)}: {plan.detail}" for plan in plans]
    show(facts, lines or ["no plan was offered yet"], as_json)


@plan_app.command("show")
def show_plan(plan: Hash, folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """A plan, whole."""
    from accord_shared.plan import Plan
    from accord_shared.service.pb import accord_pb2 as pb

    found = _either(
        folder,
        lambda agent: agent.ShowPlan(pb.PlanHash(hash=plan), timeout=CALL_S),
        lambda gate: gate.find(plan).info(),
    )
    cost = _cost(folder, found)
    facts = {**_facts(found), "cost": cost, "plan": json.loads(found.plan)}
    show(facts, [*fields(_facts(found)), *cost_lines(cost), "", Plan.from_json(found.plan).to_toml()], as_json)


@plan_app.command()
def approve(plan: Hash, folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Let this site work on a plan that is within its policy. What it costs, of what is left, is shown."""
    from accord_shared.service.pb import accord_pb2 as pb

    found = _either(
        folder,
        lambda agent: agent.ApprovePlan(pb.PlanHash(hash=plan), timeout=CALL_S),
        lambda gate: gate.approve(plan).info(),
    )
    cost = _cost(folder, found)
    show({**_facts(found), "cost": cost}, [*cost_lines(cost), f"plan {found.hash}: {found.state}"], as_json)


def _cost(path: Path, found: pb.PlanInfo) -> dict[str, Any]:
    """What the agent says that the plan costs; without an agent this process looks itself."""
    from accord_shared.plan import Plan

    if found.cost:
        given: dict[str, Any] = json.loads(found.cost)
        return given
    from accord_client.costs import cost_facts

    return cost_facts(opened(path), Plan.from_json(found.plan))


def cost_lines(cost: dict[str, Any]) -> list[str]:
    """`3.2 → 4.6 of 8`, for both ε."""
    if "problem" in cost:
        return fields({"cost": f"not known: {cost['problem']}"})
    shown = {"data_set": f"{cost['dataset']}, delta {cost['delta']:g}"}
    return fields(shown | {key: _change(cost[key]) for key in ("epsilon", "epsilon_all_collude")})


def _change(one: dict[str, Any]) -> str:
    spent, after = ("no bound" if one[key] is None else f"{one[key]:.3g}" for key in ("spent", "after"))
    most = "(no limit)" if one["most"] is None else f"of {one['most']:g}"
    return f"{spent} → {after} {most}{'' if one['fits'] else ': more than allowed'}"


def _either(path: Path, by_agent: Callable[[Any], Any], by_gate: Callable[[Gate], Any]) -> Any:
    """Ask the agent or, while none runs, the folder."""
    from accord_client.cli_site.agent import agent_stub
    from accord_client.enrolment import Enrolment
    from accord_client.gate import Gate
    from accord_client.settings import SiteSettings

    try:
        with agent_stub(path) as agent:
            return by_agent(agent)
    except NotRunning:
        site = opened(path)
        return by_gate(Gate(site, Enrolment.read(site).coordinator.fingerprint, SiteSettings.read(site).data))


def _facts(plan: pb.PlanInfo) -> dict[str, Any]:
    return {
        "hash": plan.hash,
        "name": _name(plan),
        "state": plan.state,
        "detail": plan.detail,
        "signer": plan.signer,
        "seen": moment(plan.seen_us),
    }


def _name(plan: pb.PlanInfo) -> str:
    name: str = json.loads(plan.plan)["run"]["name"]
    return name
