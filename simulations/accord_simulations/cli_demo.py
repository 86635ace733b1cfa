"""`accord demo deployment`: a coordinator and its sites as real processes, a crash, and what comes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

demo_app = typer.Typer(help="Show the real thing on this machine.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `accord demo` to `accord`."""
    app.add_typer(demo_app, name="demo")


@demo_app.callback()
def _demo() -> None:
    """Show the real thing on this machine."""


@demo_app.command()
def deployment(
    sites: Annotated[int, typer.Option(min=3, max=10, help="Sites beside the coordinator.")] = 3,
    keep: Annotated[Path | None, typer.Option(help="A new folder that keeps everything (default: removed).")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Progress on standard error, one JSON object as the last line.")
    ] = False,
) -> None:
    """Start a coordinator and sites with TLS, train privately, kill the coordinator in mid-round, and resume."""
    from accord_simulations.deployment.demo import run_demo, text

    result = run_demo(sites, keep, _progress)
    typer.echo(json.dumps(result) if as_json else text(result))


@demo_app.command()
def material(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    sites: Annotated[int, typer.Option(min=3, max=10, help="Banks.")] = 3,
) -> None:
    """Write what a rehearsal by hand needs: a plan, and each synthetic bank's records, settings and policy."""
    from accord_shared.errors import OutputError
    from accord_simulations.deployment.material import bank_demo

    if out.exists():
        raise OutputError(f"{out} exists already and is not overwritten")
    made = bank_demo(sites)
    made.write(out)
    typer.echo(f"{out}/plan.toml: plan {made.plan.hash}")
    for name in made.names:
        typer.echo(f"{out}/{name}: messages.csv ({len(made.records[name])} records), site.toml, policy.toml")


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
