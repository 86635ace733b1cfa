"""`accord demo deployment`: a federation from nothing to a signed model, with the coordinator killed on the way."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accord_shared.errors import Aborted
from accord_shared.files import sha256_file
from accord_shared.service.pb import accord_pb2 as pb
from accord_simulations.deployment.material import Material, bank_demo, score, site_policy, site_settings
from accord_simulations.deployment.processes import Deployment, new_root, on_each

Report = Callable[[str], None]
TIMEOUTS = {"rounds": {"trip_timeout_s": 60.0, "join_timeout_s": 120.0}}


@dataclass
class Stages:
    """Seconds by stage, told as they begin."""

    report: Report
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """A stage that begins now."""
        self.report(f"{sum(self.seconds.values()):5.1f} s  {text}")
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)


def run_demo(sites: int, keep: Path | None, report: Report) -> dict[str, Any]:
    """Run the demonstration; what came of it, as plain JSON values.

    Raises:
        Aborted: a step did not do what it should.
    """
    started = time.monotonic()
    stages = Stages(report)
    with stages.stage("prepare", f"{sites} synthetic banks write down their customers' messages"):
        material = bank_demo(sites)
    with new_root(keep, "accord-demo-") as root, Deployment(root, material.names, settings=TIMEOUTS) as deployment:
        found = _story(deployment, material, stages)
    found |= {"seconds": round(time.monotonic() - started, 1), "stage_s": stages.seconds}
    return found | ({"folder": str(keep)} if keep is not None else {})


def _story(deployment: Deployment, material: Material, stages: Stages) -> dict[str, Any]:
    plan, names = material.plan, material.names
    with stages.stage("coordinator", "the coordinator is made and started: TLS 1.3 on loopback"):
        deployment.make_coordinator()
        deployment.start_coordinator()
    with stages.stage("enrol", "the sites enrol by one-time tokens; their keys never leave them"):
        on_each(names, lambda name: enrol(deployment, material, name))
        deployment.start_agents()
    with stages.stage("roster", "a roster is signed by a key of its own; each site accepts it by its hash"):
        roster = admit(deployment, material)
    with stages.stage("plan", "the plan is submitted; each site's operator approves it"):
        path = deployment.root / "plan.toml"
        material.write_plan(path)
        run = deployment.submit(path)
        deployment.approve_plan(plan.hash)
    middle = plan.run.rounds // 2
    with stages.stage("before the crash", f"{middle} of {plan.run.rounds} rounds, each a secure sum with shared noise"):
        deployment.wait_for_round(run, middle)
    with stages.stage("crash", f"an upload of round {middle + 1} arrives, and the coordinator is killed (-9)"):
        crash = crash_in_round(deployment, run, plan.hash, middle + 1)
    with stages.stage("resume", "it is started again and goes on by itself"):
        deployment.start_coordinator()
        deployment.wait_for_round(run, crash["round"])
    with stages.stage("after the crash", "the rest of the rounds"):
        info = deployment.wait_finished(run)
    with stages.stage("models", "each site fetches the signed model and checks it"):
        on_each(names, lambda name: deployment.site(name, "model", "get", run, "--out", str(model(deployment, name))))
    with stages.stage("scoring", "the model is scored on messages that no site has"):
        accuracy = score(model(deployment, names[0]), material.test)
    return {
        **_facts(deployment, material, info),
        "roster": roster,
        "crash": {**crash, "resumed_s": stages.seconds["resume"]},
        "accuracy": round(accuracy, 4),
        "ceiling": material.ceiling,
    }


def enrol(deployment: Deployment, material: Material, name: str) -> None:
    """Invite and enrol a site, and give it records, settings and a policy."""
    deployment.enrol(name, site=site_settings(name), policy=site_policy(material.plan))
    material.write_records(name, deployment.site_folder(name))


def admit(deployment: Deployment, material: Material) -> str:
    """Approve the sites, make the roster, and let every site accept it; the roster's hash."""
    cohort = material.plan.cohort
    for name in material.names:
        deployment.server("sites", "approve", name)
    roster = deployment.make_roster(cohort.minimum, cohort.colluders)
    deployment.server("roster", "set", str(deployment.roster_file))
    on_each(material.names, lambda name: deployment.site(name, "roster", "accept", roster))
    deployment.wait_ready()
    return roster


