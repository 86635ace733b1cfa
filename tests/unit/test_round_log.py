"""What a resumed run knows of the rounds before it."""

from __future__ import annotations

from pathlib import Path

from accord_server.rounds import RoundReport
from accord_simulations.results import RoundResult
from accord_simulations.run import _RoundLog


def report_of(number: int) -> RoundReport:
    return RoundReport(
        round=number,
        cohort=4,
        survivors=("a", "b", "c"),
        aborted_attempts=1,
        trips=6,
        upload_bytes=30,
        download_bytes=40,
        released={"accuracy": 0.5},
    )


def result_of(number: int) -> RoundResult:
    stages = {"round": 1.0, "score": 0.1, "account": 0.0}
    return RoundResult(number, {"accuracy": 0.8}, 1.0, 4, 3, 30, 40, stages)


def test_a_round_that_was_killed_before_its_line_is_taken_from_the_checkpoint(tmp_path: Path) -> None:
    log = _RoundLog(tmp_path / "rounds.jsonl")
    log.add(result_of(1), 5.0, 6.0)
    restored = _RoundLog(tmp_path / "rounds.jsonl")
    restored.restore(2, [report_of(1).to_json(), report_of(2).to_json()])
    first, second = restored.rounds
    assert first == result_of(1)
    assert (second.round, second.survivors, second.trips, second.aborted_attempts) == (2, 3, 6, 1)
    assert (second.metrics, second.epsilon, second.released) == ({}, None, {"accuracy": 0.5})


def test_a_round_that_the_checkpoint_does_not_have_is_run_again(tmp_path: Path) -> None:
    log = _RoundLog(tmp_path / "rounds.jsonl")
    for number in (1, 2):
        log.add(result_of(number), 5.0, 6.0)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"result": {"round": 3, "metr')  # killed in mid line
    log.restore(1, [report_of(1).to_json()])
    assert [item.round for item in log.rounds] == [1]
