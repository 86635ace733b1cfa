"""`accord site model`: finished models of runs that this site took part in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_client.cli_site.options import DEFAULT_FOLDER, Folder, opened
from accord_shared.cli_output import Json, fields, moment, show
from accord_shared.errors import BadInput, OutputError

if TYPE_CHECKING:
    from accord_client.coordinator import CoordinatorClient, FetchedModel
    from accord_client.settings import SiteFolder
    from accord_shared.plan import Plan

model_app = typer.Typer(help="Finished, signed models of this site's runs.", no_args_is_help=True)


@model_app.command("list")
def list_models(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Models that the coordinator has for this site."""
    site = opened(folder)
    with _client(site) as client:
        models = [
            {
                "run": model.run,
                "name": model.name,
                "plan_hash": model.plan_hash,
                "digest": model.digest,
                "finished": moment(model.finished_us),
                "fetched": (site.model(model.run) / "model.json").exists(),
            }
            for model in client.models()
        ]
    lines = [f"{one['run']}  {one['name']}  {one['finished']}{'  (fetched)' * bool(one['fetched'])}" for one in models]
    show({"models": models}, lines or ["no finished model yet"], as_json)


@model_app.command()
def get(
    run: Annotated[str | None, typer.Argument(help="The run, as `accord site model list` names it.")] = None,
    last: Annotated[bool, typer.Option("--last", help="The newest one.")] = False,
    out: Annotated[Path | None, typer.Option(help="A new folder (default: model-RUN).")] = None,
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Fetch a model, check its signature, and write it for plain transformers, peft and safetensors."""
    site = opened(folder)
    if (run is None) != last:
        raise BadInput("name a run, or use --last")
    run = run or _newest(site)
    site.model(run)  # its name is checked before it becomes a folder's
    target = out or Path(f"model-{run}")
    if target.exists():
        raise OutputError(f"{target} exists already and is not overwritten")
    with _client(site) as client:
        fetched = client.fetch_model(run)
    facts = _export(site, fetched, target)
    show(facts, fields(facts), as_json)


def _newest(site: SiteFolder) -> str:
    with _client(site) as client:
        models = client.models()
    if not models:
        raise BadInput("no finished model yet")
    return max(models, key=lambda model: model.finished_us).run


def _client(folder: SiteFolder) -> CoordinatorClient:
    from accord_client.coordinator import CoordinatorClient
    from accord_client.keystore import Keys

    return CoordinatorClient(folder, Keys.load(folder))


def _export(site: SiteFolder, fetched: FetchedModel, target: Path) -> dict[str, Any]:
    """By the site's own copy of the base model; both ε are those of this site's ledger."""
    from accord_client.export import export_model
    from accord_client.features import FeatureCache
    from accord_client.settings import SiteSettings
    from accord_client.workspace import Workspace

    runtime = SiteSettings.read(site).device.runtime()
    workspace = Workspace(fetched.plan, FeatureCache(site.cache), runtime)
    facts = {
        "run": fetched.document.run,
        "finished": fetched.document.finished,
        "rounds": fetched.document.rounds,
        "metrics": dict(fetched.document.metrics),
        "delta": fetched.plan.privacy.delta,
        **_epsilons(site, fetched.plan),
    }
    weights = fetched.weights(workspace.model.layout.dimension)
    export_model(workspace, weights, target, facts)
    return {"out": str(target), "plan_hash": fetched.plan.hash, **facts}


def _epsilons(site: SiteFolder, plan: Plan) -> dict[str, float | None]:
    """What this site spent on the plan; null where there is no bound."""
    from accord_client.ledger.entries import Spent
    from accord_client.ledger.ledger import Ledger
    from accord_client.ledger.limits import epsilon_of
    from accord_shared.dp.accounting import unit_epsilon_at_two_sites

    balance = Ledger(site.path).verify()
    parts = [balance.by_plan(name).get(plan.hash, Spent()) for name in balance.datasets()]
    spent = Spent.sum(parts)
    privacy = plan.privacy
    found = [epsilon_of(spent, privacy.delta, privacy.accountant, colluding=colluding) for colluding in (False, True)]
    found.append(unit_epsilon_at_two_sites(plan, balance.plan(plan.hash).rounds) or math.inf)
    public, colluding, twice = [value if math.isfinite(value) else None for value in found]
    return {"epsilon": public, "epsilon_all_collude": colluding, "epsilon_unit_at_two_sites": twice}
