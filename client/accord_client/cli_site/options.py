"""What all commands of `accord site` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from accord_client.settings import SiteFolder

DEFAULT_FOLDER = Path("accord-site")
CALL_S = 30.0
"""For an answer of the agent."""
Folder = Annotated[Path, typer.Option("--folder", envvar="ACCORD_SITE_FOLDER", help="The site's folder.")]


def opened(path: Path) -> SiteFolder:
    """The site's folder; see `SiteFolder.opened`."""
    from accord_client.settings import SiteFolder

    return SiteFolder.opened(path)
