"""The `accord` command: finds the commands of the installed parts and turns typed errors into exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from accord_shared import PROTOCOL_VERSION, __version__
from accord_shared.errors import AccordError, Interrupted, MissingExtra, printable

app = typer.Typer(
    name="accord",
    help="Federated, differentially private fine-tuning across institutions that may not pool data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
plan_app = typer.Typer(help="Check and show plans: what a run is, as data.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command()
def version(as_json: JsonFlag = False) -> None:
    """Show the version of Accord and of its protocol."""
    if as_json:
        typer.echo(json.dumps({"version": __version__, "protocol": PROTOCOL_VERSION}))
    else:
        typer.echo(f"accord {__version__} (protocol {PROTOCOL_VERSION})")


@plan_app.command("check")
def plan_check(
    file: Annotated[Path, typer.Argument(help="A plan as TOML.")],
    only_hash: Annotated[bool, typer.Option("--hash", help="Print the plan's hash alone.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Validate a plan and print what follows from it."""
    from accord_shared.plan import read_plan

    plan = read_plan(file)
    if only_hash:
        typer.echo(plan.hash)
        return
    facts = _facts(plan)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        text = "not known without the extra [client]" if value is None and name in _CLIENT_FACTS else value
        if value is None and name == "epsilon_unit_at_two_sites":
            continue  # no unit can be: a row, a participant, or no privacy
        typer.echo(f"{name.replace('_', ' '):32} {text}")


@plan_app.command("show")
def plan_show(file: Annotated[Path, typer.Argument(help="A plan as TOML.")], as_json: JsonFlag = False) -> None:
    """Print a plan with every default, and its hash."""
    from accord_shared.plan import read_plan

    plan = read_plan(file)
    if as_json:
        typer.echo(json.dumps({"hash": plan.hash, "plan": json.loads(plan.to_json())}))
    else:
        typer.echo(f"# sha256:{plan.hash}\n{plan.to_toml()}", nl=False)


@plan_app.command("sign")
def plan_sign(
    file: Annotated[Path, typer.Argument(help="A plan as TOML.")],
    key: Annotated[Path, typer.Option(help="The signer's private key (`accord roster identity` makes one).")],
    out: Annotated[Path, typer.Option(help="Where the signature goes, as JSON.")],
    as_json: JsonFlag = False,
) -> None:
    """Vouch for a plan, for `accord server run --signature`: sites name in their policy whose plans they take."""
    from accord_shared.files import write_atomic
    from accord_shared.plan import read_plan
    from accord_shared.service.keyfile import read_identity
    from accord_shared.signatures import PlanSignature

    plan = read_plan(file)
    signed = PlanSignature.of(plan.hash, read_identity(key))
    write_atomic(out, f"{signed.to_json(indent=2)}\n".encode())
    facts = {"plan_hash": plan.hash, "signer": signed.key.fingerprint, "out": str(out)}
    typer.echo(json.dumps(facts) if as_json else f"{out}: plan {plan.hash}, signer {facts['signer']}")


@plan_app.command("initial")
def plan_initial(
    file: Annotated[Path, typer.Argument(help="A plan as TOML.")],
    out: Annotated[Path, typer.Option(help="Where the weights go, as raw little-endian float32.")],
    as_json: JsonFlag = False,
) -> None:
    """Compute the public weights that a run starts from, for `accord server run --initial` on a host without torch."""
    from accord_shared.files import write_atomic
    from accord_shared.plan import read_plan

    plan = read_plan(file)
    weights = initial_weights(plan)
    write_atomic(out, weights.astype("<f4").tobytes())
    facts = {"plan_hash": plan.hash, "parameters": len(weights), "out": str(out)}
    typer.echo(json.dumps(facts) if as_json else f"{out}: {len(weights)} parameters")


def initial_weights(plan: Any) -> Any:
    """The weights [P] that a plan starts from, by the installed client.

    Raises:
        MissingExtra: it is not installed.
    """
    for entry in entry_points(group="accord.initial_weights"):
        with suppress(ModuleNotFoundError):
            return entry.load()(plan)
    raise MissingExtra(
        "the initial weights need the extra [client]: where it is, `accord plan initial PLAN --out FILE` computes them"
    )


_CLIENT_FACTS = (
    "epsilon_all_collude",
    "trainable_parameters",
    "upload_bytes_per_site_round",
    "download_bytes_per_site_round",
)


def _facts(plan: Any) -> dict[str, Any]:
    """What follows from a plan; what needs the model comes from the installed client, if there is one."""
    from accord_shared.dp.accounting import noise_multiplier, plan_epsilon, unit_epsilon_at_two_sites

    facts: dict[str, Any] = {
        "plan_hash": plan.hash,
        "noise": plan.privacy.noise,
        "noise_multiplier": noise_multiplier(plan) or None,
        "releases_per_site": plan.releases,
        "steps": plan.steps,
        "epsilon_per_round": plan_epsilon(plan, 1),
        "epsilon_total": plan_epsilon(plan, plan.releases),
        "epsilon_unit_at_two_sites": unit_epsilon_at_two_sites(plan),
        "delta": plan.privacy.delta,
        **dict.fromkeys(_CLIENT_FACTS),
        **({} if plan.shared_noise else {"epsilon_all_collude": plan_epsilon(plan, plan.releases)}),
    }
    for entry in entry_points(group="accord.plan_facts"):
        with suppress(ModuleNotFoundError):  # of the extra [client]: what needs the model stays unknown
            facts |= _load(entry)(plan)
    return facts


def _load(entry: EntryPoint) -> Any:
    """What an entry point names; a part whose dependencies are not installed offers nothing."""
    try:
        return entry.load()
    except ImportError as error:
        missing = error.name or "a dependency"

        def absent(*_: Any) -> dict[str, Any]:
            if missing.startswith("accord_"):
                raise MissingExtra(f"{missing} is not installed")
            return {}

        return absent


def fail(error: BaseException) -> int:
    """Print one line on standard error; the exit code."""
    if isinstance(error, AccordError):
        _say(printable(str(error)))
        return error.exit_code
    if isinstance(error, OSError):
        _say(printable(f"{error.filename or 'system'}: {error.strerror or error}"))
        return 2
    _say("interrupted")
    return Interrupted.exit_code


def _say(text: str) -> None:
    with suppress(OSError):  # nobody is left to read it
        sys.stderr.write(f"accord: {text}\n")
        sys.stderr.flush()


def main() -> None:
    """Entry point of the `accord` command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that has no ε gets it escaped
            stream.reconfigure(errors="backslashreplace")
    stdout = sys.stdout
    sys.exit(_written(_run(), stdout))


def _run() -> int:
    """Run the command; its exit code."""
    try:
        for entry in sorted(entry_points(group="accord.commands"), key=lambda entry: entry.name):
            _load(entry)(app)
        app(standalone_mode=True)
    except (AccordError, OSError, KeyboardInterrupt) as error:
        return fail(error)
    except SystemExit as end:
        if end.code == Interrupted.exit_code:
            return fail(KeyboardInterrupt())
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _written(code: int, stdout: TextIO | None) -> int:
    """The exit code, once all that was printed has arrived: else nothing may pass for a success."""
    if stdout is None:
        return code
    reason = None if sys.stdout is stdout else "closed before all was printed"  # click replaces what is broken
    try:
        stdout.flush()
    except OSError as error:
        reason = reason or error.strerror
    if reason is None:
        return code
    with suppress(OSError, ValueError, AttributeError):  # lest the interpreter try again, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    _say(f"standard output: {reason}")
    return code if code > 1 else 2
