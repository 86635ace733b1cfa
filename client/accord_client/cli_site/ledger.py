"""`accord site ledger`: what was spent, proof that nothing was forgotten, and the way back from an old copy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accord_client.cli_site.options import DEFAULT_FOLDER, Folder
from accord_shared.cli_output import Json
from accord_shared.errors import BadInput

if TYPE_CHECKING:
    from accord_client.ledger.balance import Balance
    from accord_client.ledger.ledger import Ledger

ledger_app = typer.Typer(
    help="The privacy ledger: what was spent of each data set, and proof that nothing was forgotten.",
    no_args_is_help=True,
)


@ledger_app.command()
def show(
    folder: Folder = DEFAULT_FOLDER,
    delta: Annotated[float, typer.Option(help="For data sets without limits, whose delta is used otherwise.")] = 1e-5,
    as_json: Json = False,
) -> None:
    """What was spent of each data set, its limits, and the releases by plan."""
    if not 0 < delta < 1:
        raise BadInput(f"--delta {delta:g} is not between 0 and 1")
    balance = _ledger(folder).verify()
    facts = {**_head(balance), "datasets": [_dataset(balance, name, delta, folder) for name in balance.datasets()]}
    typer.echo(json.dumps(facts) if as_json else _text(facts))


@ledger_app.command()
def verify(folder: Folder = DEFAULT_FOLDER, as_json: Json = False) -> None:
    """Check every entry against the hash before it. Damage ends with exit code 2."""
    facts = {**_head(_ledger(folder).verify()), "sound": True}
    text = f"sound: {facts['entries']} entries, the newest is number {facts['seq']}, {facts['head']}"
    typer.echo(json.dumps(facts) if as_json else text)


@ledger_app.command()
def export(
    folder: Folder = DEFAULT_FOLDER,
    out: Annotated[Path | None, typer.Option(help="A file (default: standard output).")] = None,
    as_json: Json = False,
) -> None:
    """All entries, checked, one JSON object a line, oldest first."""
    from accord_shared.files import write_atomic

    lines = [json.dumps(entry, sort_keys=True, ensure_ascii=False) for entry in _ledger(folder).entries()]
    if out is None:
        typer.echo("\n".join(lines))
        return
    write_atomic(out, "".join(f"{line}\n" for line in lines).encode(), mode=0o600)
    typer.echo(json.dumps({"out": str(out), "entries": len(lines)}) if as_json else f"{out}: {len(lines)} entries")


@ledger_app.command()
def recover(
    receipt: Annotated[Path, typer.Option(help="A receipt that a witness kept: the coordinator, or a peer.")],
    identity: Annotated[Path, typer.Option(help="The site's private key, which signed the receipt.")],
    folder: Folder = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Count what an old copy of the ledger lacks, from a receipt. A ledger that is gone is made anew."""
    from accord_client.ledger.ledger import Ledger
    from accord_client.ledger.receipts import Receipt
    from accord_shared.cli_roster import read_key

    given, key = Receipt.from_json(receipt.read_bytes()), read_key(identity)
    given.verify(key.keys)  # before a folder is made
    ledger = Ledger(folder)
    imported = ledger.recover(given, key)
    facts = {**_head(ledger.verify()), "imported": imported, "receipt": given.seq}
    did = f"imported what entry {given.seq} of the receipt knew" if imported else "nothing was missing"
    typer.echo(json.dumps(facts) if as_json else f"{did}; the newest entry is number {facts['seq']}")


def _ledger(folder: Path) -> Ledger:
    from accord_client.ledger.chain import Chain
    from accord_client.ledger.ledger import Ledger

    if not Chain(folder).exists():
        raise BadInput(f"{folder} has no ledger")
    return Ledger(folder)


def _head(balance: Balance) -> dict[str, Any]:
    head = balance.head
    return {"ledger": balance.ledger, "entries": balance.entries, "seq": head.seq, "head": head.hash.hex()}


def _dataset(balance: Balance, name: str, delta: float, folder: Path) -> dict[str, Any]:
    from accord_client.ledger.entries import Limits

    declared = balance.declared.get(name)
    limits = declared.limits if declared is not None else Limits(delta=delta)
    spent, given = balance.spent(name), limits.model_dump(exclude={"delta", "accountant"}, exclude_none=True)
    return {
        "name": name,
        "derived_from": declared.derived_from if declared is not None else None,
        "shares_budget_with": sorted(balance.lineage(name) - {name}),
        "limits": given,
        "delta": limits.delta if given else delta,
        "accountant": limits.accountant,
        **_epsilons(spent, limits.delta if given else delta, limits.accountant),
        "releases_without_noise": spent.bare,
        "plans": [
            {
                "plan": plan,
                "unit": _unit(folder, plan),
                "releases": balance.plan(plan).rounds,
                "last_round": balance.plan(plan).last_round,
            }
            for plan in balance.by_plan(name)
        ],
    }


def _unit(folder: Path, plan_hash: str) -> str | None:
    """What a plan's ε protects; None where the plan that was joined is not kept beside the ledger."""
    from accord_client.store import SiteStore
    from accord_shared.errors import PlanError
    from accord_shared.plan import Plan

    try:
        kept = SiteStore(folder).plan_json(plan_hash)
        plan = Plan.from_json(kept) if kept is not None else None
    except (PlanError, OSError):
        return None
    return plan.privacy_unit if plan is not None and plan.hash == plan_hash else None


def _epsilons(spent: Any, delta: float, accountant: str) -> dict[str, float | None]:
    """Both; null where there is no bound."""
    from accord_client.ledger.limits import epsilon_of

    found = [epsilon_of(spent, delta, accountant, colluding=colluding) for colluding in (False, True)]
    public, colluding = [value if math.isfinite(value) else None for value in found]
    return {"epsilon": public, "epsilon_all_collude": colluding}


def _text(facts: dict[str, Any]) -> str:
    lines = [f"ledger {facts['ledger']}: {facts['entries']} entries, {facts['head']}"]
    for dataset in facts["datasets"]:
        limits, origin = dataset["limits"], dataset["derived_from"]
        shared = dataset["shares_budget_with"]
        lines += [
            f"data set {dataset['name']}" + (f" (derived from {origin})" if origin else ""),
            f"  delta                {dataset['delta']:g}, accountant {dataset['accountant']}",
            f"  epsilon              {_spent(dataset['epsilon'], limits.get('epsilon'))}",
            f"  if all others collude {_spent(dataset['epsilon_all_collude'], limits.get('epsilon_all_collude'))}",
            *(f"  {key.replace('_', ' ')} at most {most:g}" for key, most in limits.items() if key.startswith("run")),
            *([f"  shared with          {', '.join(shared)}"] if shared else []),
            *(
                f"  plan {plan['plan']}: {plan['releases']} releases, unit {plan['unit'] or 'not known'}"
                for plan in dataset["plans"]
            ),
        ]
        if len({plan["unit"] for plan in dataset["plans"]} - {None}) > 1:
            lines.append("  units differ: the epsilon holds for the smaller of them; of a larger one more was spent")
    return "\n".join(lines)


def _spent(value: float | None, most: float | None) -> str:
    spent = "no bound: something left without noise" if value is None else f"{value:.4g}"
    return f"{spent} (no limit)" if most is None else f"{spent} of at most {most:g}"
