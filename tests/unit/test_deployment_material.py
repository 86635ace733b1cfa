"""What the demonstration runs on, and how its processes are held."""

from __future__ import annotations

import csv
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from accord_client.policy import Policy
from accord_client.settings import SiteSettings
from accord_shared.dp.accounting import plan_epsilon
from accord_shared.errors import Aborted, OutputError, PlanError, PolicyRefused
from accord_shared.plan import read_plan
from accord_shared.secagg.thresholds import thresholds
from accord_simulations.bench import run_benchmark
from accord_simulations.deployment.material import bank_demo, site_policy, site_settings
from accord_simulations.deployment.processes import Process, free_ports, new_root

SOMEBODY = "a" * 64


@pytest.mark.parametrize(("sites", "spare"), [(3, 0), (5, 1)])
def test_the_plan_holds_for_so_few_sites(sites: int, spare: int, tmp_path: Path) -> None:
    made = bank_demo(sites)
    plan = made.plan
    assert made.names == tuple(f"bank-{number:02d}" for number in range(1, sites + 1))
    assert (plan.cohort.size, plan.cohort.minimum, plan.cohort.colluders) == (sites, sites - spare, 1)
    assert thresholds(sites, plan.cohort.minimum, 1, "malicious").sign == sites - spare
    assert plan.privacy.noise == "cohort"
    assert plan.noise_sharers == sites - 1
    assert plan_epsilon(plan, plan.releases) <= 3.0
    assert plan.releases == plan.run.rounds + 2  # a crash costs a release
    made.write_plan(tmp_path / "plan.toml")
    assert read_plan(tmp_path / "plan.toml").hash == plan.hash


def test_a_site_reads_the_records_that_were_written(tmp_path: Path) -> None:
    made = bank_demo(3, records=20, test_records=10)
    made.write_records("bank-02", tmp_path)
    with (tmp_path / "messages.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == list(made.records["bank-02"].texts)
    assert [made.plan.task.labels.index(row["label"]) for row in rows] == made.records["bank-02"].labels.tolist()
    settings = SiteSettings.model_validate(tomllib.loads(site_settings("bank-02")))
    assert settings.data["messages"].columns == ("text", "label")


def test_the_policy_allows_the_plan_and_nothing_that_protects_less() -> None:
    plan = bank_demo(5, records=20, test_records=10).plan
    policy = Policy.model_validate(tomllib.loads(site_policy(plan)))
    policy.check(plan, SOMEBODY, SOMEBODY)
    for changes in (
        {"privacy.epsilon": 3.1},
        {"secure_aggregation.mode": "semi_honest"},
        {"cohort.colluders": 0},
        {"run.rounds": 7},
        {"run.max_extra_attempts": 3},
        {"model.digest": "sha256:" + "0" * 64},
    ):
        with pytest.raises(PolicyRefused, match=next(iter(changes))):
            policy.check(plan.revised(changes), SOMEBODY, SOMEBODY)


# --- processes


def process(tmp_path: Path, program: str) -> Process:
    return Process("it", [sys.executable, "-c", program], dict(os.environ), tmp_path / "it.log")


def wait_for_line(made: Process, line: str) -> None:
    deadline = time.monotonic() + 20
    while made.last_line() != line:
        assert time.monotonic() < deadline
        time.sleep(0.02)


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
print("up", flush=True)
time.sleep(600)
"""


def test_what_a_process_started_is_found_and_killed_with_it(tmp_path: Path) -> None:
    made = process(tmp_path, PARENT)
    made.start()
    wait_for_line(made, "up")
    (child,) = made.others()
    made.kill()
    assert not made.running
    made.clear()
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_orphans_are_seen_after_a_stop_and_ended_by_clear(tmp_path: Path) -> None:
    made = process(tmp_path, PARENT)
    made.start()
    wait_for_line(made, "up")
    assert made.stop() == -signal.SIGTERM
    (child,) = made.others()
    made.clear()
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_does_not_stop_is_said(tmp_path: Path) -> None:
    made = process(
        tmp_path, "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    )
    made.start()
    wait_for_line(made, "up")
    with pytest.raises(Aborted, match="did not stop"):
        made.stop(within_s=0.3)
    with pytest.raises(Aborted, match="runs already"):
        made.start()
    made.clear()
    made.clear()
    assert not made.running


def test_ports_differ_and_roots_go(tmp_path: Path) -> None:
    assert len(set(free_ports(20))) == 20
    with new_root(None, "accord-test-") as root:
        assert root.is_dir()
    assert not root.exists()
    with pytest.raises(OutputError, match="not overwritten"), new_root(tmp_path, ""):
        pass


def test_the_benchmark_names_a_wrong_setting() -> None:
    with pytest.raises(PlanError, match="sites"):
        run_benchmark("deployment", {"sites": 1}, print)
