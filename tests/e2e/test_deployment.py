"""A deployment of real processes under what operators meet: crashes, cuts, full disks, wrong clocks, restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from federation_lab import TRIP_S, Lab, small_federation

from accord_shared.service.pb import accord_pb2 as pb
from accord_simulations.deployment.processes import CALL_S

CUT, SMALL_DISK = "bank-05", "bank-04"
LONG = 30
"""Rounds in which a site is back for certain: nobody waits for it."""


@pytest.fixture(scope="module")
def federation() -> Iterator[Lab]:
    with small_federation(5, relayed=(CUT,), small_disks=(SMALL_DISK,)) as lab:
        yield lab


@pytest.fixture
def lab(federation: Lab) -> Iterator[Lab]:
    """Everybody is up and ready, whatever the test before did. Logs are shown where a test fails."""
    marks = federation.log_marks()
    try:
        federation.deployment.wait_ready()
        yield federation
    finally:
        federation.show_logs(marks)


def finished(lab: Lab, run: str) -> dict[int, list[str]]:
    """Who took part in each round of a run that came to its end."""
    info = lab.deployment.wait_finished(run)
    survivors = lab.survivors(run)
    assert sorted(survivors) == list(range(1, info.rounds + 1))
    assert all(len(sites) >= lab.material.plan.cohort.minimum for sites in survivors.values())
    return survivors


def last_round(lab: Lab, name: str, plan_hash: str) -> int:
    return next((one.last_round for one in lab.deployment.agent(name).runs if one.plan_hash == plan_hash), 0)


# --- the demonstration


@pytest.fixture
def temporary() -> Iterator[Path]:
    """For temporary folders of one demonstration alone; short, since sockets go into them."""
    with tempfile.TemporaryDirectory(prefix="ad-", dir="/tmp") as folder:
        yield Path(folder)


def start_demo(temporary: Path, *words: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("accord")), "demo", "deployment", *words]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hold_nothing_is_left(temporary: Path) -> None:
    assert not list(temporary.glob("accord-demo-*"))
    lines = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if str(temporary) in line]


def test_the_demonstration_survives_its_crash_and_leaves_nothing(temporary: Path) -> None:
    process = start_demo(temporary, "--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    result = json.loads(out.splitlines()[-1])
    assert result["seconds"] < 240
    assert result["rounds"] == 6
    assert len(result["crash"]["uploaded"]) == 2
    assert result["accuracy"] > 0.7  # one bank alone reaches about 0.65
    for ledger in result["ledgers"].values():
        assert ledger["releases"] in (6, 7)  # what was uploaded in vain was charged, and nothing else
        assert ledger["last_round"] == 6
        assert 0 < ledger["epsilon"] <= result["epsilon_target"]
        assert ledger["epsilon"] < ledger["epsilon_all_collude"]
    assert sum(ledger["releases"] for ledger in result["ledgers"].values()) >= 6 * 3 + 2
    hold_nothing_is_left(temporary)


@pytest.mark.slow
def test_an_interrupted_demonstration_leaves_nothing(temporary: Path) -> None:
    process = start_demo(temporary)
    assert process.stderr is not None
    for line in process.stderr:
        if "enrol by one-time tokens" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    hold_nothing_is_left(temporary)


# --- sites


def test_a_site_that_is_killed_drops_out_and_joins_again(lab: Lab) -> None:
    deployment, name = lab.deployment, "bank-02"
    run, plan = lab.start_run(rounds=LONG)
    deployment.wait_for_round(run, 2)
    deployment.agents[name].signal(signal.SIGSTOP)  # so that it is in mid-round for certain
    deployment.wait_for_agent("bank-01", "to train round 3", lambda _: last_round(lab, "bank-01", plan.hash) >= 3)
    deployment.agents[name].kill()
    deployment.start_agents([name])
    survivors = finished(lab, run)
    assert [number for number, sites in survivors.items() if name not in sites]
    assert name in survivors[LONG]
    lab.hold_ledgers(run, plan)


def test_a_site_that_is_killed_once_it_has_charged_never_forgets_it(lab: Lab) -> None:
    deployment, name = lab.deployment, "bank-03"
    run, plan = lab.start_run(rounds=LONG)
    deadline = time.monotonic() + 60
    while last_round(lab, name, plan.hash) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    deployment.agents[name].kill()
    charged = lab.released(name, plan)
    assert 3 in charged
    deployment.start_agents([name])
    survivors = finished(lab, run)
    assert lab.released(name, plan)[: len(charged)] == charged
    assert name in survivors[LONG]
    lab.hold_ledgers(run, plan)


@pytest.mark.parametrize("seconds", [5.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_site_comes_back_after_its_network_was_cut(lab: Lab, seconds: float) -> None:
    deployment = lab.deployment
    run, plan = lab.start_run(rounds=8 if seconds < TRIP_S else 60)
    deployment.wait_for_round(run, 2)
    for relay in lab.relays[CUT]:
        relay.cut()
    time.sleep(seconds)
    for relay in lab.relays[CUT]:
        relay.mend()
    survivors = finished(lab, run)
    assert CUT in survivors[max(survivors)]
    if seconds > 4 * TRIP_S:
        assert [number for number, sites in survivors.items() if CUT not in sites]
    lab.hold_ledgers(run, plan)


def test_a_site_with_a_full_disk_sits_out_and_comes_back(lab: Lab) -> None:
    deployment = lab.deployment
    run, plan = lab.start_run(rounds=10)
    deployment.wait_for_round(run, 2)
    with lab.full_disk(SMALL_DISK):
        deployment.wait_for_round(run, 5)
        assert deployment.agents[SMALL_DISK].running
    survivors = finished(lab, run)
    assert [number for number, sites in survivors.items() if SMALL_DISK not in sites]
    assert SMALL_DISK in survivors[10]
    lab.hold_ledgers(run, plan)


def test_a_wrong_clock_is_named_and_recovers_by_itself(lab: Lab) -> None:
    deployment, name = lab.deployment, "bank-03"
    with lab.wrong_clock(name, 600.0) as file:
        status = deployment.wait_for_agent(name, "to see its clock", lambda status: abs(status.skew_s) > 60)
        assert status.state == "waiting"
        assert "s ahead of the coordinator's" in status.detail
        assert 595 < status.skew_s < 605
        assert any(f"the clock of {name} is off by 60" in line for line in deployment.status().warnings)
        run, plan = lab.start_run(rounds=2)
        survivors = finished(lab, run)
        assert not [sites for sites in survivors.values() if name in sites]
        assert lab.released(name, plan) == []
        file.write_text("0")
        deployment.wait_ready([name])
        run, plan = lab.start_run(rounds=2)
        assert name in finished(lab, run)[2]
        lab.hold_ledgers(run, plan)


@pytest.mark.slow
def test_a_slow_site_is_waited_for(lab: Lab) -> None:
    deployment, name = lab.deployment, "bank-02"
    run, plan = lab.start_run(rounds=5)
    deployment.wait_for_round(run, 2)
    deployment.agents[name].signal(signal.SIGSTOP)
    time.sleep(TRIP_S / 3)
    deployment.agents[name].signal(signal.SIGCONT)
    assert all(len(sites) == 5 for sites in finished(lab, run).values())
    lab.hold_ledgers(run, plan)


def test_sites_leave_and_join_between_rounds(lab: Lab) -> None:
    """By the operator's pause, and by the end of the agent."""
    deployment, paused, ended = lab.deployment, "bank-01", "bank-02"
    run, plan = lab.start_run(rounds=24)
    deployment.wait_for_round(run, 2)
    with deployment.at_site(paused) as stub:
        assert stub.Pause(pb.Empty(), timeout=CALL_S).state == "paused"
    reached = deployment.run(run).round
    deployment.wait_for_round(run, reached + 2)
    with deployment.at_site(paused) as stub:
        assert stub.Resume(pb.Empty(), timeout=CALL_S).state in ("ready", "training")
    deployment.wait_for_agent(paused, "to take part", lambda _: last_round(lab, paused, plan.hash) > reached + 2)
    assert deployment.agents[ended].stop() == 0
    assert deployment.agents[ended].others() == []
    reached = deployment.run(run).round
    deployment.wait_for_round(run, reached + 2)
    deployment.start_agents([ended])
    survivors = finished(lab, run)
    for name in (paused, ended):
        assert name in survivors[1]
        assert [number for number, sites in survivors.items() if name not in sites]
        assert name in survivors[24]
    lab.hold_ledgers(run, plan)


