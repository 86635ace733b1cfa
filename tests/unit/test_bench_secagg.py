"""The benchmark of secure aggregation at toy size: its sums are exact, its keys are there, its ratios add up."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from accord_shared.errors import PlanError
from accord_shared.secagg.collector import Collector
from accord_simulations.bench import run_benchmark, secagg
from accord_simulations.cli import register

PEER_KEYS = {
    "peer_client_cpu_s",
    "peer_server_cpu_s",
    "peer_upload_bytes_per_parameter",
    "client_speedup",
    "server_speedup",
    "peer_shares",
}
KEYS = PEER_KEYS | {
    "client_cpu_s",
    "server_cpu_s",
    "upload_bytes_per_parameter",
    "trips",
    "exact",
    "server_peak_bytes",
    "client_floor_s",
    "server_floor_s",
    "client_over_floor",
    "server_over_floor",
    "bootstrap_client_cpu_s",
    "n",
    "d",
    "drop",
    "bits",
    "repeats",
    "peer",
    "versions",
}


def _silent(_: str) -> None: ...


def bench(**settings: Any) -> dict[str, Any]:
    return run_benchmark("secagg", {"repeats": 1, **settings}, _silent)


@pytest.mark.parametrize(
    ("clients", "dim", "drop", "bits"), [(3, 1, 0, 24), (7, 100, 2, 24), (5, 33, 1, 20), (6, 10, 0, 40)]
)
def test_the_sum_is_exact_without_a_peer(clients: int, dim: int, drop: int, bits: int) -> None:
    result = bench(clients=clients, dim=dim, drop=drop, bits=bits, peer="none")
    assert set(result) == KEYS
    assert result["exact"] is True
    assert result["trips"] == 3
    assert (result["n"], result["d"], result["drop"], result["bits"]) == (clients, dim, drop, bits)
    assert all(result[key] is None for key in PEER_KEYS)
    assert min(result["client_cpu_s"], result["server_cpu_s"], result["bootstrap_client_cpu_s"]) > 0


def test_beside_flower() -> None:
    result = bench(clients=4, dim=200, peer="flower", peer_shares=3)
    assert set(result) == KEYS
    assert result["exact"] is True
    assert result["peer_shares"] == 3
    for party in ("client", "server"):
        ratio = result[f"peer_{party}_cpu_s"] / result[f"{party}_cpu_s"]
        assert result[f"{party}_speedup"] == pytest.approx(ratio, rel=1e-2, abs=1e-3)
    assert result["peer_upload_bytes_per_parameter"] > 8


def test_floors_count_keystreams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secagg, "aes_rate_bytes_per_s", lambda: 1000.0)
    result = bench(clients=6, dim=50, drop=1, bits=24, peer="none")
    assert result["client_floor_s"] == pytest.approx(6 * 50 * 4 / 1000)
    assert result["server_floor_s"] == pytest.approx((5 + 5) * 50 * 4 / 1000)


def test_server_memory_is_that_of_one_upload_and_the_sum() -> None:
    dim = 1_000_000
    peak = bench(clients=5, dim=dim, peer="none")["server_peak_bytes"]
    assert (4 + 3) * dim < peak < 5 * 3 * dim


def test_a_wrong_sum_is_not_called_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Collector.finish

    def off_by_one(collector: Collector) -> np.ndarray:
        total = finish(collector)
        total[0] ^= 1
        return total

    monkeypatch.setattr(Collector, "finish", off_by_one)
    assert bench(clients=5, dim=10, peer="none")["exact"] is False


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"clients": 2}, "clients"),
        ({"clients": 10, "drop": 4}, "drop"),
        ({"bits": 7}, "bits"),
        ({"peer": "opacus"}, "peer"),
        ({"peer_shares": 2}, "peer_shares"),
        ({"dims": 5}, "unknown key: dims"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(PlanError, match=key):
        bench(**settings)


def accord(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", *arguments])


def test_the_command_line_sets_what_the_issue_names() -> None:
    options = ("--clients", "5", "--dim", "10", "--drop", "1", "--peer", "none", "--repeats", "1", "--bits", "20")
    done = accord("secagg", *options, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["n"], result["d"], result["drop"], result["bits"]) == (5, 10, 1, 20)
    assert result["exact"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dp-step", "--clients", "5"), "unknown key: clients"),
        (("secagg", "--clients", "5", "--set", "clients=6"), "contradicts"),
        (("secagg", "--set", "sites=6"), "unknown key: sites"),
    ],
)
def test_options_of_another_benchmark_are_refused(arguments: tuple[str, ...], words: str) -> None:
    done = accord(*arguments)
    assert isinstance(done.exception, PlanError)
    assert words in str(done.exception)
