"""The whole thing with real processes: the command line, Flower, Ray, kill -9, signals, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import pytest

from command_line import Run, accord_command, refused

__all__ = ["accord_command"]

(ENTRY,) = entry_points(group="accord.commands", name="simulation")

SMALL = [
    "--participants", "4",
    "--set", "data.records_per_participant=40",
    "--set", "data.test_records_per_participant=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "ACCORD_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0"}


def command(*args: str) -> list[str]:
    return [str(Path(sys.executable).with_name("accord")), *args]


def accord(cache: Path, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*args), env=environment(cache), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def simulate(cache: Path, out: Path, *args: str, code: int = 0) -> dict[str, object]:
    done = accord(cache, "simulate", "bank-demo", *SMALL, "--out", str(out), "--json", *args, code=code)
    return json.loads(done.stdout.splitlines()[-1]) if code == 0 else {"stderr": done.stderr}


def start(cache: Path, out: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("simulate", "bank-demo", *SMALL, "--out", str(out), "--json", *args),
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def await_round(out: Path, number: int, process: subprocess.Popen[str]) -> None:
    state = out / "checkpoint" / "state.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if state.exists() and json.loads(state.read_text())["round"] >= number:
            return
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    raise AssertionError(f"round {number} never came")


def session_processes(leader: int) -> list[psutil.Process]:
    """Processes of the session that `leader` began."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def assert_no_process_left(leader: int) -> None:
    deadline = time.monotonic() + 30
    while (left := session_processes(leader)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_a_run_ends_with_report_model_and_all_json_keys(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = simulate(cache, out, "--rounds", "6", "--compare", "all")
    wanted = (
        "scenario participants rounds depth noise secure_aggregation seed metric federated metrics compare epsilon "
        "epsilon_all_collude epsilon_target delta aborted_attempts trips_per_round upload_bytes_per_site_round "
        "seconds peak_rss_bytes report model"
    )
    assert set(wanted.split()) <= set(summary)
    assert summary["rounds"] == 6
    assert summary["participants"] == 4
    assert 7.99 < summary["epsilon"] <= 8.0  # type: ignore[operator]
    assert set(summary["compare"]) == {"alone", "nonprivate", "central", "central_nonprivate"}  # type: ignore[call-overload]
    assert abs(summary["compare"]["nonprivate"] - summary["compare"]["central_nonprivate"]) < 0.03  # type: ignore[index]
    assert {"report.html", "report.json", "model", "checkpoint"} <= {path.name for path in out.iterdir()}
    assert not list(out.rglob("*.tmp"))
    exported = json.loads((out / "model" / "accord.json").read_text())
    assert exported["epsilon"] == summary["epsilon"]


def test_kill_in_the_middle_then_resume_spends_the_same(cache: Path, tmp_path: Path) -> None:
    out, rounds = tmp_path / "run", "24"
    process = start(cache, out, "--rounds", rounds)
    await_round(out, 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = json.loads((out / "checkpoint" / "state.json").read_text())["round"]
    assert 5 <= reached < 24
    summary = simulate(cache, out, "--rounds", rounds, "--resume")
    rounds_done = [entry["round"] for entry in json.loads((out / "report.json").read_text())["rounds"]]
    assert rounds_done == list(range(1, 25))
    uninterrupted = simulate(cache, tmp_path / "whole", "--rounds", rounds)
    assert summary["epsilon"] == uninterrupted["epsilon"]


def test_a_killed_cohort_charges_what_it_repeats_and_no_more_than_it_may(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--noise", "cohort", "--participants", "5", "--rounds", "20", "--set", "run.max_extra_attempts=3")
    process = start(cache, out, *options)
    await_round(out, 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    summary = simulate(cache, out, *options, "--resume")
    report = json.loads((out / "report.json").read_text())
    assert [entry["round"] for entry in report["rounds"]] == list(range(1, 21))
    released = [participant["rounds_released"] for participant in report["participants"]]
    assert all(20 <= count <= 23 for count in released)  # the killed round was a release if it was uploaded
    assert summary["epsilon"] <= summary["epsilon_target"] == 8.0  # type: ignore[operator]
    assert summary["epsilon_all_collude"] > summary["epsilon"]  # type: ignore[operator]
    assert summary["upload_bytes_per_site_round"] < 20_000  # type: ignore[operator]


def test_an_interrupt_leaves_a_resumable_run_and_no_process(cache: Path, tmp_path: Path) -> None:
    for number, sent in ((1, signal.SIGINT), (2, signal.SIGTERM)):
        out = tmp_path / f"run-{number}"
        process = start(cache, out, "--rounds", "24")
        await_round(out, 3, process)
        os.kill(process.pid, sent)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "Traceback" not in stderr
        assert_no_process_left(process.pid)
    assert simulate(cache, out, "--rounds", "24", "--resume")["rounds"] == 24


def test_dropouts_and_crashes_are_survived_and_counted(cache: Path, tmp_path: Path) -> None:
    crash = "faults.crashes=[{participant = 1, round = 2}]"
    summary = simulate(
        cache, tmp_path / "run", "--rounds", "8", "--dropout", "0.25", "--set", crash, "--set", "faults.slow=0.25",
        "--set", "faults.slow_s=0.1", "--secure-aggregation", "off",
    )  # fmt: skip
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    survivors = [entry["survivors"] for entry in report["rounds"]]
    assert set(survivors) <= {2, 3}
    released = [participant["rounds_released"] for participant in report["participants"]]
    assert sum(released) in (sum(survivors), sum(survivors) + 1)  # who crashed after training was charged
    assert summary["epsilon"] <= 8.0  # type: ignore[operator]


@pytest.mark.parametrize(("mode", "trips"), [("malicious", 3), ("semi_honest", 2)])
def test_secure_rounds_survive_losses_at_any_trip(mode: str, trips: int, cache: Path, tmp_path: Path) -> None:
    summary = simulate(
        cache, tmp_path / "run", "--rounds", "10", "--dropout", "0.3", "--secure-aggregation", mode,
        "--participants", "7",
    )  # fmt: skip
    rounds = json.loads((tmp_path / "run" / "report.json").read_text())["rounds"]
    assert [entry["trips"] for entry in rounds[1:]] == [trips] * 9
    assert all(entry["survivors"] >= 5 for entry in rounds)
    assert any(entry["survivors"] < 7 for entry in rounds)
    assert summary["aborted_attempts"] == 0
    assert summary["secure_aggregation"] == mode
    assert summary["epsilon"] <= 8.0  # type: ignore[operator]


def test_a_killed_worker_is_replaced(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(cache, out, "--rounds", "24")
    await_round(out, 3, process)
    workers = [p for p in session_processes(process.pid) if "ClientAppActor" in " ".join(p.cmdline())]
    assert workers
    workers[0].kill()
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-2000:]
    last = json.loads((out / "report.json").read_text())["rounds"][-1]
    assert last["survivors"] == 4
    assert json.loads(stdout.splitlines()[-1])["rounds"] == 24


def test_below_the_minimum_a_run_aborts_and_can_be_resumed(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused = simulate(
        cache, out, "--rounds", "3", "--dropout", "0.5", "--set", "cohort.minimum=4", "--set",
        "run.max_extra_attempts=1", "--secure-aggregation", "off", code=3,
    )  # fmt: skip
    assert "cohort.minimum is 4" in str(refused["stderr"])
    assert "Traceback" not in str(refused["stderr"])


BAD = [
    (["--set", "local.lerning_rate=1"], "unknown key"),
    (["--set", "nonsense.key=1"], "unknown key"),
    (["--epsilon", "0.0000001", "--set", "privacy.delta=1e-15"], "too small"),
    (["--noise", "none", "--epsilon", "3"], "contradicts"),
    (["--noise", "cohort", "--secure-aggregation", "off"], "needs secure_aggregation"),
    (["--noise", "cohort", "--set", "local.steps_per_round=4"], "steps_per_round must be 1"),
    (["--secure-aggregation", "perhaps"], "secure_aggregation.mode"),
    (["--participants", "2", "--set", "privacy.noise='none'"], 'privacy.noise = "site"'),
    (["--participants", "100000"], "participants"),
    (["--partition", "dirichlet:-1"], "dirichlet"),
    (["--compare", "nothing"], "--compare"),
    (["--depth", "tail"], "depth"),
    (["--set", "model.source=path:/does/not/exist"], "config.json"),
    (["--set", "model.digest=sha256:" + "0" * 64], "is not the model of the plan"),
]


@pytest.fixture
def run_here(accord_command: Callable[..., Run], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`accord simulate bank-demo …` in this process: what is refused needs none of its own."""
    for name, value in environment(cache).items():
        monkeypatch.setenv(name, value)
    return accord_command(ENTRY, "simulate", "bank-demo")


@pytest.mark.parametrize(("args", "words"), BAD, ids=[bad[0][1] for bad in BAD])
def test_bad_input_is_one_line_and_writes_nothing(run_here: Run, tmp_path: Path, args: list[str], words: str) -> None:
    out = tmp_path / "run"
    refused(run_here("--out", str(out), *args), words)
    assert not out.exists()


def test_the_exit_code_of_bad_input_is_that_of_the_process(cache: Path, tmp_path: Path) -> None:
    args, words = BAD[0]
    done = accord(cache, "simulate", "bank-demo", "--out", str(tmp_path / "run"), *args, code=2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_output_folder_that_is_not_ours_is_left_alone(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    done = accord(cache, "simulate", "bank-demo", "--out", str(tmp_path), code=2)
    assert "not ours" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_another_plan_is_not_resumed(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    simulate(cache, out, "--rounds", "2")
    refused = simulate(cache, out, "--rounds", "3", "--resume", code=2)
    assert "belongs to plan" in str(refused["stderr"])
    again = simulate(cache, out, "--rounds", "2", code=2)
    assert "--resume" in str(again["stderr"])


def test_sweep_writes_a_frontier(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sets = [arg for arg in SMALL if arg not in ("--participants", "4")]
    done = accord(
        cache, "sweep", "bank-demo", *sets, "--epsilon", "1,8", "--participants", "3", "--rounds", "3",
        "--out", str(out), "--json",
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert [point["settings"]["epsilon"] for point in result["points"]] == [1.0, 8.0]
    assert (out / "frontier.png").exists()
    assert (out / "sweep.html").exists()


def test_help_imports_nothing_heavy(cache: Path) -> None:
    program = """
import sys
from accord_shared.cli import main
sys.argv = ["accord", "--help"]
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "numpy", "pydantic", "flwr", "ray", "transformers", "opacus", "matplotlib", "rich"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(cache), capture_output=True, text=True, check=True
    )
    assert "HEAVY []" in done.stdout
    assert "simulate" in done.stdout
