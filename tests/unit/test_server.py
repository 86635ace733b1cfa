"""The coordinator without Flower: rounds, retries, optimisers, checkpoints."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from accord_server.aggregation import Aggregate, Begin, PlainAggregation, unnoted
from accord_server.checkpoint import Begun, CheckpointFolder, Seal
from accord_server.cohort import choose_cohort
from accord_server.exchange import Exchange, LocalExchange
from accord_server.optimizer import initial_state, step
from accord_server.rounds import Coordinator, Hooks, RoundReport
from accord_shared.errors import CheckpointError, Interrupted, NonFinite, OutputError, ProtocolError, RoundAborted
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
    made = Coordinator(
        a_plan,
        "run",
        np.zeros(3, dtype=np.float32),
        aggregation=PlainAggregation(),
        checkpoints=CheckpointFolder(folder) if folder else None,
        observer=lambda report, _: reports.append(report),
        **options,
    )
    return made.run(exchange(sites)), reports


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

    with pytest.raises(Cut):
        coordinator(plan(**changes), CheckpointFolder(tmp_path), observer=cut_after(3)).run(exchange(sites))
    weights, reports = coordinate(plan(**changes), sites, tmp_path)
    assert [report.round for report in reports] == [4, 5, 6]
    assert weights.tobytes() == whole.tobytes()


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    coordinate(plan(), {"a": adds(1.0), "b": adds(1.0)}, tmp_path)
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to plan"):
        folder.load("0" * 64)
    (tmp_path / "state.json").write_text(json.dumps({"format": 99, "round": 5}))
    with pytest.raises(CheckpointError, match="format 99"):
        folder.load(plan().hash)
    for tensors in tmp_path.glob("round-*.safetensors"):
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    for text in ("", "{}", "null"):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(CheckpointError):
            folder.load(plan().hash)


TEARS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "short": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(
    tear: str, sealed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seal = Seal(AESGCM(b"k" * 32)) if sealed else None
    folder, a_plan = CheckpointFolder(tmp_path, seal), plan(**{"run.rounds": 6})
    made = coordinator(a_plan, folder)
    made.run(exchange({"a": adds(1.0), "b": adds(1.0)}))
    state = tmp_path / "state.json"
    state.write_bytes(TEARS[tear](state.read_bytes()) if tear != "flipped" else b"x" + state.read_bytes())
    found = folder.load(a_plan.hash)
    assert found is not None
    assert found.round == 6  # there are two of the newest state
    for reached in (5, 4):
        newest = tmp_path / f"round-{reached + 1:05d}.safetensors"
        newest.write_bytes(TEARS[tear](newest.read_bytes()))
        caplog.clear()
        found = CheckpointFolder(tmp_path, seal).load(a_plan.hash)
        assert found is not None
        assert (found.round, len(found.history)) == (reached, reached)
        np.testing.assert_allclose(found.weights, reached)
        assert f"falls back to round {reached}" in caplog.text
    (tmp_path / "round-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"damaged|cannot be"):
        CheckpointFolder(tmp_path, seal).load(a_plan.hash)


def coordinator(a_plan: Plan, folder: CheckpointFolder, **options: Any) -> Coordinator:
    start = np.zeros(3, dtype=np.float32)
    return Coordinator(a_plan, "run", start, aggregation=PlainAggregation(), checkpoints=folder, **options)


class Cut(Exception):
    pass


def cut_after(number: int) -> Callable[[RoundReport, Vector], None]:
    def cut(report: RoundReport, _: Vector) -> None:
        if report.round == number:
            raise Cut

    return cut


def noting(asked: list[tuple[int, int]]) -> Callable[[Message], Message]:
    """A site that adds one, and notes what it was asked."""

    def handle(message: Message) -> Message:
        assert isinstance(message, TrainRequest)
        asked.append((message.round, message.attempt))
        return adds(1.0)(message)

    return handle


def test_rounds_that_sites_answered_are_not_asked_for_again_after_a_fall_back(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []
    a_plan, sites = plan(**{"run.rounds": 6}), exchange({"a": noting(asked), "b": noting(asked)})
    with pytest.raises(Cut):
        coordinator(a_plan, CheckpointFolder(tmp_path), observer=cut_after(3)).run(sites)
    assert set(asked) == {(1, 1), (2, 1), (3, 1)}
    CheckpointFolder(tmp_path).begin(Begun(4, 2, ("a", "b")))  # it died in an attempt at round 4
    for number in (2, 3):
        (tmp_path / f"round-{number:05d}.safetensors").write_bytes(b"torn")
    reports: list[RoundReport] = []
    asked.clear()
    again = coordinator(a_plan, CheckpointFolder(tmp_path), observer=lambda report, _: reports.append(report))
    assert again.finished_rounds == 1
    weights = again.run(sites)
    assert set(asked) == {(5, 1), (6, 1)}
    assert [(report.round, bool(report.survivors)) for report in reports] == [
        (2, False), (3, False), (4, False), (5, True), (6, True),
    ]  # fmt: skip
    np.testing.assert_allclose(weights, 3.0)  # rounds 1, 5 and 6
    assert coordinator(a_plan, CheckpointFolder(tmp_path)).finished_rounds == 6


def test_a_run_whose_last_rounds_were_lost_says_so(tmp_path: Path) -> None:
    sites = exchange({"a": adds(1.0), "b": adds(1.0)})
    coordinator(plan(), CheckpointFolder(tmp_path)).run(sites)
    for number in (3, 4):
        (tmp_path / f"round-{number:05d}.safetensors").write_bytes(b"torn")
    again = coordinator(plan(), CheckpointFolder(tmp_path))
    np.testing.assert_allclose(again.run(sites), 2.0)
    assert (again.finished_rounds, again.ended) == (4, "its last rounds were lost with a checkpoint")


@pytest.mark.parametrize("text", ["", "{", "null", "[1, 2]", '{"round": "x"}'])
def test_a_torn_note_of_attempts_closes_its_round(text: str, tmp_path: Path) -> None:
    asked: list[int] = []

    def not_the_third(message: Message) -> Message:
        assert isinstance(message, TrainRequest)
        asked.append(message.round)
        return fails(message) if message.round == 3 else adds(1.0)(message)

    sites = {"a": not_the_third, "b": not_the_third}
    with pytest.raises(RoundAborted):
        coordinate(plan(), sites, tmp_path)
    assert CheckpointFolder(tmp_path).begun() == Begun(3, 3, ("a", "b"))
    (tmp_path / "attempt.json").write_text(text)
    asked.clear()
    _, reports = coordinate(plan(), sites, tmp_path)
    assert set(asked) == {4}
    assert [(report.round, bool(report.survivors)) for report in reports] == [(3, False), (4, True)]


def test_room_for_the_checkpoint_is_held_before_sites_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def sees_room(message: Message) -> Message:
        assert (tmp_path / "room").stat().st_size > 10_000
        return noting(asked)(message)

    coordinate(plan(), {"a": sees_room, "b": sees_room}, tmp_path)
    assert not (tmp_path / "room").exists()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("accord_server.checkpoint.os.posix_fallocate", full)
    asked.clear()
    with pytest.raises(OutputError, match="No space left"):
        coordinate(plan(), {"a": noting(asked), "b": noting(asked)}, tmp_path / "new")
    assert asked == []
    assert CheckpointFolder(tmp_path / "new").begun() == Begun()


def test_what_the_coordinator_cannot_keep_is_written_again_and_no_site_hears_of_it(tmp_path: Path) -> None:
    """A full disk at the end of a round, and a database that is away at the start of the next."""
    asked: list[tuple[int, int]] = []
    guarded: list[tuple[int, int]] = []
    writes = 0

    def keep(write: Callable[[], None]) -> None:
        nonlocal writes
        for _ in range(3):
            writes += 1
        write()

    def guard(number: int, attempt: int) -> None:
        guarded.append((number, attempt))
        if len(guarded) == 3:
            raise OutputError("cannot use the database")

    hooks, sites = Hooks(guard=guard, keep=keep), exchange({"a": noting(asked), "b": noting(asked)})
    first = coordinator(plan(), CheckpointFolder(tmp_path), hooks=hooks)
    with pytest.raises(OutputError, match="cannot use the database"):
        first.run(sites)
    assert set(asked) == {(1, 1), (2, 1)}
    again = coordinator(plan(), CheckpointFolder(tmp_path), hooks=hooks)
    again.run(sites)
    assert [report["aborted_attempts"] for report in again.history] == [0] * 4
    assert len(asked) == 2 * 4  # no attempt was lost
    assert guarded == [(1, 1), (2, 1), (3, 1), (3, 1), (4, 1)]
    assert writes == 3 * 4


def test_every_attempt_in_vain_is_told_also_of_a_run_that_aborts(tmp_path: Path) -> None:
    vain: list[tuple[int, int]] = []
    hooks = Hooks(in_vain=lambda number, attempt: vain.append((number, attempt)))
    with pytest.raises(RoundAborted):
        coordinate(plan(), {"a": adds(1.0), "b": fails, "c": fails}, hooks=hooks)
    assert vain == [(1, 1), (1, 2), (1, 3)]
    vain.clear()

    def interrupts(message: Message) -> Message:
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        coordinate(plan(), {"a": adds(1.0), "b": interrupts}, hooks=hooks)
    assert vain == [(1, 1)]


class Waiting(LocalExchange):
    """An exchange whose sites come and go, and whose pauses are noted."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rests: list[int] = []
        self.away: set[str] = set()
        self.looks = 0

    def present(self) -> tuple[str, ...]:
        self.looks += 1
        return tuple(site for site in self.sites() if site not in self.away)

    def ready(self, minimum: int, among: Any = None) -> bool:
        if len(self.present()) < minimum:
            self.away.clear()
        return True

    def rest(self, in_vain: int) -> None:
        self.rests.append(in_vain)


