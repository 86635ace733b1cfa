"""What a federation needs of Ray and of this machine is there, or one line says what is not: nothing waits for ever."""

from __future__ import annotations

import os
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from accord_shared.errors import Aborted, SettingsError, Unreachable
from accord_simulations.engine import Engine, check_start
from accord_simulations.prepare import _check_device
from accord_simulations.scenario import Resources


@pytest.mark.parametrize(
    "address", ["http://x:1", "https://x:1", "x", "", ":1", "x:", "x:y", "ray://", "x:123456", "a b:1", "x:1/"]
)
def test_an_address_that_ray_has_not_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match="--ray-address"):
        check_start(Resources(), address)


def test_an_address_where_nobody_listens_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto"):
            check_start(Resources(), address)
    started = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://[::1]:{port}", "127.0.0.1:99999", "nobody.invalid:6379"):
        with pytest.raises(Unreachable, match="no Ray at"):
            check_start(Resources(), address)
    assert time.monotonic() - started < 60


def test_a_participant_that_does_not_fit_into_this_machine_is_refused() -> None:
    cores = os.cpu_count() or 1
    check_start(Resources(cpus_per_participant=cores), None)
    with pytest.raises(
        SettingsError, match=rf"resources\.cpus_per_participant = {cores + 1}, but there are {cores} CPUs"
    ):
        check_start(Resources(cpus_per_participant=cores + 1), None)
    with pytest.raises(SettingsError, match=r"resources\.gpus_per_participant = 64"):
        check_start(Resources(gpus_per_participant=64), None)


@pytest.mark.parametrize("device", ["cuda:99", "cuda:64"])
def test_a_gpu_that_is_not_there_is_refused(device: str) -> None:
    _check_device("cpu")
    with pytest.raises(SettingsError, match=rf"resources\.device = '{device}'"):
        _check_device(device)


class FakeRay(SimpleNamespace):
    """As much of Ray as starting it takes."""

    def __init__(self, found: dict[str, float], error: Exception | None = None) -> None:
        super().__init__(asked={}, stopped=0)
        self.found, self.error = found, error

    def init(self, **options: Any) -> None:
        self.asked = options
        if self.error is not None:
            raise self.error

    def cluster_resources(self) -> dict[str, float]:
        return self.found

    def shutdown(self) -> None:
        self.stopped += 1


def started(monkeypatch: pytest.MonkeyPatch, ray: FakeRay, engine: Engine) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", ray)
    with engine._ray():
        assert not ray.stopped


def test_an_address_in_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for given, asked in ((None, "local"), ("auto", "auto")):
        ray = FakeRay({"CPU": 2.0})
        started(monkeypatch, ray, Engine(Resources(), given))
        assert ray.asked["address"] == asked
        assert ray.stopped == 1


@pytest.mark.parametrize(
    "error", [TimeoutError("no node\nafter 30 s"), ConnectionError("x"), Exception(""), AssertionError()]
)
def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    ray = FakeRay({}, error)
    with pytest.raises(Aborted, match=r"Ray did not start: \w") as caught:
        started(monkeypatch, ray, Engine(Resources()))
    assert "\n" not in str(caught.value)
    assert ray.stopped == 1


def test_a_cluster_without_room_for_a_participant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay({"CPU": 2.0})
    with pytest.raises(SettingsError, match=r"gpus_per_participant = 0\.5, but there are 0 GPUs"):
        started(monkeypatch, ray, Engine(Resources(gpus_per_participant=0.5), "auto"))
    assert ray.stopped == 1
