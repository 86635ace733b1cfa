"""What a person at a terminal sees while a simulation runs; a log file gets a few plain lines.

Everything goes to stderr, so that stdout stays free for `--json`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from accord_simulations.results import RoundResult

PLAIN_LINES = 10  # lines for all rounds together where stderr is no terminal


class Progress:
    """Live progress of one run: `with Progress(metric=…, epsilon_target=…) as progress: …`.

    On a terminal it is a live line per stage and round; elsewhere about one line per tenth of the
    rounds. Rounds count from 1. Labels are shown as they are, never read as markup.
    """

    def __init__(
        self,
        metric: str,
        epsilon_target: float | None,
        enabled: bool = True,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metric = metric
        self._target = epsilon_target
        self._enabled = enabled
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._begin = clock()
        self._pace: tuple[float, int] | None = None
        self._upload = 0
        self._tenth = -1
        self._stages: set[str] = set()
        self._task: TaskID | None = None
        self._bars = self._make_bars() if enabled and self._console.is_interactive else None

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a stage; the one before is done. `total` is the number of `advance` steps, if known."""
        self._pace = None
        if self._bars is not None:
            self._finish_task()
            self._task = self._bars.add_task(name, total=total, detail=Text(""))
        elif name not in self._stages:
            self._print(Text(name))
        self._stages.add(name)

    def advance(self, n: int = 1) -> None:
        """Count `n` steps of the current stage."""
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, n)

    def round(self, result: RoundResult, total_rounds: int) -> None:
        """Show a finished round: score, privacy loss, bytes, elapsed time and time left."""
        now = self._clock()
        self._upload += result.upload_bytes
        left = self._time_left(now, result.round, total_rounds)
        if self._bars is not None:
            self._show_round(result, total_rounds, left)
            return
        tenth = result.round * PLAIN_LINES // max(total_rounds, 1)
        if tenth != self._tenth or result.round == total_rounds:
            self._tenth = tenth
            self._print(Text(f"round {result.round}/{total_rounds}  {self._line(result, left)}"))

    def note(self, text: str) -> None:
        """Print one line that stays."""
        self._print(Text(text))

    def close(self) -> None:
        """Stop the display; calling it twice does no harm."""
        if self._bars is not None:
            self._finish_task()
            self._bars.stop()
            self._bars = None

    def _make_bars(self) -> Bars:
        """The live display."""
        return Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
        )

    def _show_round(self, result: RoundResult, total: int, left: float | None) -> None:
        """Move the bar of the rounds, which any current stage becomes."""
        if self._bars is None:
            return
        if self._task is None:
            self._task = self._bars.add_task("rounds", total=total, detail=Text(""))
        self._bars.update(self._task, total=total, completed=result.round, detail=self._line(result, left))

    def _finish_task(self) -> None:
        """Leave the current stage full, whatever its total was."""
        if self._bars is None or self._task is None:
            return
        task = next(one for one in self._bars.tasks if one.id == self._task)
        done = task.completed if task.total is None else task.total
        self._bars.update(self._task, total=done or 1, completed=done or 1)
        self._bars.stop_task(self._task)
        self._task = None

    def _line(self, result: RoundResult, left: float | None) -> str:
        """`accuracy 83.1 %  ε 2.41 of 5.00  1.2 MB up  0:48 elapsed  1:52 left`."""
        parts = [self._score(result), self._privacy(result), f"{decimal(self._upload)} up"]
        parts.append(f"{_clock_time(self._clock() - self._begin)} elapsed")
        if left is not None:
            parts.append(f"{_clock_time(left)} left")
        if result.survivors < result.cohort:
            parts.append(f"{result.survivors} of {result.cohort} survived")
        return "  ".join(part for part in parts if part)

    def _score(self, result: RoundResult) -> str:
        """The main metric, where this round was scored."""
        value = result.metrics.get(self._metric)
        if value is None or not math.isfinite(value):
            return ""
        shown = f"{value:.4f}" if "loss" in self._metric else f"{100 * value:.1f} %"
        return f"{self._metric} {shown}"

    def _privacy(self, result: RoundResult) -> str:
        """The privacy loss of its target; without one it says so."""
        if result.epsilon is None:
            return "NOT private"
        spent = f"ε {_upward(result.epsilon)}"
        return spent if self._target is None else f"{spent} of {_upward(self._target)}"

    def _time_left(self, now: float, number: int, total: int) -> float | None:
        """Remaining rounds at the pace of this stage; a resumed run does not count the rounds before."""
        if self._pace is None:
            self._pace = (now, number)
            return None
        start, first = self._pace
        done = number - first
        return (now - start) / done * (total - number) if done > 0 else None

    def _print(self, text: Text) -> None:
        if self._enabled:
            console = self._bars.console if self._bars is not None else self._console
            console.print(text, soft_wrap=True)


def _upward(value: float) -> str:
    """A privacy loss with two decimals, never shown below what it is."""
    return f"{math.ceil(100 * value - 1e-6) / 100:.2f}" if math.isfinite(value) else "∞"


def _clock_time(seconds: float) -> str:
    """`0:48`, `12:05` or `1:02:09`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes = f"{rest // 60:02d}" if hours else f"{rest // 60}"
    return f"{hours}:{minutes}:{rest % 60:02d}" if hours else f"{minutes}:{rest % 60:02d}"
