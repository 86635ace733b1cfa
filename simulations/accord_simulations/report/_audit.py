"""What the pages of the privacy audits show: the verdict in words, the numbers, one plot each."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from accord_simulations.audit.canaries import CanaryAudit
from accord_simulations.audit.inversion import Attack, InversionAudit
from accord_simulations.audit.one_run import Coins, Scores
from accord_simulations.report import _numbers as num
from accord_simulations.report._axes import canvas, legend
from accord_simulations.report._theme import Palette
from accord_simulations.report._view import Card

_BINS = 60
_EQUALS = f"{num.JOIN}={num.JOIN}"
_VIEWS = {
    "cohort": "the sum of every round that secure aggregation opens",
    "site": "every single update of every site",
}


def canaries_view(result: CanaryAudit) -> dict[str, Any]:
    """The page of a canary audit."""
    claim = f"ε{_EQUALS}{num.budget(result.epsilon_claimed)} at δ{_EQUALS}{num.small(result.delta)}"
    verdict = "That refutes the claim." if result.refuted else "The claim stands."
    story = (
        f"{result.canaries:,} records with known, near-orthogonal gradients at the clip norm were each put into the "
        f"run by a fair coin. An attacker who knows all other records and sees {_VIEWS[result.noise]} guessed "
        f"{result.guesses:,} of the coins and was right {result.correct:,} times. So ε is at least "
        f"{_down(result.epsilon_lower_bound)} with {100 * result.confidence:.0f}{num.JOIN}% confidence; the run "
        f"claims {claim}. {verdict}"
    )
    warning = "The run leaks more than it claims: its noise, clipping or accounting is broken."
    return {
        "kind": "canary audit",
        "title": result.scenario,
        "facts": [
            ("participants", num.count(result.participants)),
            ("rounds", num.count(result.rounds)),
            ("noise", result.noise),
            ("secure aggregation", result.secure_aggregation.replace("_", " ")),
            ("seed", str(result.seed)),
            ("wall time", num.duration(result.seconds)),
        ],
        "warnings": [("Claim refuted", warning)] if result.refuted else [],
        "story": story,
        "cards": [
            Card(
                "Claimed ε", num.budget(result.epsilon_claimed), f"{num.epsilon(result.epsilon_spent)} spent", "joint"
            ),
            Card("Lower bound", _down(result.epsilon_lower_bound), "one-run audit (Steinke et al. 2023)"),
            Card("AUC", f"{result.auc:.3f}", "membership inference; 0.5 is a coin"),
            Card("Found at 1 % false alarms", num.score(result.tpr_at_1pct_fpr), "true positive rate"),
        ],
        "about": "Scores of all canaries: the inner product of what was released with each canary's clipped gradient, "
        "over all rounds. The attacker guesses the outermost ones; how many was fixed before any score was seen.",
        "rows": [
            ("canaries", f"{result.canaries:,}, of which {result.members:,} in the run"),
            ("guesses, right", f"{result.guesses:,}, {result.correct:,}"),
            ("spare classes for canaries", num.count(result.spare_classes)),
            ("tests of noise and sampling", _tests(result)),
            ("accuracy of the model, canaries and all", num.score(result.accuracy)),
            ("ε if all other participants collude", num.epsilon(result.epsilon_all_collude)),
        ],
    }


def _down(bound: float) -> str:
    """Three digits, rounded down: a lower bound is never overstated."""
    return f"{np.floor(bound * 1000.0) / 1000.0:.3f}"


def scores(values: Scores, members: Coins, guesses: int, ink: Palette, width: float) -> Figure:
    """Two histograms, in and out, and where guessing begins."""
    figure, axes = canvas(ink, width, 3.0)
    bins = np.linspace(float(values.min()), float(values.max()), _BINS + 1).tolist()
    for name, chosen, colour in (("not in the run", ~members, ink.reference), ("in the run", members, ink.joint)):
        axes.hist(values[chosen], bins, histtype="step", color=colour, linewidth=1.6, label=name)
    ordered = np.sort(values)
    for place in (ordered[guesses // 2 - 1], ordered[-(guesses // 2)]):
        axes.axvline(float(place), color=ink.muted, linewidth=1.0, linestyle=(0, (1, 2)))
    axes.set_xlabel("score (dotted: guesses begin)")
    axes.set_ylabel("canaries")
    legend(axes, ink, 2)
    return figure


def inversion_view(result: InversionAudit) -> dict[str, Any]:
    """The page of an inversion audit."""
    first, last = min(result.private), max(result.private)
    story = (
        f"From a bare update of one record the attack names the right one of {result.candidates:,} candidates in "
        f"{num.score(result.bare[first].inversion.rate)} of the trials, of {last} records in "
        f"{num.score(result.bare[last].inversion.rate)}. On the private sum at ε{_EQUALS}"
        f"{num.budget(result.epsilon_claimed)} it does so in {_percent(result.private[first].inversion.rate)} and "
        f"{_percent(result.private[last].inversion.rate)}; guessing would in {_percent(1.0 / result.candidates)}."
    )
    return {
        "kind": "inversion audit",
        "title": result.scenario,
        "facts": [
            ("participants", num.count(result.participants)),
            ("noise", result.noise),
            ("secure aggregation", result.secure_aggregation.replace("_", " ")),
            ("candidates", num.count(result.candidates)),
            ("seed", str(result.seed)),
            ("wall time", num.duration(result.seconds)),
        ],
        "warnings": [],
        "story": story,
        "cards": [
            Card(f"{name}, batch of {size}", _percent(attack.inversion.rate), _interval(attack), tone)
            for name, attacks, tone in (("Bare update", result.bare, ""), ("Private sum", result.private, "joint"))
            for size, attack in attacks.items()
        ],
        "about": "How often the right candidate comes first, with 95 % confidence intervals. The attacker of the "
        "private sum knows the records of all other sites.",
        "rows": [
            *(
                (f"{name}, batch of {size}: feature recovered", num.score(attack.reconstruction))
                for name, attacks in (("bare update", result.bare), ("private sum", result.private))
                for size, attack in attacks.items()
            ),
            *(
                (f"private sum, batch of {size}: by likelihood", _percent(attack.likelihood.rate))
                for size, attack in result.private.items()
            ),
            ("calculated: best attack on one sum", _percent(result.ideal_one_sum)),
            ("calculated: best attack on all sums of the run", _percent(result.ideal_whole_run)),
        ],
    }


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}{num.JOIN}%"


def _interval(attack: Attack) -> str:
    low, high = attack.inversion.interval
    return f"{_percent(low)} to {_percent(high)}, {attack.inversion.trials:,} trials"


def retrieval(result: InversionAudit, ink: Palette, width: float) -> Figure:
    """Rates with their intervals, on a logarithmic axis down to chance."""
    figure, axes = canvas(ink, width, 2.2, grid="x")
    rows = [
        (f"{name}, batch of {size}", attack, colour)
        for name, attacks, colour in (("bare", result.bare, ink.alone), ("private", result.private, ink.joint))
        for size, attack in attacks.items()
    ]
    chance = 1.0 / result.candidates
    floor = chance / 20.0
    for place, (_, attack, colour) in enumerate(rows):
        low, high = (max(edge, floor) for edge in attack.inversion.interval)
        axes.plot([low, high], [place, place], color=colour, linewidth=2.0)
        axes.plot([max(attack.inversion.rate, floor)], [place], color=colour, marker="o", markersize=5)
    axes.axvline(chance, color=ink.muted, linewidth=1.0, linestyle=(0, (1, 2)), label="chance")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(floor, 1.3)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("the right candidate comes first")
    legend(axes, ink, 1)
    return figure


def _tests(result: CanaryAudit) -> str:
    """What the tests of the mechanism say."""
    if not result.checks:
        return "none"
    return f"failed: {', '.join(result.failed)}" if result.failed else f"all {len(result.checks)} passed"