def test_attempts_rest_after_each_other_also_over_a_restart(tmp_path: Path) -> None:
    waits = Waiting({"a": adds(1.0), "b": fails}, Enquiry(1, "run", "{}", "", ""))
    for before in (0, 3):
        with pytest.raises(RoundAborted):
            coordinator(plan(), CheckpointFolder(tmp_path)).run(waits)
        assert waits.rests == [before, before + 1, before + 2]
        waits.rests.clear()


def test_where_too_few_of_a_cohort_are_ready_the_next_choice_is_another_and_the_attempt_the_same() -> None:
    tried: list[tuple[int, tuple[str, ...]]] = []

    class NotReady(PlainAggregation):
        def collect(
            self, request: TrainRequest, cohort: tuple[str, ...], exchange: Exchange, begin: Begin = unnoted
        ) -> Aggregate:
            tried.append((request.attempt, cohort))
            if len(tried) <= 3:
                return Aggregate(np.zeros(3), (), trips=0, begun=False)
            return super().collect(request, cohort, exchange, begin)

    sites = exchange({f"site-{index:02d}": adds(1.0) for index in range(20)})
    start = np.zeros(3, dtype=np.float32)
    made = Coordinator(plan(**{"run.rounds": 1}), "run", start, aggregation=NotReady())
    made.run(sites)
    assert [attempt for attempt, _ in tried] == [1] * 4
    assert len({cohort for _, cohort in tried}) == 4
    assert made.history[0]["aborted_attempts"] == 0


