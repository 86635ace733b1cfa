"""The benchmarks at toy size: what they report is there and adds up; what they do not know is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from accord_shared.errors import PlanError
from accord_simulations.bench import run_benchmark
from accord_simulations.bench._clock import interleaved_medians, peak_bytes

DP_STEP_KEYS = {
    "nonprivate_ms",
    "accord_ms",
    "opacus_hooks_ms",
    "opacus_ghost_ms",
    "overhead",
    "speedup_vs_ghost",
    "peak_bytes_ratio",
    "norm_max_relative_error",
    "batch",
    "tokens",
    "rank",
    "repeats",
    "depth",
    "precision",
    "threads",
    "device",
    "versions",
}
SIMULATION_KEYS = {
    "overhead",
    "client_rounds_per_s",
    "peer_client_rounds_per_s",
    "speedup",
    "caching_peer_client_rounds_per_s",
    "speedup_over_caching_peer",
    "peak_rss_bytes",
    "startup_s",
    "participants",
    "records",
    "steps",
    "rounds",
    "versions",
}


def _silent(_: str) -> None: ...


def test_unknown_benchmark_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(PlanError, match="dp-step, simulation"):
        run_benchmark("speed", {}, _silent)


@pytest.mark.parametrize("name", ["dp-step", "simulation"])
def test_unknown_setting_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match="unknown key: bach"):
        run_benchmark(name, {"bach": 4}, _silent)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dp-step", {"batch": 0}),
        ("dp-step", {"depth": "head"}),
        ("dp-step", {"device": "tpu"}),
        ("simulation", {"participants": 1}),
        ("simulation", {"steps": 0}),
    ],
)
def test_setting_out_of_range_is_refused_by_name(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(settings))):
        run_benchmark(name, settings, _silent)


def test_every_variant_is_measured_equally_often_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    medians = interleaved_medians(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=5, warm_up=2, device="cpu"
    )
    assert set(medians) == {"a", "b"}
    assert calls.count("a") == calls.count("b") == 7
    assert {tuple(calls[i : i + 2]) for i in range(0, 14, 2)} == {("a", "b"), ("b", "a")}


def test_peak_memory_sees_what_a_step_frees_again() -> None:
    size = 64 * 2**20
    assert peak_bytes(lambda: bytearray(b"x") * size, repeats=2, device="cpu") > size // 2


@pytest.mark.filterwarnings("ignore")
def test_dp_step_reports_every_key() -> None:
    lines: list[str] = []
    result = run_benchmark("dp-step", {"batch": 2, "tokens": 8, "rank": 4, "repeats": 2}, lines.append)
    assert set(result) == DP_STEP_KEYS
    assert result["norm_max_relative_error"] <= 1e-4
    assert result["overhead"] == pytest.approx(result["accord_ms"] / result["nonprivate_ms"], rel=1e-2)
    assert result["speedup_vs_ghost"] == pytest.approx(result["opacus_ghost_ms"] / result["accord_ms"], rel=1e-2)
    assert lines


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_simulation_reports_every_key() -> None:
    settings = {
        "participants": 3,
        "records": 32,
        "steps": 2,
        "rounds": 2,
        "peer_participants": 2,
        "accountant": "rdp",
    }
    result = run_benchmark("simulation", settings, _silent)
    assert set(result) >= SIMULATION_KEYS
    assert {key: result[key] for key in settings} == settings
    assert all(math.isfinite(result[key]) for key in SIMULATION_KEYS - {"versions"})
    assert -0.05 <= result["overhead"] <= 1.0
    assert result["speedup"] == pytest.approx(
        result["client_rounds_per_s"] / result["peer_client_rounds_per_s"], rel=2e-2
    )
