"""`accord site policy`: what this site allows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_client.cli_site.options import DEFAULT_FOLDER, Folder, opened
from accord_shared.cli_output import Json, fields, show
from accord_shared.errors import PolicyRefused

if TYPE_CHECKING:
    from accord_client.policy import Policy
    from accord_client.settings import SiteSettings
    from accord_shared.plan import Plan

policy_app = typer.Typer(help="What this site allows: `policy.toml`.", no_args_is_help=True)


@policy_app.command("show")
def show_policy(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """The policy, with every default."""
    from accord_client.policy import Policy

    facts = json.loads(Policy.read(opened(folder).policy).model_dump_json(by_alias=True, exclude_none=True))
    limits = [f"datasets.{name:11} {', '.join(map(_pair, table.items()))}" for name, table in facts["datasets"].items()]
    show(facts, [*fields({k: v for k, v in facts.items() if k != "datasets"}), *limits], as_json)


def _pair(item: tuple[str, Any]) -> str:
    return f"{item[0]} = {item[1]}"


@policy_app.command()
def check(
    plan: Annotated[str | None, typer.Argument(help="A plan as TOML, or the hash of an offered one.")] = None,
    signer: Annotated[str | None, typer.Option(help="Fingerprint of who signs it (default: the coordinator).")] = None,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Check the policy itself, and compare a plan with it: exit code 2 if it is refused."""
    from accord_client.check import policy_problems
    from accord_client.enrolment import Enrolment
    from accord_client.plans import plan_named
    from accord_client.policy import Policy
    from accord_client.settings import SiteSettings

    site = opened(folder)
    policy, settings = Policy.read(site.policy), SiteSettings.read(site)
    problems = policy_problems(policy, settings)
    coordinator = Enrolment.read(site).coordinator.fingerprint if plan is not None else ""
    given = plan_named(site.plans, plan) if plan is not None else None
    found = list(policy.findings(given, signer or coordinator, coordinator)) if given is not None else []
    if given is not None and not problems and all(one.fits for one in found):
        problems += _data_problem(policy, settings, given)
    facts = {
        "problems": problems,
        "plan": given.hash if given is not None else None,
        "findings": [one._asdict() for one in found],
        "allowed": not problems and all(one.fits for one in found),
    }
    lines = [f"{'ok' if one.fits else 'refused':8} {one.key:26} {one.wanted}; given {one.given}" for one in found]
    show(facts, [*lines, *problems] or ["the policy is sound"], as_json)
    refusals = [*problems, *(f"{one.key} wants {one.wanted}, not {one.given}" for one in found if not one.fits)]
    if refusals:
        raise PolicyRefused(refusals[0])


def _data_problem(policy: Policy, settings: SiteSettings, plan: Plan) -> list[str]:
    """What of the plan does not fit the declared data."""
    from accord_client.connectors import check_plan
    from accord_shared.errors import DataError

    try:
        check_plan(policy.spec(settings.data), plan)
    except (PolicyRefused, DataError) as error:
        return [str(error)]
    return []
