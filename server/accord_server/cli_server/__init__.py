"""`accord server`: what the operator of a coordinator asks of it. Nothing here prints a secret, but a new token.

Imports are inside the commands, so that `accord` alone starts at once.
"""

from __future__ import annotations

import typer

from accord_server.cli_server.folder import audit_app, authority_app, backup, down, init, up
from accord_server.cli_server.runs import give_up, resume, run, runs, stop, watch
from accord_server.cli_server.sites import invite, roster_app, sites_app, status

server_app = typer.Typer(help="Run the coordinator of a federation.", no_args_is_help=True)
for _command in (init, up, down, status, invite, run, runs, watch, stop, resume, give_up, backup):
    server_app.command()(_command)
for _app, _name in ((sites_app, "sites"), (roster_app, "roster"), (audit_app, "audit"), (authority_app, "authority")):
    server_app.add_typer(_app, name=_name)


def register(app: typer.Typer) -> None:
    """Add `accord server` to `accord`."""
    app.add_typer(server_app, name="server")
