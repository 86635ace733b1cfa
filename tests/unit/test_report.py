"""The report: whole, offline, escaped, repeatable, and honest about what is not private."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from rich.console import Console

from accord_shared.errors import OutputError
from accord_simulations import report
from accord_simulations.progress import Progress
from accord_simulations.report import _numbers as num
from accord_simulations.report import write_report, write_sweep
from accord_simulations.report._axes import spread, words
from accord_simulations.report._points import panels
from accord_simulations.report._theme import Plot
from accord_simulations.results import (
    Comparison,
    ParticipantResult,
    RoundResult,
    SimulationResult,
    SweepPoint,
    SweepResult,
    few_sites,
)

PLOTS = ("accuracy_by_round", "participants", "epsilon", "costs", "comparisons")
VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use"}
HOSTILE = '<script>alert("x")</script> $\\frac$ & 100 %'


def make_plan(noise: str) -> dict[str, Any]:
    return {
        "version": 1,
        "task": {"labels": ["card_lost", HOSTILE], "unit": "column:customer", "texts": None},
        "adapter": {"depth": "head"},
        "privacy": {"noise": noise, "epsilon": None if noise == "none" else 8.0, "accountant": "rdp"},
        "cohort": {"size": 10, "minimum": 7, "colluders": 2},
        "secure_aggregation": {"mode": "malicious"},
    }


def make_round(number: int, members: int, epsilon: float | None) -> RoundResult:
    return RoundResult(
        round=number,
        metrics={"accuracy": 0.9 - 0.3 / number},
        epsilon=epsilon,
        cohort=members,
        survivors=members - (number == 2),
        upload_bytes=members * 53_240,
        download_bytes=members * 121_000,
        stage_s={"train": 0.8, "aggregate": 0.3, "score": 0.1, "other": 0.02},
        aborted_attempts=int(number == 3),
        trips=3,
    )


def make_participant(number: int, epsilon: float | None) -> ParticipantResult:
    score = {} if number % 17 == 5 else {"accuracy": 0.8 + (number * 37 % 20) / 100}
    alone = {"accuracy": 0.5 + (number * 53 % 20) / 100}
    return ParticipantResult(f"Bank {number}", 300 + number, 5, epsilon, score, epsilon and 4 * epsilon, alone)


def make_result(members: int = 12, rounds: int = 5, noise: str = "cohort", **changes: Any) -> SimulationResult:
    private = noise != "none"
    spent = [8 * number / rounds if private else None for number in range(1, rounds + 1)]
    result = SimulationResult(
        scenario="banking",
        text="Ten banks train one classifier.",
        plan=make_plan(noise),
        plan_hash="sha256:" + "4f" * 32,
        population={"participants": members, "records": 9003, "test_records": 3080, "ceiling": 0.93, "faults": None},
        metric="accuracy",
        metrics={"accuracy": 0.91, "macro_f1": 0.89},
        rounds=tuple(make_round(number, members, spent[number - 1]) for number in range(1, rounds + 1)),
        participants=tuple(make_participant(number, spent[-1] if rounds else None) for number in range(members)),
        comparisons=(
            Comparison("alone", {"accuracy": 0.62}, (0.5, 0.62), 8.0 if private else None, 80.0),
            Comparison("central", {"accuracy": 0.92}, (), 8.0 if private else None, 20.0),
            Comparison("nonprivate", {"accuracy": 0.93}, (0.8, 0.9, 0.93), None, 30.0),
        ),
        epsilon=7.98 if private else None,
        epsilon_all_collude=31.4 if private else None,
        epsilon_target=8.0 if private else None,
        delta=1e-5,
        noise_multiplier=3.2 if private else 0.0,
        trips_per_round=3,
        upload_bytes_per_site_round=53_240,
        download_bytes_per_site_round=121_000,
        aborted_attempts=1,
        seconds=252.3,
        stage_s={"embed": 60.0, "rounds": 81.0, "compare": 95.0},
        peak_rss_bytes=1_240_000_000,
        seed=7,
        versions={"accord": "0.1.0"},
    )
    return replace(result, **changes)


def make_sweep(*extra: SweepPoint) -> SweepResult:
    points = [
        SweepPoint(
            settings={"epsilon": epsilon, "participants": members, "depth": "head", "noise": "cohort"},
            metric="accuracy",
            mean=0.7 + epsilon / 50 + members / 1000,
            std=0.01,
            seeds=3,
            epsilon=epsilon * 0.99,
            seconds=40.0,
            compare={"alone": epsilon / 20, "nonprivate": 0.93},
        )
        for members in (5, 10)
        for epsilon in (0.5, 1.0, 3.0, 8.0)
    ]
    return SweepResult("banking", (*points, *extra), "accuracy", 600.0, {"accord": "0.1.0"})


class Page(HTMLParser):
    """Checks nesting and gathers what a browser would load, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID or (tag in {"path", "use"} and not (self.get_starttag_text() or "").endswith("/>")):
            self.open.append(tag)
        self.scripts += tag == "script"
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data", "srcset"}]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data"}]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"script", "style"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def written(result: SimulationResult, directory: Path) -> Page:
    return Page(write_report(result, directory).read_text(encoding="utf-8"))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose plots are empty, for tests of the words alone."""
    empty = Markup("")
    monkeypatch.setattr(report, "render", lambda name, draw, title: Plot(name, empty, empty, b""))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usual") / "new" / "out"
    assert write_report(make_result(), folder) == folder / "report.html"
    return folder / "report.html"


def test_files_are_whole_and_nothing_else_is_left(usual: Path) -> None:
    path = usual
    names = {"report.html", "report.json", "survivors.png", *(f"{name}.png" for name in PLOTS)}
    assert {one.name for one in path.parent.iterdir()} == names
    for one in path.parent.glob("*.png"):
        assert one.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_page_loads_nothing_and_its_ids_are_unique(usual: Path) -> None:
    text = usual.read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads
    assert all(one.startswith("#") for one in page.loads)
    assert {one[1:] for one in page.loads} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert all(one.startswith("#") for one in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_plots_follow_the_theme(usual: Path) -> None:
    text = usual.read_text(encoding="utf-8")
    assert not re.search(r"#fe01[0-9a-f]{2}", text)
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 2 * (len(PLOTS) + 1)
    assert all("var(--ink)" in one or "var(--muted)" in one for one in figures)
    assert "prefers-color-scheme: dark" in text


def test_headline_numbers_and_the_answer(usual: Path) -> None:
    text = Page(usual.read_text(encoding="utf-8")).text
    assert "12 participants together reach 91.0 % accuracy on 3,080 held-out records" in text
    assert "all records that share one customer" in text
    assert "together with up to 2 colluding participants" in text
    assert "97.8 % of the 93.0 %" in text
    assert "joining is worth +29.0 points" in text
    assert "1.0 points below one model trained on the pooled data" in text
    assert "2.0 points below the same federation without noise" in text
    assert "ε if all others collude 31.4" in text
    assert "not released by the protocol" in text
    assert "NOT private" not in text
    assert "4f4f4f" in text


def test_two_writes_are_identical(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(make_result(40), tmp_path / name)
        write_sweep(make_sweep(), tmp_path / name)
    for one in (tmp_path / "one").iterdir():
        assert one.read_bytes() == (tmp_path / "two" / one.name).read_bytes(), one.name


def test_user_text_is_escaped(tmp_path: Path) -> None:
    base = make_result(3)
    members = (replace(base.participants[0], name=HOSTILE), *base.participants[1:])
    references = (*base.comparisons, Comparison(HOSTILE, {"accuracy": 0.5, HOSTILE: 0.1}, (), None, 1.0))
    stages = tuple(replace(one, stage_s={HOSTILE: 1.0}) for one in base.rounds)
    population = {**base.population, HOSTILE: HOSTILE, "faults": {HOSTILE: [HOSTILE]}}
    result = replace(
        base,
        scenario=HOSTILE,
        text=HOSTILE,
        participants=members,
        comparisons=references,
        rounds=stages,
        population=population,
        stage_s={HOSTILE: 2.0},
        versions={HOSTILE: HOSTILE},
    )
    page = written(result, tmp_path)
    assert page.scripts == 1
    assert HOSTILE in page.text


def test_a_metric_with_markup_is_escaped(tmp_path: Path) -> None:
    base = make_result(3)
    rounds = tuple(replace(one, metrics={HOSTILE: 0.5}) for one in base.rounds)
    page = written(replace(base, metric=HOSTILE, metrics={HOSTILE: 0.6}, rounds=rounds), tmp_path)
    assert page.scripts == 1


def test_a_run_without_noise_says_so(tmp_path: Path) -> None:
    text = written(make_result(noise="none"), tmp_path).text
    assert "This run is NOT private" in text
    assert "without any privacy guarantee" in text
    assert "ε = 7.98" not in text


@pytest.mark.usefixtures("no_plots")
def test_a_run_without_accounting_is_called_not_private(tmp_path: Path) -> None:
    text = written(make_result(epsilon=None), tmp_path).text
    assert "This run is NOT private" in text
    assert "No privacy loss was accounted" in text


@pytest.mark.usefixtures("no_plots")
def test_an_exceeded_budget_and_open_sums_are_warned_of(tmp_path: Path) -> None:
    plan = {**make_plan("cohort"), "secure_aggregation": {"mode": "off"}}
    text = written(make_result(epsilon=8.2, plan=plan), tmp_path).text
    assert "The budget was exceeded" in text
    assert "Secure aggregation was off" in text


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (
            "cohort",
            (
                "Against coordinator, public and 2 colluding participants ε = 7.98",
                "If all other participants collude ε = 31.4",
                "by at most a factor of 2,922",
                "no useful bound",
                "Add, then remove",
                "(7 stay)",
                "for which 3 repetitions are in the budget",
                "In this run 1 update did not arrive.",
                "all add 20 % more variance",
                "It takes 3 participants who tell",
                "only if all 11 others do",
            ),
        ),
        ("site", ("Against everybody ε = 7.98", "It would not help", "the sum of 12 carries 12 times the variance")),
        (
            "participant",
            ("whether it takes part at all", "that a participant took part", "hides a whole participant among 12."),
        ),
    ],
)
def test_a_noise_mode_is_explained(tmp_path: Path, noise: str, words: tuple[str, ...]) -> None:
    plan = {**make_plan(noise), "run": {"max_extra_attempts": 3}}
    text = written(make_result(noise=noise, plan=plan), tmp_path).text.replace("\u00a0", " ")
    for one in words:
        assert one in text


@pytest.mark.usefixtures("no_plots")
def test_the_run_is_counted_beside_the_round(tmp_path: Path) -> None:
    text = written(make_result(), tmp_path).text.replace("\u00a0", " ")
    assert "trips to the coordinator 3 15" in text
    assert "upload 53.2 kB 266 kB" in text
    result = json.loads((tmp_path / "report.json").read_text())
    assert (result["trips_per_run"], result["upload_bytes_per_site_run"]) == (15, 266_200)


def test_few_participants_are_warned_of_only_where_they_are_the_unit() -> None:
    assert few_sites("participant", 99)
    assert few_sites("participant", 100) is None
    assert few_sites("cohort", 10) is None


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    result = make_result(
        0,
        0,
        comparisons=(Comparison("alone", {}, (), None, math.nan),),
        metrics={"accuracy": math.nan},
        population={},
        plan={},
        text="",
        epsilon_all_collude=None,
        epsilon_target=None,
        stage_s={},
        versions={},
        aborted_attempts=0,
        peak_rss_bytes=0,
    )
    text = written(result, tmp_path).text
    assert "nan" not in text.lower().split()
    assert "None" not in text.split()
    assert "was not scored" in text
    assert json.loads((tmp_path / "report.json").read_text())["metrics"] == {"accuracy": None}


def test_rounds_without_scores_or_epsilon(tmp_path: Path) -> None:
    base = make_result(2)
    rounds = tuple(replace(one, metrics={}, epsilon=None, stage_s={}) for one in base.rounds)
    members = tuple(replace(one, metrics={}, alone=None, epsilon=None) for one in base.participants)
    text = written(replace(base, rounds=rounds, participants=members), tmp_path).text
    assert "no round was scored" in text
    assert "no participant was scored" in text


@pytest.mark.parametrize(("members", "rounds"), [(1, 1), (2, 3), (300, 130)])
def test_small_and_large_runs(tmp_path: Path, members: int, rounds: int) -> None:
    path = write_report(make_result(members, rounds), tmp_path)
    page = Page(path.read_text(encoding="utf-8"))
    assert f"All {members} participants" in page.text
    figures = re.findall(r'aria-label="accuracy by participant">(.*?)</svg>', path.read_text(), flags=re.DOTALL)
    assert ("Bank 1" in figures[0]) == (members == 2)
    assert ("median" in figures[0]) == (members == 300)
    assert path.stat().st_size < 1_000_000


def test_json_is_the_result(usual: Path) -> None:
    text = usual.with_name("report.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(make_result().to_json()))
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError):
        write_report(make_result(2, 2), tmp_path / "out")


def test_sweep_page(tmp_path: Path) -> None:
    path = write_sweep(make_sweep(), tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {
        "sweep.html",
        "sweep.json",
        "frontier.png",
        "by_participants.png",
    }
    page = Page(path.read_text(encoding="utf-8"))
    assert all(one.startswith("#") for one in page.loads)
    assert "5 participants" in page.text
    assert "72.0 % ± 1.0 at ε = 0.5 and 87.0 % ± 1.0 at ε = 8" in page.text
    assert "NOT private" not in page.text
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(make_sweep().to_json()))


@pytest.mark.usefixtures("no_plots")
def test_sweep_with_points_without_noise(tmp_path: Path) -> None:
    bare = SweepPoint({"noise": "none", "epsilon": None}, "accuracy", 0.93, 0.0, 1, None, 9.0, {})
    text = Page(write_sweep(make_sweep(bare), tmp_path).read_text(encoding="utf-8")).text
    assert "Some points are NOT private" in text


def mode_point(noise: str, epsilon: float | None, members: int = 10, dropout: float = 0.0) -> SweepPoint:
    """A point of a sweep over noise modes: cohort noise costs less, and its ε is larger if all others collude."""
    private = epsilon is not None
    mean = {"site": 0.7, "cohort": 0.8, "participant": 0.4, "none": 0.93}[noise] + (epsilon or 0.0) / 100
    return SweepPoint(
        settings={"epsilon": epsilon, "noise": noise, "participants": members, "dropout": dropout},
        metric="accuracy",
        mean=mean - members / 10_000,
        std=0.01,
        seeds=2,
        epsilon=epsilon,
        seconds=20.0,
        compare={"alone": 0.3, "central": 0.85},
        epsilon_all_collude=epsilon * (3.25 if noise == "cohort" else 1.0) if private else None,
        rounds=10,
        trips_per_round=3,
        trips_per_run=32,
        upload_bytes_per_site_round=53_240,
        upload_bytes_per_site_run=532_400,
    )


def mode_sweep(*points: SweepPoint) -> SweepResult:
    return SweepResult("banking", points, "accuracy", 600.0)


def test_noise_modes_are_lines_of_their_own(tmp_path: Path) -> None:
    modes = [mode_point(noise, epsilon) for noise in ("cohort", "site") for epsilon in (1.0, 8.0)]
    page = write_sweep(mode_sweep(*modes, mode_point("none", None)), tmp_path).read_text(encoding="utf-8")
    text = Page(page).text
    assert (
        "At ε = 1, site noise reaches 70.9 % ± 1.0 and cohort noise reaches 80.9 % ± 1.0. "
        "At ε = 8, site noise reaches 77.9 % ± 1.0 and cohort noise reaches 87.9 % ± 1.0. "
        "Without any privacy it is 92.9 % ± 1.0." in text.replace("\u00a0", " ")
    )
    assert "8 8.00 26.0 cohort" in text
    assert "32 532 kB" in text.replace("\u00a0", " ")
    assert "Some points are NOT private" in text
    frontier = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)[0]
    for label in ("site noise", "cohort noise", "not private", "alone, same ε", "pooled data, same ε"):
        assert frontier.count(f">{label}") == 1


@pytest.mark.usefixtures("no_plots")
def test_what_modes_protect_is_beside_their_numbers(tmp_path: Path) -> None:
    points = [mode_point(noise, 1.0, members) for noise in ("site", "participant") for members in (5, 20)]
    text = Page(write_sweep(mode_sweep(*points), tmp_path).read_text(encoding="utf-8")).text
    assert "a whole participant with all its records" in text
    assert "everybody, even all other participants together" in text
    assert text.count("hides a whole participant among 5.") == 1


def test_axes_beside_epsilon_get_a_plot(tmp_path: Path) -> None:
    points = [
        mode_point(noise, epsilon, members, dropout)
        for noise, epsilon in (("site", 1.0), ("site", 8.0), ("cohort", 1.0), ("cohort", 8.0), ("none", None))
        for members in (5, 50)
        for dropout in (0.0, 0.3)
    ]
    write_sweep(mode_sweep(*points), tmp_path)
    assert {one.name for one in tmp_path.glob("*.png")} == {"frontier.png", "by_participants.png", "by_dropout.png"}


def test_panels_hold_one_line_for_each_mode() -> None:
    points = [
        *(
            mode_point(noise, epsilon, members)
            for noise in ("cohort", "site")
            for epsilon in (1, 8)
            for members in (5, 9)
        ),
        *(mode_point("none", None, members) for members in (5, 9)),
    ]
    over_epsilon, over_members = panels(points, "epsilon"), panels(points, "participants")
    assert [panel.title for panel in over_epsilon] == ["5 participants", "9 participants"]
    assert [[line.mode for line in panel.lines] for panel in over_epsilon] == [["site", "cohort"]] * 2
    assert [len(panel.unprotected) for panel in over_epsilon] == [1, 1]
    assert [panel.title.replace("\u00a0", " ") for panel in over_members] == ["ε = 1", "ε = 8"]
    assert [[line.mode for line in panel.lines] for panel in over_members] == [["site", "cohort", "none"]] * 2
    assert all(len(line.points) == 2 for panel in over_members for line in panel.lines)


def test_with_one_mode_all_lines_share_a_panel() -> None:
    points = [mode_point("site", epsilon, members) for epsilon in (1.0, 8.0) for members in (5, 9)]
    (panel,) = panels([*points, mode_point("none", None, 5)], "participants")
    assert [line.label.replace("\u00a0", " ") for line in panel.lines] == ["ε = 1", "ε = 8", "not private"]


@pytest.mark.usefixtures("no_plots")
def test_more_panels_than_are_drawn_are_said(tmp_path: Path) -> None:
    points = [mode_point(noise, 1.0, members) for noise in ("site", "cohort") for members in range(2, 10)]
    text = Page(write_sweep(mode_sweep(*points), tmp_path).read_text(encoding="utf-8")).text
    assert "The first 6 of 8 combinations are drawn; the table has all." in text


@pytest.mark.parametrize("points", [(), (SweepPoint({}, "accuracy", math.nan, math.nan, 0, None, 0.0),)])
def test_sweep_with_nothing_to_draw(tmp_path: Path, points: tuple[SweepPoint, ...]) -> None:
    text = Page(write_sweep(SweepResult("s", points, "accuracy", 0.0), tmp_path).read_text(encoding="utf-8")).text
    assert "no frontier to draw" in text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (num.epsilon(7.981), "7.99"),
        (num.epsilon(8.0), "8.00"),
        (num.epsilon(31.42), "31.5"),
        (num.epsilon(0.99999), "1.00"),
        (num.epsilon(99.96), "100"),
        (num.epsilon(1000.0), "1,000"),
        (num.epsilon(0.01234), "0.0124"),
        (num.epsilon(math.inf), "∞"),
        (num.epsilon(0.0), "0.00"),
        (num.epsilon(None), "–"),
        (num.budget(0.5), "0.5"),
        (num.small(1e-5), "1e−5"),
        (num.score(0.91), "91.0 %"),
        (num.score(1.23456, "loss"), "1.235"),
        (num.difference(-0.0001), "0.0 points"),
        (num.difference(-0.012), "−1.2 points"),
        (num.size(999), "999 B"),
        (num.size(53_240), "53.2 kB"),
        (num.size(999_960), "1.0 MB"),
        (num.duration(0.4), "0.4 s"),
        (num.duration(59.7), "1 min 00 s"),
        (num.duration(7500), "2 h 05 min"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown.replace("\u00a0", " ") == expected


def test_labels_are_kept_apart_and_centred() -> None:
    assert spread([0.0, 5.0], 1.0) == [0.0, 5.0]
    assert spread([1.0, 1.0, 1.0], 1.0) == [0.0, 1.0, 2.0]
    assert spread([], 1.0) == []


def test_long_names_keep_both_ends() -> None:
    assert words("Savings Bank of the Northern Isles 12", 20) == "Savings Bank o…es 12"
    assert words("a\nb") == "a b"


def make_progress(console: Console, **changes: Any) -> Progress:
    ticks = iter(range(10_000))
    return Progress("accuracy", 8.0, console=console, clock=lambda: float(next(ticks)), **changes)


def run_rounds(progress: Progress, rounds: int, first: int = 1) -> None:
    with progress:
        progress.stage("[red]embed", total=3)
        progress.advance(2)
        progress.stage("rounds", total=rounds)
        for number in range(first, rounds + 1):
            progress.round(make_round(number, 10, 8 * number / rounds), rounds)
        progress.note("[bold]report written")
    progress.close()


def test_plain_progress_is_a_line_per_tenth() -> None:
    stream = io.StringIO()
    run_rounds(make_progress(Console(file=stream, force_terminal=False, width=200)), 200)
    lines = stream.getvalue().splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    assert 10 <= len(rounds) <= 12
    assert rounds[-1].startswith("round 200/200  accuracy 89.9 %  ε 8.00 of 8.00  106.5 MB up")
    assert "left" in rounds[3]
    assert {"[red]embed", "[bold]report written"} <= set(lines)


def test_live_progress_shows_the_round() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, force_interactive=True, width=160, color_system=None)
    run_rounds(make_progress(console), 4, first=3)
    assert "4/4" in stream.getvalue()
    assert "ε 8.00 of 8.00" in stream.getvalue()
    assert "[bold]report written" in stream.getvalue()


def test_disabled_progress_is_silent() -> None:
    stream = io.StringIO()
    run_rounds(make_progress(Console(file=stream, force_terminal=True), enabled=False), 3)
    assert stream.getvalue() == ""


def test_progress_of_a_run_without_noise() -> None:
    stream = io.StringIO()
    with make_progress(Console(file=stream, force_terminal=False, width=200)) as progress:
        progress.round(replace(make_round(1, 10, None), metrics={}), 1)
    assert "NOT private" in stream.getvalue()
