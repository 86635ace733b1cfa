"""`accord audit`: attack a simulated run and hold what it gives away against what it claims."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

audit_app = typer.Typer(
    help="Attack a simulated run: what it gives away, beside what it claims. No option weakens the privacy of a run.",
    no_args_is_help=True,
)

_Scenario = Annotated[str, typer.Argument(help="Name of a shipped scenario (`accord scenarios`) or a .toml file.")]
_Epsilon = Annotated[float | None, typer.Option(help="Privacy budget of the whole run (default: the scenario's).")]
_Noise = Annotated[str, typer.Option(help="cohort: the decoded sum is attacked; site: every site's own update.")]
_Seed = Annotated[int | None, typer.Option(help="Seed of public choices and of the attack; never of noise.")]
_Data = Annotated[Path | None, typer.Option(help="Folder or file of the data set, where the scenario needs one.")]
_Set = Annotated[list[str] | None, typer.Option("--set", help="Any key of scenario or plan: run.rounds=50.")]
_Out = Annotated[Path | None, typer.Option(help="Folder for a report: HTML, JSON and plots.")]
_Json = Annotated[bool, typer.Option("--json", help="Progress on standard error, one JSON object as the last line.")]


def register(app: typer.Typer) -> None:
    """Add `accord audit` to `accord`."""
    app.add_typer(audit_app, name="audit")


@audit_app.command()
def canaries(
    scenario: _Scenario = "bank-demo",
    epsilon: _Epsilon = None,
    noise: _Noise = "cohort",
    seed: _Seed = None,
    count: Annotated[
        int, typer.Option("--canaries", min=100, max=200_000, help="Canaries, each in the run by a fair coin.")
    ] = 20_000,
    data: _Data = None,
    sets: _Set = None,
    out: _Out = None,
    as_json: _Json = False,
) -> None:
    """Lower bound on epsilon from canaries in one run, and membership inference on them."""
    from accord_simulations.audit.canaries import audit_canaries

    table, changes = _resolved(scenario, epsilon, noise, seed, sets)
    with _attack(out, "rounds") as (folder, watch, stopping):
        found = audit_canaries(table, changes, folder, data=data, count=count, on_round=watch, stopping=stopping)
    summary = found.result.to_json()
    if out is not None:
        from accord_simulations.report import write_canaries

        summary = {"report": str(write_canaries(found.result, found.scores, found.canaries.members, out)), **summary}
    typer.echo(json.dumps(summary) if as_json else _readable_canaries(summary))


@audit_app.command()
def inversion(
    scenario: _Scenario = "bank-demo",
    epsilon: _Epsilon = None,
    noise: _Noise = "cohort",
    seed: _Seed = None,
    trials: Annotated[
        int, typer.Option(min=10, max=100_000, help="Questions to the private sum per batch size.")
    ] = 1000,
    data: _Data = None,
    sets: _Set = None,
    out: _Out = None,
    as_json: _Json = False,
) -> None:
    """Reconstruct records from a bare update, and from the private sum: the same attack on the same batches."""
    from accord_simulations.audit.inversion import audit_inversion

    table, changes = _resolved(scenario, epsilon, noise, seed, sets)
    with _attack(out, "questions") as (folder, watch, stopping):
        found = audit_inversion(table, changes, folder, data=data, trials=trials, on_trial=watch, stopping=stopping)
    summary = found.to_json()
    if out is not None:
        from accord_simulations.report import write_inversion

        summary = {"report": str(write_inversion(found, out)), **summary}
    typer.echo(json.dumps(summary) if as_json else _readable_inversion(summary))


def _resolved(
    scenario: str, epsilon: float | None, noise: str, seed: int | None, sets: list[str] | None
) -> tuple[Any, dict[str, Any]]:
    """The scenario and the changes to its plan."""
    from accord_simulations.cli import merge_changes
    from accord_simulations.scenario import split_changes

    options = {"privacy.epsilon": epsilon, "privacy.noise": noise, "run.seed": seed}
    return split_changes(scenario, merge_changes(options, sets))


@contextmanager
def _attack(out: Path | None, unit: str) -> Iterator[tuple[Path, Callable[[int, int], None], Callable[[], bool]]]:
    """A work folder that vanishes, progress on standard error, and the wish to stop."""
    import torch

    from accord_shared.files import make_folder
    from accord_simulations.cli import stop_signal

    if out is not None:
        make_folder(out)  # refused now rather than after minutes
    torch.set_num_threads(1)  # a head's steps take a millisecond: threads that wait for a core cost tenfold
    started, shown = time.monotonic(), [-1]

    def watch(done: int, of: int) -> None:
        tenth = 10 * done // of
        if tenth != shown[0]:
            shown[0] = tenth
            sys.stderr.write(f"{min(done, of)} of {of} {unit}, {time.monotonic() - started:.0f} s\n")

    with tempfile.TemporaryDirectory(prefix="accord-audit-") as folder, stop_signal() as stopping:
        yield Path(folder), watch, stopping


def _readable_canaries(summary: dict[str, Any]) -> str:
    verdict = "REFUTED: the run leaks more than it claims" if summary["refuted"] else "not refuted"
    return "\n".join(
        [
            f"{summary['scenario']}: {summary['canaries']:,} canaries in {summary['participants']} sites, "
            f"{summary['rounds']} rounds, noise {summary['noise']}",
            f"  claimed          ε = {summary['epsilon_claimed']:g} at δ = {summary['delta']:g}; {verdict}",
            f"  lower bound      ε ≥ {summary['epsilon_lower_bound']:.3f} at {summary['confidence']:.0%} confidence "
            f"({summary['correct']} of {summary['guesses']} guesses right)",
            f"  membership       AUC {summary['auc']:.3f}, {summary['tpr_at_1pct_fpr']:.1%} found at 1 % false alarms",
            f"  mechanism        {_tests(summary)}",
            f"  time             {summary['seconds']:.0f} s",
            *([f"  report           {summary['report']}"] if "report" in summary else []),
        ]
    )


def _tests(summary: dict[str, Any]) -> str:
    failed, names = summary["failed_checks"], [check["name"] for check in summary["checks"]]
    return f"BROKEN: {', '.join(failed)}" if failed else f"as promised: {', '.join(names)}"


def _readable_inversion(summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['scenario']}: the right one of {summary['candidates']:,} candidates, "
        f"ε = {summary['epsilon_claimed']:g}, noise {summary['noise']}"
    ]
    for size in summary["batch_sizes"]:
        private = summary["private"][str(size)]
        low, high = private["retrieval_interval"]
        lines.append(
            f"  batch of {size}       bare update {summary['retrieval_bare'][str(size)]:.1%}, private sum "
            f"{private['retrieval']:.2%} ({low:.2%} to {high:.2%}; {private['trials']:,} questions)"
        )
    lines.append(f"  time             {summary['seconds']:.0f} s")
    if "report" in summary:
        lines.append(f"  report           {summary['report']}")
    return "\n".join(lines)