def crash_in_round(deployment: Deployment, run: str, plan_hash: str, number: int) -> dict[str, Any]:
    """Kill the coordinator once an upload of round `number` (or of a later one) has arrived and another is due.

    The last site is halted meanwhile, as a slow one: no round can finish without it.
    """
    *others, slow = deployment.names
    deployment.agents[slow].signal(signal.SIGSTOP)
    try:
        at = max(number, deployment.run(run).round + 1)
        for name in others:
            await_upload(deployment, name, plan_hash, at)
        if deployment.run(run).round >= at:
            raise Aborted(f"round {at} was done before the coordinator could be killed in it")
        deployment.coordinator.kill()
    finally:
        deployment.agents[slow].signal(signal.SIGCONT)
    return {"round": at, "uploaded": others}


def await_upload(deployment: Deployment, name: str, plan_hash: str, number: int) -> None:
    """Wait until a site has charged and sent its update of a round: it charges first, and is ready once it has sent."""

    def sent(status: pb.AgentStatus) -> bool:
        reached = next((one.last_round for one in status.runs if one.plan_hash == plan_hash), 0)
        return reached >= number and status.state == "ready"

    deployment.wait_for_agent(name, f"to send round {number}", sent)


def model(deployment: Deployment, name: str) -> Path:
    """Where a site exports its copy of the model."""
    return deployment.root / "models" / name


def ledgers(deployment: Deployment) -> dict[str, dict[str, Any]]:
    """Releases and both ε of each site, from its own ledger."""
    found: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def read(name: str) -> None:
        (dataset,) = deployment.site(name, "ledger", "show")["datasets"]
        with lock:
            found[name] = {
                "releases": sum(plan["releases"] for plan in dataset["plans"]),
                "last_round": max(plan["last_round"] for plan in dataset["plans"]),
                "epsilon": dataset["epsilon"],
                "epsilon_all_collude": dataset["epsilon_all_collude"],
            }

    on_each(deployment.names, read)
    return {name: found[name] for name in deployment.names}


def _facts(deployment: Deployment, material: Material, info: pb.RunInfo) -> dict[str, Any]:
    """What is true in the end.

    Raises:
        Aborted: a site spent more than it was promised, or sites have different models.
    """
    plan, spent = material.plan, ledgers(deployment)
    for name, ledger in spent.items():
        if plan.privacy.epsilon is not None and not ledger["epsilon"] <= plan.privacy.epsilon:
            raise Aborted(f"{name} spent epsilon {ledger['epsilon']:.3g}, more than {plan.privacy.epsilon:g}")
    digests = {sha256_file(model(deployment, name) / "head.safetensors") for name in material.names}
    if len(digests) != 1:
        raise Aborted("the sites' models differ")
    return {
        "sites": len(material.names),
        "run": info.run,
        "plan_hash": plan.hash,
        "rounds": info.round,
        "noise": plan.privacy.noise,
        "secure_aggregation": plan.secure_aggregation.mode,
        "colluders": plan.cohort.colluders,
        "epsilon_target": plan.privacy.epsilon,
        "delta": plan.privacy.delta,
        "most_releases": plan.releases,
        "ledgers": spent,
        "model_digest": digests.pop(),
        "audit_entries": deployment.server("audit", "verify")["entries"],
    }


def text(result: dict[str, Any]) -> str:
    """The summary as lines."""
    crash = result["crash"]
    lines = [
        f"{result['sites']} sites, {result['rounds']} rounds, {result['noise']} noise, secure aggregation "
        f"{result['secure_aggregation']}, {result['colluders']} may collude with the coordinator",
        f"  killed in round    {crash['round']}, after uploads of {', '.join(crash['uploaded'])}",
        f"  resumed            by itself; the round was done {crash['resumed_s']:.1f} s after the start",
        "",
        f"  {'site':12} {'releases':>8} {'epsilon':>9} {'if all others collude':>22}",
    ]
    for name, spent in result["ledgers"].items():
        both = f"{spent['epsilon']:9.3f} {spent['epsilon_all_collude']:22.3f}"
        lines.append(f"  {name:12} {spent['releases']:8} {both}")
    lines += [
        "",
        f"  promised           epsilon {result['epsilon_target']:g} at delta {result['delta']:g}, "
        f"at most {result['most_releases']} releases",
        f"  joint model        accuracy {result['accuracy']:.4f} of {result['ceiling']:g} that can be had, "
        "the same at every site",
        f"  audit log          sound, {result['audit_entries']} entries",
        f"  time               {result['seconds']:.0f} s",
    ]
    return "\n".join(lines)
