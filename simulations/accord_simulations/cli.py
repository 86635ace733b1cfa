"""`accord simulate`, `sweep`, `scenarios` and `bench`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from accord_shared.errors import PlanError

_Scenario = Annotated[str, typer.Argument(help="Name of a shipped scenario (`accord scenarios`) or a .toml file.")]
_Data = Annotated[Path | None, typer.Option(help="Folder or file of the data set, where the scenario needs one.")]
_Participants = Annotated[int | None, typer.Option(help="Number of simulated banks or chains.")]
_Rounds = Annotated[int | None, typer.Option(help="Rounds of the run.")]
_Epsilon = Annotated[float | None, typer.Option(help="Privacy budget of the whole run.")]
_Noise = Annotated[str | None, typer.Option(help="none, site, cohort or participant.")]
_Depth = Annotated[str | None, typer.Option(help="head, lora or full.")]
_Partition = Annotated[str | None, typer.Option(help="iid, dirichlet:ALPHA, zipf:S or column:NAME.")]
_Dropout = Annotated[float | None, typer.Option(help="Fraction of participants that drop out each round.")]
_Seed = Annotated[int | None, typer.Option(help="Seed of public choices: partition, faults, cohorts; never of noise.")]
_Set = Annotated[list[str] | None, typer.Option("--set", help="Any key: local.learning_rate=0.5, faults.slow=0.1.")]
_Compare = Annotated[str | None, typer.Option(help="alone,nonprivate,central,central_nonprivate or all.")]
_SecAgg = Annotated[str | None, typer.Option(help="malicious, semi_honest or off.")]
_Out = Annotated[Path | None, typer.Option(help="Output folder (default: runs/SCENARIO-TIME).")]
_Ray = Annotated[str | None, typer.Option(help="Address of a running Ray cluster that shares the output folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Progress on standard error, one JSON object as the last line.")]


def register(app: typer.Typer) -> None:
    """Add the commands of the simulation harness to `accord`."""
    app.command()(simulate)
    app.command()(sweep)
    app.command()(scenarios)
    app.command()(bench)


def simulate(
    scenario: _Scenario,
    data: _Data = None,
    participants: _Participants = None,
    rounds: _Rounds = None,
    epsilon: _Epsilon = None,
    noise: _Noise = None,
    depth: _Depth = None,
    partition: _Partition = None,
    dropout: _Dropout = None,
    seed: _Seed = None,
    sets: _Set = None,
    compare: _Compare = None,
    secure_aggregation: _SecAgg = None,
    out: _Out = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in --out at the round where it stopped.")] = False,
    ray_address: _Ray = None,
    as_json: _Json = False,
) -> None:
    """Run many simulated participants: how good is the joint model at this privacy budget, what does it cost?"""
    options = {
        "population.participants": participants,
        "run.rounds": rounds,
        "privacy.epsilon": epsilon,
        "privacy.noise": noise,
        "adapter.depth": depth,
        "population.partition": partition,
        "faults.dropout": dropout,
        "run.seed": seed,
        "secure_aggregation.mode": secure_aggregation,
    }
    changes = merge_changes(options, sets)
    if resume and out is None:
        raise PlanError("--resume needs --out: the folder of the run to continue")
    from accord_simulations.compare import parse_comparisons
    from accord_simulations.run import Options
    from accord_simulations.run import simulate as run
    from accord_simulations.scenario import foresee, split_changes

    table, plan_changes = split_changes(scenario, changes)
    plan = foresee(table, plan_changes)[1]  # refused before a folder is made
    settings = Options(
        out=Path(), data=data, resume=resume, compare=parse_comparisons(compare), ray_address=ray_address
    )
    with _target(out, table.scenario.name) as target, stop_signal() as stopping, _progress(plan) as progress:
        result = run(table, plan_changes, replace(settings, out=target), progress=progress, stopping=stopping)
    summary = summarize(result, target)
    for text in summary["warnings"]:
        _say(f"warning: {text}")
    typer.echo(json.dumps(summary) if as_json else _readable(summary))


def _target(out: Path | None, name: str) -> AbstractContextManager[Path]:
    """The folder that the user gave, or a new one of our own naming."""
    from accord_simulations.output import numbered

    return numbered(Path("runs"), f"{name}-{time.strftime('%Y%m%d-%H%M%S')}") if out is None else nullcontext(out)


def _progress(plan: Any) -> Any:
    from accord_simulations.progress import Progress

    return Progress(metric=plan.evaluation.metrics[0], epsilon_target=None)


def merge_changes(options: dict[str, Any], sets: list[str] | None) -> dict[str, Any]:
    """Options that were given, and `--set key=value` pairs read as TOML values (or plain words).

    Raises:
        PlanError: a pair without `=`, or a key that an option sets to something else.
    """
    changes = {key: value for key, value in options.items() if value is not None}
    for pair in sets or []:
        key, found, text = pair.partition("=")
        if not found or not key.strip():
            raise PlanError(f"--set {pair}: expected key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):  # not TOML: a plain word
            value = text
        if key in changes and changes[key] != value:
            raise PlanError(f"--set {key} contradicts the option that sets it to {changes[key]!r}")
        changes[key.strip()] = value
    return changes


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop that the run sees; a second one ends at once."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()
        sys.stderr.write("accord: stopping after the messages in flight; once more to stop at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summarize(result: Any, target: Path) -> dict[str, Any]:
    """The JSON object of a simulation."""
    from accord_simulations.results import few_sites

    plan = result.plan
    warning = few_sites(plan["privacy"]["noise"], result.population["participants"])
    return {
        "scenario": result.scenario,
        "participants": result.population["participants"],
        "rounds": plan["run"]["rounds"],
        "depth": plan["adapter"]["depth"],
        "noise": plan["privacy"]["noise"],
        "unit": result.unit,
        "secure_aggregation": plan["secure_aggregation"]["mode"],
        "seed": result.seed,
        "metric": result.metric,
        "federated": result.metrics[result.metric],
        "metrics": result.metrics,
        "scored_on": result.population["scored_on"],
        "compare": {comparison.name: comparison.metrics[result.metric] for comparison in result.comparisons},
        "compare_metrics": {comparison.name: comparison.metrics for comparison in result.comparisons},
        "ceiling": result.population["ceiling"],
        "epsilon": result.epsilon,
        "epsilon_all_collude": result.epsilon_all_collude,
        "epsilon_unit_at_two_sites": result.epsilon_unit_at_two_sites,
        "epsilon_target": result.epsilon_target,
        "delta": result.delta,
        "noise_multiplier": result.noise_multiplier,
        "aborted_attempts": result.aborted_attempts,
        "trips_per_round": result.trips_per_round,
        "trips_per_run": result.trips_per_run,
        "released": result.rounds[-1].released,
        "upload_bytes_per_site_round": result.upload_bytes_per_site_round,
        "upload_bytes_per_site_run": result.upload_bytes_per_site_run,
        "rows": result.population.get("rows", []),
        "warnings": [warning] if warning else [],
        "seconds": round(result.seconds, 2),
        "stage_s": {name: round(value, 2) for name, value in result.stage_s.items()},
        "peak_rss_bytes": result.peak_rss_bytes,
        "plan_hash": result.plan_hash,
        "report": str(target / "report.html"),
        "model": str(target / "model"),
    }


def _readable(summary: dict[str, Any]) -> str:
    epsilon = summary["epsilon"]
    privacy = "no privacy (noise: none)" if epsilon is None else f"ε = {epsilon:.3g} at δ = {summary['delta']:g}"
    collude = summary["epsilon_all_collude"]
    lines = [f"{summary['scenario']}: {summary['participants']} participants, {summary['rounds']} rounds, {privacy}"]
    if collude is not None:
        kind = f"{summary['noise']} noise, unit {summary['unit']}"
        lines.append(f"  privacy          {kind}, ε = {collude:.3g} if all others collude")
    for rows in summary["rows"]:
        lines.append(
            f"  rows             {rows['source']}: {rows['rows']:,} in, {rows['accepted']:,} accepted, "
            f"{rows['left_out']:,} left out, {rows['empty_lines']:,} empty lines"
        )
    if (twice := summary["epsilon_unit_at_two_sites"]) is not None:
        lines.append(f"                   ε = {twice:.3g} of who is at two participants")
    lines.append(f"  joint model      {summary['metric']} {summary['federated']:.4f}")
    if summary["ceiling"] is not None:
        share = summary["federated"] / summary["ceiling"]
        lines.append(f"  attainable       {summary['ceiling']:.4f}  ({share:.1%} reached)")
    lines += [f"  {name:16} {summary['metric']} {value:.4f}" for name, value in summary["compare"].items()]
    lines += [
        f"  upload           {summary['upload_bytes_per_site_round']:,} bytes per participant and round, "
        f"{summary['upload_bytes_per_site_run']:,} in the run",
        f"  trips            {summary['trips_per_round']} a round, {summary['trips_per_run']:,} in the run",
        f"  time, memory     {summary['seconds']:.0f} s, {summary['peak_rss_bytes'] / 2**30:.2f} GiB at most",
        f"  report           {summary['report']}",
        f"  model            {summary['model']}",
    ]
    return "\n".join(lines)


def sweep(
    scenario: _Scenario,
    data: _Data = None,
    epsilon: Annotated[
        str | None, typer.Option(help="Comma-separated, e.g. 0.5,1,3,8 (none: without privacy).")
    ] = None,
    noise: Annotated[
        str | None, typer.Option(help="Comma-separated: none (once, without an epsilon), site, cohort, participant.")
    ] = None,
    participants: Annotated[str | None, typer.Option(help="Comma-separated numbers of participants.")] = None,
    rounds: Annotated[str | None, typer.Option(help="Comma-separated numbers of rounds.")] = None,
    depth: Annotated[str | None, typer.Option(help="Comma-separated depths.")] = None,
    dropout: Annotated[str | None, typer.Option(help="Comma-separated dropout fractions.")] = None,
    colluders: Annotated[
        str | None, typer.Option(help="Comma-separated numbers of colluding participants that noise allows for.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Comma-separated partitions.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per point, with seeds 0, 1, …")] = 1,
    compare: _Compare = None,
    validation: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Score on this share of the training data.")
    ] = 0.0,
    sets: _Set = None,
    out: _Out = None,
    as_json: _Json = False,
) -> None:
    """Sweep epsilon, noise modes, participants, …: the privacy-utility frontier. Plans are checked before any run."""
    from accord_simulations.compare import parse_comparisons
    from accord_simulations.sweep import Axes, one_line
    from accord_simulations.sweep import sweep as run

    axes = Axes.parse(
        {
            "epsilon": epsilon,
            "noise": noise,
            "participants": participants,
            "rounds": rounds,
            "depth": depth,
            "dropout": dropout,
            "colluders": colluders,
            "partition": partition,
        }
    )
    changes = merge_changes({"evaluation.validation_fraction": validation or None}, sets)
    with _target(out, "sweep") as target, stop_signal() as stopping:
        result = run(
            scenario,
            axes,
            changes,
            seeds=seeds,
            data=data,
            out=target,
            compare=parse_comparisons(compare),
            stopping=stopping,
        )
    if as_json:
        typer.echo(json.dumps({**result.to_json(), "report": str(target / "sweep.html")}))
        return
    for point in result.points:
        typer.echo(one_line(point))
    typer.echo(f"report {target / 'sweep.html'}")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def scenarios(as_json: _Json = False) -> None:
    """List the scenarios that come with Accord."""
    from accord_shared.plan import read_toml
    from accord_simulations.scenario import shipped

    found = {name: read_toml(path)["scenario"]["text"] for name, path in shipped().items()}
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, text in found.items():
        typer.echo(f"{name:16} {text}")


def bench(
    name: Annotated[str, typer.Argument(help="dp-step, simulation, secagg, noise or deployment.")],
    clients: Annotated[int | None, typer.Option(help="secagg, noise: sites of the cohort.")] = None,
    dim: Annotated[int | None, typer.Option(help="secagg, noise: values of an update.")] = None,
    drop: Annotated[int | None, typer.Option(help="secagg: sites that drop out before they upload.")] = None,
    bits: Annotated[int | None, typer.Option(help="secagg: bits of the modulus.")] = None,
    repeats: Annotated[int | None, typer.Option(help="dp-step, secagg, noise: how often it is measured.")] = None,
    peer: Annotated[str | None, typer.Option(help="secagg: flower or none.")] = None,
    sites: Annotated[int | None, typer.Option(help="deployment: sites beside the coordinator.")] = None,
    as_json: _Json = False,
    sets: _Set = None,
) -> None:
    """Measure Accord beside its peers in the same run. Any setting of a benchmark can be given with --set."""
    from accord_simulations.bench import run_benchmark

    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    options = {
        "clients": clients,
        "dim": dim,
        "drop": drop,
        "bits": bits,
        "repeats": repeats,
        "peer": peer,
        "sites": sites,
    }
    result = run_benchmark(name, merge_changes(options, sets), _say)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        typer.echo(f"{key:36} {value}")
