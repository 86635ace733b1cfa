"""The coordinator without Flower: rounds, retries, optimisers, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from accord_server.aggregation import PlainAggregation
from accord_server.checkpoint import CheckpointFolder, Seal
from accord_server.cohort import choose_cohort
from accord_server.exchange import LocalExchange
from accord_server.optimizer import initial_state, step
from accord_server.rounds import Coordinator, RoundReport
from accord_shared.errors import CheckpointError, NonFinite, ProtocolError, RoundAborted
from accord_shared.messages import Enquiry, Message, TrainReply, TrainRequest
from accord_shared.plan import Plan, ServerSpec, make_plan
from accord_shared.vectors import Vector


def plan(**changes: Any) -> Plan:
    base = make_plan(
        {
            "run": {"name": "server", "rounds": 4, "max_extra_attempts": 2},
            "model": {"source": "package:nothing"},
            "task": {"labels": ["a", "b"]},
            "local": {"expected_records": 10},
            "privacy": {"noise": "none"},
            "cohort": {"size": 3, "minimum": 2},
            "secure_aggregation": {"mode": "off"},
        }
    )
    return base.revised(changes)


def adds(value: float) -> Callable[[Message], Message]:
    """A site whose update is `value` in every coordinate."""

    def handle(message: Message) -> Message:
        assert isinstance(message, TrainRequest)
        update = np.full_like(message.weights, value)
        return TrainReply(message.run_id, message.round, message.attempt, update)

    return handle


def fails(message: Message) -> Message:
    raise ProtocolError("no")


def exchange(sites: dict[str, Callable[[Message], Message]]) -> LocalExchange:
    """Sites that are there from the start, and need not be asked to join."""
    return LocalExchange(sites, Enquiry(1, "run", "{}", "", ""))


def coordinate(
    a_plan: Plan, sites: dict[str, Callable[[Message], Message]], folder: Path | None = None, **options: Any
) -> tuple[Vector, list[RoundReport]]:
    reports: list[RoundReport] = []
    coordinator = Coordinator(
        a_plan,
        "run",
        np.zeros(3, dtype=np.float32),
        aggregation=PlainAggregation(),
        checkpoints=CheckpointFolder(folder) if folder else None,
        observer=lambda report, _: reports.append(report),
        **options,
    )
    return coordinator.run(exchange(sites)), reports


def test_the_mean_of_the_survivors_is_added_each_round() -> None:
    weights, reports = coordinate(plan(), {"a": adds(1.0), "b": adds(3.0), "c": fails})
    np.testing.assert_allclose(weights, 4 * 2.0)
    assert [report.survivors for report in reports] == [("a", "b")] * 4
    assert all(report.cohort == 3 and report.aborted_attempts == 0 for report in reports)


def test_below_the_minimum_every_attempt_is_used_and_then_the_round_aborts() -> None:
    asked = 0

    def counting(message: Message) -> Message:
        nonlocal asked
        asked += 1
        return fails(message)

    with pytest.raises(RoundAborted, match="1 of 3 sites finished in the last of 3 attempts"):
        coordinate(plan(), {"a": adds(1.0), "b": counting, "c": fails})
    assert asked == 3


def test_a_second_attempt_can_succeed_and_is_counted() -> None:
    def second(message: Message) -> Message:
        assert isinstance(message, TrainRequest)
        return fails(message) if message.attempt == 1 else adds(1.0)(message)

    _, reports = coordinate(plan(), {"a": adds(1.0), "b": second, "c": fails})
    assert [report.aborted_attempts for report in reports] == [1] * 4


@pytest.mark.parametrize("update", [np.array([np.nan, 0, 0]), np.array([np.inf, 0, 0]), np.zeros(4), np.zeros((1, 3))])
def test_a_malformed_update_is_a_failure_of_its_site_alone(update: np.ndarray[Any, Any]) -> None:
    def bad(message: Message) -> Message:
        assert isinstance(message, TrainRequest)
        return TrainReply(message.run_id, message.round, message.attempt, update.astype(np.float32))

    weights, reports = coordinate(plan(), {"a": adds(1.0), "b": adds(1.0), "c": bad})
    np.testing.assert_allclose(weights, 4.0)
    assert reports[0].survivors == ("a", "b")


def test_an_update_of_another_round_or_run_is_not_added() -> None:
    def late(message: Message) -> Message:
        assert isinstance(message, TrainRequest)
        return TrainReply(message.run_id, message.round - 1, message.attempt, message.weights + 9)

    def foreign(message: Message) -> Message:
        assert isinstance(message, TrainRequest)
        return TrainReply("another", message.round, message.attempt, message.weights + 9)

    weights, _ = coordinate(plan(**{"cohort.minimum": 1}), {"a": adds(1.0), "b": late, "c": foreign})
    np.testing.assert_allclose(weights, 4.0)


def test_weights_that_leave_the_numbers_end_the_run() -> None:
    with pytest.raises(NonFinite, match="joint model after round"):
        coordinate(plan(**{"server.learning_rate": 1e308}), {"a": adds(3e38), "b": adds(3e38)})


def test_averaging_takes_the_last_share_of_the_iterates() -> None:
    weights, _ = coordinate(plan(**{"server.average_last": 0.5}), {"a": adds(1.0), "b": adds(1.0)})
    np.testing.assert_allclose(weights, (3 + 4) / 2)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    changes = {"server.optimizer": "fedadam", "server.average_last": 0.75, "run.rounds": 6}
    sites = {"a": adds(0.5), "b": adds(-0.25)}
    whole, _ = coordinate(plan(**changes), sites)

    class Cut(Exception):
        pass

    def cut(report: RoundReport, _: Vector) -> None:
        if report.round == 3:
            raise Cut

    first = Coordinator(
        plan(**changes), "run", np.zeros(3, dtype=np.float32), aggregation=PlainAggregation(),
        checkpoints=CheckpointFolder(tmp_path), observer=cut,
    )  # fmt: skip
    with pytest.raises(Cut):
        first.run(exchange(sites))
    weights, reports = coordinate(plan(**changes), sites, tmp_path)
    assert [report.round for report in reports] == [4, 5, 6]
    assert weights.tobytes() == whole.tobytes()


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    coordinate(plan(), {"a": adds(1.0), "b": adds(1.0)}, tmp_path)
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to plan"):
        folder.load("0" * 64)
    (tensors,) = tmp_path.glob("round-*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        folder.load(plan().hash)
    for text in ("", "{}", "null", json.dumps({"format": 99})):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(CheckpointError):
            folder.load(plan().hash)


def test_a_sealed_checkpoint_needs_its_key(tmp_path: Path) -> None:
    seal, other = (Seal(AESGCM(bytes([number]) * 32)) for number in (1, 2))
    plain, sealed = tmp_path / "plain", tmp_path / "sealed"
    coordinate(plan(), {"a": adds(1.0), "b": adds(1.0)}, plain)
    found = CheckpointFolder(plain).load(plan().hash)
    assert found is not None
    CheckpointFolder(sealed, seal).save(found)
    (tensors,) = sealed.glob("round-*.safetensors")
    assert found.weights.tobytes() not in tensors.read_bytes()
    opened = CheckpointFolder(sealed, seal).load(plan().hash)
    assert opened is not None
    np.testing.assert_array_equal(opened.weights, found.weights)
    with pytest.raises(CheckpointError, match="cannot be decrypted"):
        CheckpointFolder(sealed, other).load(plan().hash)
    with pytest.raises(CheckpointError, match="is encrypted"):
        CheckpointFolder(sealed).load(plan().hash)
    moved = sealed / "round-00009.safetensors"  # a file of another round under this key
    tensors.rename(moved)
    state = json.loads((sealed / "state.json").read_text())
    (sealed / "state.json").write_text(json.dumps(state | {"tensors": moved.name}))
    with pytest.raises(CheckpointError, match="cannot be decrypted"):
        CheckpointFolder(sealed, seal).load(plan().hash)


def test_one_tensor_file_is_kept(tmp_path: Path) -> None:
    coordinate(plan(), {"a": adds(1.0), "b": adds(1.0)}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt.json", "round-00004.safetensors", "state.json"]


OPTIMIZERS = {
    # Two steps with Δ = (1, -2), β₁ = 0.9, β₂ = 0.99, τ = 1e-3, v₀ = τ², η = 0.1 (Reddi et al. 2021, Algorithm 2).
    "fedavg": ([0.1, -0.2], [0.1, -0.2]),
    "fedavgm": ([0.1, -0.2], [0.19, -0.38]),
    "fedadam": ([0.0990050, -0.0995013], [0.1337361, -0.1342109]),
    "fedyogi": ([0.0990050, -0.0995013], [0.1334036, -0.1338761]),
    "fedadagrad": ([0.0099900, -0.0099950], [0.0134255, -0.0134303]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_server_optimisers_have_their_known_answers(name: str) -> None:
    spec = ServerSpec(optimizer=name, learning_rate=0.1)  # type: ignore[arg-type]
    state, delta = initial_state(spec, 2), np.array([1.0, -2.0])
    for expected in OPTIMIZERS[name]:
        change, state = step(spec, state, delta)
        np.testing.assert_allclose(change, expected, rtol=1e-5)


def test_cohorts_are_public_and_the_same_for_all() -> None:
    sites = [f"site-{index}" for index in range(20)]
    a_plan = plan(**{"cohort.size": 5})
    first = choose_cohort(a_plan, sites, 1, 1)
    assert first == choose_cohort(a_plan, list(reversed(sites)), 1, 1)
    assert len(set(first)) == 5
    rounds = {choose_cohort(a_plan, sites, number, 1) for number in range(1, 30)}
    assert len(rounds) > 20
    assert first != choose_cohort(a_plan, sites, 1, 2)
    with pytest.raises(RoundAborted, match="1 sites are connected"):
        choose_cohort(a_plan, sites[:1], 1, 1)
