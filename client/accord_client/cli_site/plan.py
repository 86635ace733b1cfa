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
from accord_shared.errors import AccordError, NotRunning

if TYPE_CHECKING:
    from accord_client.plans import PlanBook
    from accord_shared.plan import Plan
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
    from accord_client.plans import PlanBook
    from accord_shared.service.pb import accord_pb2 as pb

    if wait:
        book = PlanBook(opened(folder).plans)
        waiting = "no plan waits for this site's operator"
        wait_ready(lambda: "" if any(one.state == "waiting" for one in book.records()) else waiting, timeout)
    plans = _either(
        folder,
        lambda agent: list(agent.ListPlans(pb.Empty(), timeout=CALL_S).plans),
        lambda book: [record.info() for record in book.records()],
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
        lambda book: book.find(plan).info(),
    )
    parsed = Plan.from_json(found.plan)
    cost, lines = _cost(folder, parsed)
    facts = {**_facts(found), **cost, "plan": json.loads(found.plan)}
    show(facts, [*fields(_facts(found)), *lines, "", parsed.to_toml()], as_json)


@plan_app.command()
def approve(plan: Hash, folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Let this site work on a plan that is within its policy. What it costs, of what is left, is shown."""
    from accord_shared.plan import Plan
    from accord_shared.service.pb import accord_pb2 as pb

    found = _either(
        folder,
        lambda agent: agent.ApprovePlan(pb.PlanHash(hash=plan), timeout=CALL_S),
        lambda book: book.approve(plan).info(),
    )
    cost, lines = _cost(folder, Plan.from_json(found.plan))
    show({**_facts(found), **cost}, [*lines, f"plan {found.hash}: {found.state}"], as_json)


def _cost(path: Path, plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Both ε before and after the plan; why not, where that cannot be said here."""
    from accord_client.costs import plan_cost

    try:
        cost = plan_cost(opened(path), plan)
    except AccordError as error:
        return {"cost": None}, fields({"cost": f"not known: {error}"})
    shown = {"dataset": cost.dataset, "delta": cost.delta}
    each = {"epsilon": cost.epsilon, "epsilon_all_collude": cost.epsilon_all_collude}
    facts = {**shown, **{key: change.facts() for key, change in each.items()}}
    lines = fields({"data_set": f"{cost.dataset}, delta {cost.delta:g}"} | {k: c.line() for k, c in each.items()})
    return {"cost": facts}, lines


def _either(path: Path, by_agent: Callable[[Any], Any], by_book: Callable[[PlanBook], Any]) -> Any:
    """Ask the agent or, while none runs, the folder."""
    from accord_client.cli_site.agent import agent_stub
    from accord_client.plans import PlanBook

    try:
        with agent_stub(path) as agent:
            return by_agent(agent)
    except NotRunning:
        return by_book(PlanBook(opened(path).plans))


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
