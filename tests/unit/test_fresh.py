"""Two machines that go on from one snapshot: their kernels draw the same, and what they make differs all the same."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest

from accord_shared.dp import noise
from accord_shared.dp.noise import SecureGenerator, fresh_bytes
from accord_shared.messages import MaskRequest
from conformance.lab import Lab, ask, lab_plan, trained
from conformance.secure_lab import SecureLab, secure_lab_plan


@pytest.fixture
def cloned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's generator gives the same bytes again and again."""
    monkeypatch.setattr(os, "urandom", bytes)


def test_a_clock_sets_clones_apart(cloned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fresh_bytes(32) != fresh_bytes(32)
    assert len(fresh_bytes(1000)) == 1000
    monkeypatch.setattr(time, "time_ns", lambda: 7)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 7)
    assert fresh_bytes(32) == fresh_bytes(32)  # nothing is different: nothing can be
    assert fresh_bytes(32, b"a nonce of this request") != fresh_bytes(32, b"of another")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    one = fresh_bytes(32)
    monkeypatch.setattr(noise, "_boot_id", lambda: b"another boot")
    assert fresh_bytes(32) != one


def test_a_generator_is_keyed_anew_for_what_is_asked(cloned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 7)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 7)
    draws = []
    for context in (b"a", b"a", b"b"):
        generator = SecureGenerator()
        generator.renew(context)
        draws.append(generator.uint64(4).tolist())
    assert draws[0] == draws[1] != draws[2]
    given = SecureGenerator(bytes(32))
    given.renew(b"a")
    assert given.uint64(4).tolist() == SecureGenerator(bytes(32)).uint64(4).tolist()


@pytest.mark.parametrize("noise_mode", ["site", "cohort"])
def test_a_resumed_snapshot_of_a_site_repeats_no_noise(
    noise_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of the process is put back between two releases, as a snapshot of its machine does."""
    names = itertools.count()
    updates = []
    for _ in range(2):
        folder = tmp_path / str(next(names))
        if noise_mode == "site":
            lab, plan = Lab(folder, zero_gradients=True), lab_plan()
            site = lab.joined(plan)
            site._generator._start(bytes(32))  # the state that both go on from
            updates.append(trained(ask(site, plan, lab, 1)).update)
        else:
            secure = SecureLab(folder, secure_lab_plan(**{"privacy.noise": "cohort"}), zero_gradients=True)
            secure.exchange.join()
            name = secure.names[0]
            secure.sites[name]._generator._start(bytes(32))
            secure.members[name].before_mask = lambda words: updates.append(words.copy())  # type: ignore[method-assign]
            secure.collect(1)
            assert secure.last(name, MaskRequest)
    assert np.mean(updates[0] == updates[1]) < 0.5