# --- the coordinator


@pytest.mark.slow
def test_the_coordinator_is_restarted_while_nothing_runs(lab: Lab) -> None:
    deployment = lab.deployment
    assert deployment.coordinator.stop() == 0
    assert deployment.coordinator.others() == []
    deployment.start_coordinator()
    deployment.wait_for("all sites", lambda: deployment.status().sites_online == 5, deployment.coordinator)
    run, plan = lab.start_run(rounds=2)
    assert all(len(sites) == 5 for sites in finished(lab, run).values())
    lab.hold_ledgers(run, plan)


def test_sigterm_lets_the_round_come_to_its_end_and_leaves_no_orphans(lab: Lab) -> None:
    deployment = lab.deployment
    run, plan = lab.start_run(rounds=8)
    deployment.wait_for_round(run, 2)
    assert deployment.coordinator.stop(within_s=60) == 0
    assert deployment.coordinator.others() == []
    deployment.start_coordinator()
    survivors = finished(lab, run)
    assert len([sites for sites in survivors.values() if len(sites) == 5]) >= 2
    assert [facts["aborted_attempts"] for facts in lab.audit("round.finished", run)] == [0] * 8
    for name in lab.names:  # nothing was released in vain
        assert lab.released(name, plan) == [number for number, sites in survivors.items() if name in sites]


@pytest.mark.slow
def test_the_superlink_does_not_outlive_a_killed_coordinator(lab: Lab) -> None:
    deployment = lab.deployment
    run, plan = lab.start_run(rounds=6)
    deployment.wait_for_round(run, 2)
    deployment.coordinator.signal(signal.SIGKILL)
    deployment.wait_for("the SuperLink's end", lambda: not deployment.coordinator.others(), within_s=15)
    reached = lab_round(lab, run)
    deployment.start_coordinator()
    finished(lab, run)
    lab.hold_ledgers(run, plan, attempts=dict.fromkeys((reached + 1, reached + 2), 2))


def lab_round(lab: Lab, run: str) -> int:
    """How far a run came, by the audit log, while nobody serves it."""
    return max(lab.survivors(run), default=0)
