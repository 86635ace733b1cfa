"""Reports that open anywhere: one HTML file without any outside resource, its numbers, its plots.

This module needs the `simulation` extra (jinja2, matplotlib), so callers import it when they write
a report and not before. Equal results give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from accord_shared.files import make_folder, write_atomic
from accord_simulations.audit.canaries import CanaryAudit
from accord_simulations.audit.inversion import InversionAudit
from accord_simulations.audit.one_run import Coins, Scores
from accord_simulations.report import _audit, _figures, _numbers, _privacy, _sweep, _view
from accord_simulations.report._costs import costs
from accord_simulations.report._frontier import OVER, frontier, over
from accord_simulations.report._models import is_private
from accord_simulations.report._points import varying
from accord_simulations.report._story import story
from accord_simulations.report._theme import DARK, LIGHT, Plot, render
from accord_simulations.resources import versions
from accord_simulations.results import SimulationResult, SweepResult

__all__ = ["write_canaries", "write_inversion", "write_report", "write_sweep"]


def write_report(result: SimulationResult, directory: Path) -> Path:
    """Write `report.html`, `report.json` and a PNG of each plot into `directory`.

    Returns:
        The path of the HTML page.

    Raises:
        OutputError: the folder or a file cannot be written.
    """
    plots = _plots(result)
    page = _page("report.html", result=result, plots=plots, **_run_view(result))
    return _write(directory, "report", page, result.to_json(), plots)


def write_sweep(result: SweepResult, directory: Path) -> Path:
    """Write `sweep.html`, `sweep.json`, `frontier.png` and a PNG for each further axis into `directory`.

    Returns:
        The path of the HTML page.

    Raises:
        OutputError: the folder or a file cannot be written.
    """
    title = f"{result.metric} over epsilon, one line per setting"
    plots = {"frontier": render("frontier", partial(frontier, result), title)}
    for axis in (axis for axis in OVER if axis in varying(result.points)):
        name = f"by_{axis}"
        plots[name] = render(name, partial(over, axis, result), f"{result.metric} over {axis}")
    page = _page("sweep.html", result=result, plots=plots, **_sweep.view(result))
    return _write(directory, "sweep", page, result.to_json(), plots)


def write_canaries(result: CanaryAudit, scores: Scores, members: Coins, directory: Path) -> Path:
    """Write `audit-canaries.html`, `audit-canaries.json` and a PNG of the scores [m] into `directory`.

    Returns:
        The path of the HTML page.

    Raises:
        OutputError: the folder or a file cannot be written.
    """
    draw = partial(_audit.scores, scores, members, result.guesses)
    plots = {"audit-scores": render("audit-scores", draw, "scores of canaries in and out of the run")}
    page = _page("audit.html", plots=plots, found_versions=versions(), **_audit.canaries_view(result))
    return _write(directory, "audit-canaries", page, result.to_json(), plots)


def write_inversion(result: InversionAudit, directory: Path) -> Path:
    """Write `audit-inversion.html`, `audit-inversion.json` and a PNG of the rates into `directory`.

    Returns:
        The path of the HTML page.

    Raises:
        OutputError: the folder or a file cannot be written.
    """
    title = "how often the right candidate is named"
    plots = {"audit-retrieval": render("audit-retrieval", partial(_audit.retrieval, result), title)}
    page = _page("audit.html", plots=plots, found_versions=versions(), **_audit.inversion_view(result))
    return _write(directory, "audit-inversion", page, result.to_json(), plots)


def _plots(result: SimulationResult) -> dict[str, Plot]:
    """The plots of a run by file name; survivors only where somebody dropped out."""
    drawn = {
        "accuracy_by_round": (_figures.accuracy_by_round, f"{result.metric} by round"),
        "participants": (_figures.participants, f"{result.metric} by participant"),
        "epsilon": (_figures.epsilon, "privacy loss by round"),
        "costs": (costs, "seconds and bytes by round"),
        "comparisons": (_figures.comparisons, f"final {result.metric} of all models"),
    }
    if _view.dropped(result):
        drawn["survivors"] = (_figures.survivors, "participants that finished each round")
    return {name: render(name, partial(draw, result), title) for name, (draw, title) in drawn.items()}


def _run_view(result: SimulationResult) -> dict[str, Any]:
    """Everything that the page of a run shows beside its plots."""
    return {
        "story": story(result),
        "cards": _view.cards(result),
        "warnings": _view.warnings(result),
        "facts": _view.facts(result),
        "private": is_private(result),
        "promises": _privacy.promises(result),
        "questions": _privacy.explain(result),
        "cost_rows": _view.cost_rows(result),
        "privacy_rows": _view.privacy_rows(result),
        "metric_names": [name.replace("_", " ") for name in _view.metric_names(result)],
        "comparison_rows": _view.comparison_rows(result),
        "participant_rows": _view.participant_rows(result),
        "stage_shares": _view.stage_shares(result),
        "dropped": _view.dropped(result),
        "faults": result.population.get("faults"),
    }


def _page(template: str, **values: Any) -> bytes:
    """A rendered page with its style, its palette and its one script, all inline."""
    environment = Environment(
        loader=PackageLoader("accord_simulations", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["count"] = _numbers.count
    environment.filters["duration"] = _numbers.duration
    style, script = (_asset(environment, name) for name in ("style.css", "theme.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(
        style=style,
        script=script,
        script_hash=digest,
        light=LIGHT.css(),
        dark=DARK.css(),
        **values,
    )
    return page.encode()


def _asset(environment: Environment, name: str) -> Markup:
    """The text of a template file that is shown as it is."""
    loader = environment.loader
    text = loader.get_source(environment, name)[0] if loader else ""
    return Markup(text)  # noqa: S704 - a file of this package


def _write(directory: Path, stem: str, page: bytes, data: dict[str, Any], plots: dict[str, Plot]) -> Path:
    """All files of a report, the page last: where it exists, the rest does too."""
    make_folder(directory)
    for plot in plots.values():
        write_atomic(directory / f"{plot.name}.png", plot.png)
    text = json.dumps(_plain(data), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(directory / f"{stem}.json", text.encode() + b"\n")
    write_atomic(directory / f"{stem}.html", page)
    return directory / f"{stem}.html"


def _plain(value: Any) -> Any:
    """JSON has no NaN, infinity, tuples or paths: null, null, lists and text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