def test_who_leaves_between_the_wait_and_the_choice_is_waited_for() -> None:
    asked: list[tuple[int, int]] = []
    waits = Waiting({"a": noting(asked), "b": noting(asked)}, Enquiry(1, "run", "{}", "", ""))
    gone = False

    def ready(minimum: int, among: Any = None) -> bool:
        nonlocal gone
        waits.away = set() if gone else {"b"}
        gone = True
        return True

    waits.ready = ready  # type: ignore[method-assign]
    start = np.zeros(3, dtype=np.float32)
    Coordinator(plan(), "run", start, aggregation=PlainAggregation()).run(waits)
    assert {number for number, _ in asked} == {1, 2, 3, 4}
    assert len(asked) == 8


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
    for name in ("state.json", f"state-{state['round']:05d}.json"):
        (sealed / name).write_text(json.dumps(state | {"tensors": moved.name}))
    with pytest.raises(CheckpointError, match="cannot be decrypted"):
        CheckpointFolder(sealed, seal).load(plan().hash)


def test_the_last_three_rounds_are_kept(tmp_path: Path) -> None:
    coordinate(plan(), {"a": adds(1.0), "b": adds(1.0)}, tmp_path)
    kept = (2, 3, 4)
    assert {path.name for path in tmp_path.iterdir()} == {
        "attempt.json",
        "state.json",
        *(f"round-{number:05d}.safetensors" for number in kept),
        *(f"state-{number:05d}.json" for number in kept),
    }


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
