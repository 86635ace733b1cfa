"""`accord site`: what an operator asks of its own site. Nothing here prints a secret or a record.

Imports are inside the commands: only those that need torch wait for it.
"""

from __future__ import annotations

import typer

from accord_client.cli_site.agent import add_agent_commands
from accord_client.cli_site.enrol import enrol, roster_app
from accord_client.cli_site.ledger import ledger_app
from accord_client.cli_site.model import model_app
from accord_client.cli_site.plan import plan_app
from accord_client.cli_site.policy import policy_app

site_app = typer.Typer(help="Run and inspect one institution's site.", no_args_is_help=True)
site_app.command()(enrol)
add_agent_commands(site_app)
for _app, _name in (
    (roster_app, "roster"),
    (plan_app, "plan"),
    (policy_app, "policy"),
    (model_app, "model"),
    (ledger_app, "ledger"),
):
    site_app.add_typer(_app, name=_name)


def register(app: typer.Typer) -> None:
    """Add `accord site` to `accord`."""
    app.add_typer(site_app, name="site")
