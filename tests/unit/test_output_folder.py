"""The folder of a run: one process at a time, nothing left of what never ran, and raw texts for their owner alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from accord_client.examples import Examples
from accord_client.features import FeatureCache, default_folder
from accord_client.store import SiteStore
from accord_client.trainer import Runtime
from accord_shared.dp.events import SampledGaussian
from accord_shared.errors import AlreadyRunning, Interrupted, ModelError, OutputError, RoundAborted
from accord_shared.files import make_private, only_one, open_private
from accord_simulations import output
from accord_simulations.faults import FaultSpec
from accord_simulations.output import RunIdentity, claim, numbered
from accord_simulations.participants import WorkFolder

PLAN = "a" * 64
RUN = RunIdentity(PLAN, "b" * 64, "c" * 64)


def _hold(path: Path, ready: object, go: object) -> None:
    with claim(path, RUN, resume=False) as folder:
        folder.checkpoint.mkdir()
        (folder.checkpoint / "attempt.json").write_text("[1, 1]")
        ready.set()  # type: ignore[attr-defined]
        go.wait(30)  # type: ignore[attr-defined]
        os._exit(9)  # it dies, as of a kill


def test_a_folder_that_another_process_holds_is_refused_until_that_dies(tmp_path: Path) -> None:
    path, context = tmp_path / "run", multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(path, ready, go))
    other.start()
    assert ready.wait(30)
    with pytest.raises(AlreadyRunning, match="a run in it is running already"), claim(path, RUN, resume=True):
        pass
    assert (path / "checkpoint" / "attempt.json").exists()
    go.set()
    other.join()
    with claim(path, RUN, resume=True) as folder:
        assert folder.has_run
    other = replace(RUN, plan_hash="d" * 64)
    with pytest.raises(OutputError, match="belongs to plan"), claim(path, other, resume=True):
        pass


def test_a_lock_file_that_was_removed_holds_nobody_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited for a holder that removed its folder got the lock of nothing."""
    import fcntl

    flock = fcntl.flock

    def late(file: object, how: int) -> None:
        flock(file, how)  # type: ignore[arg-type]
        (tmp_path / "run" / output.LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(AlreadyRunning), claim(tmp_path / "run", RUN, resume=False):
        pass


@pytest.mark.parametrize(
    "error", [ModelError("no"), RoundAborted("no"), Interrupted("no"), OSError(28, "full"), KeyboardInterrupt()]
)
def test_where_no_round_was_begun_nothing_is_left(tmp_path: Path, error: BaseException) -> None:
    def broken(path: Path) -> None:
        with claim(path, RUN, resume=False) as folder:
            folder.work.mkdir()
            (folder.work / "x").write_text("x")
            raise error

    (tmp_path / "empty").mkdir()
    for path, left in ((tmp_path / "new" / "run", None), (tmp_path / "empty", [])):
        for _ in range(2):
            with pytest.raises(type(error)):
                broken(path)
        assert (list(path.iterdir()) if path.exists() else None) == left
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_where_a_round_was_begun_everything_stays(tmp_path: Path) -> None:
    def broken() -> None:
        with claim(tmp_path / "run", RUN, resume=False) as folder:
            folder.checkpoint.mkdir()
            (folder.checkpoint / "attempt.json").write_text("[1, 1]")
            raise RoundAborted("no")

    with pytest.raises(RoundAborted):
        broken()
    with pytest.raises(OutputError, match="--resume"), claim(tmp_path / "run", RUN, resume=False):
        pass
    with claim(tmp_path / "run", RUN, resume=True) as folder:
        assert folder.has_run


def test_a_folder_that_is_not_ours_or_has_no_room_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"), only_one(tmp_path / "file" / "lock", "x"):
        pass
    for path in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError), claim(path, RUN, resume=False):
            pass
    with pytest.raises(OutputError, match="no run to resume"), claim(tmp_path / "run", RUN, resume=True):
        pass
    monkeypatch.setattr(output, "NEEDED_BYTES", 2**60)
    with pytest.raises(OutputError, match="no room"), claim(tmp_path / "run", RUN, resume=False):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_two_runs_in_one_second_get_two_names_and_an_empty_one_goes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with numbered(runs, "demo-1") as first, numbered(runs, "demo-1") as second, numbered(runs, "demo-1") as third:
        assert [path.name for path in (first, second, third)] == ["demo-1", "demo-1-2", "demo-1-3"]
        (second / "kept").write_text("")
    assert [path.name for path in runs.iterdir()] == ["demo-1-2"]
    with numbered(tmp_path / "a" / "b", "x"):
        pass
    assert not (tmp_path / "a").exists()


# --- private files


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def open_to_others(root: Path) -> list[str]:
    found = [path for path in (root, *root.rglob("*")) if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    return [f"{path.relative_to(root)} {stat.S_IMODE(path.lstat().st_mode):o}" for path in found]


@pytest.mark.usefixtures("open_umask")
def test_what_a_run_keeps_of_its_participants_is_open_to_nobody_else(tmp_path: Path) -> None:
    from accord_simulations.results import RoundResult
    from accord_simulations.run import _RoundLog

    root = make_private(tmp_path / "work")
    work = WorkFolder(root, root / "features", 2, 0, Runtime(), FaultSpec(), 1.0)
    examples = Examples(("raw text",), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    work.put_records(0, "bank", examples)
    work.note_busy(0, 1.0, 2.0)
    FeatureCache(work.cache).put("x", np.zeros(3))
    store = work.store(0)
    store.keep_plan(PLAN, "{}")
    event = SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=1)
    store.release(PLAN, 1, "m", np.zeros(3, dtype=np.float32), event)
    with store.exclusive():
        pass
    result = RoundResult(1, {}, None, 2, 2, 1, 1, {})
    _RoundLog(root / "rounds.jsonl").add(result, 1.0, 2.0)
    assert {"records", "busy", "features", "sites", "rounds.jsonl"} <= {path.name for path in root.iterdir()}
    assert len(list(root.rglob("*"))) > 10
    assert open_to_others(root) == []


@pytest.mark.usefixtures("open_umask")
def test_secrets_and_logs_of_a_run_are_open_to_nobody_else(tmp_path: Path) -> None:
    from accord_simulations.engine import _flower_log

    with _flower_log(tmp_path / "run.log"):
        pass
    assert stat.S_IMODE((tmp_path / "run.log").stat().st_mode) == 0o600
    (tmp_path / "site").mkdir(mode=0o755)
    SiteStore(tmp_path / "site").keep_plan(PLAN, "{}")
    assert open_to_others(tmp_path / "site") == []
    with open_private(tmp_path / "one", "w") as file:
        file.write("x")
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600


def test_the_cache_of_a_user_without_a_home_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ACCORD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OutputError, match="set ACCORD_CACHE"):
        default_folder()
    monkeypatch.setenv("ACCORD_CACHE", "/x")
    assert default_folder() == Path("/x")


def test_a_private_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot create"):
            make_private(path)
