"""Events in, epsilon out. An upper bound always; an unknown event is refused, never guessed.

- `pld`: privacy loss distributions, pessimistic discretisation (Koskela et al. 2020; Doroshenko et al.
  2022), by `dp-accounting`.
- `prv`: privacy random variables with their stated error bound (Gopi, Lee, Wutschitz 2021), by Opacus.
- `rdp`: Rényi divergences (Mironov 2017; Mironov, Talwar, Zhang 2019), by `dp-accounting`.

Unsampled Gaussians compose exactly: T steps at σ are one step at σ/√T (Dong, Roth, Su 2022, Cor. 3.3),
which spares the discretisation and its pessimism.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache
from typing import Any

from accord_shared.dp.events import Event, SampledGaussian, SharedGaussian, merge
from accord_shared.errors import MissingExtra, PlanError, UnknownMechanism
from accord_shared.exact import written
from accord_shared.plan import Plan

MIN_SIGMA, MAX_SIGMA = 0.2, 1e6
"""Noise multipliers outside are no mechanism that anybody should run: refused as a plan error."""


SLACK = 2.0**-60
"""What one release under shared noise adds to δ: its rounding is unlucky with that probability."""
VARIATION = 2.0**-80
"""How far all samples of one release are together from their distribution at most (`NoiseShares.is_precise`)."""
_MOST_CORRECTIONS = 50


def epsilon(events: Sequence[Event], delta: float, accountant: str = "pld", *, colluding: bool = False) -> float:
    """The smallest proven ε such that the composition of `events` is (ε, `delta`)-DP; infinite where there is none.

    Against the coordinator and the public; with `colluding`, if all other participants collude with them.

    Raises:
        UnknownMechanism: an event or accountant that has no proof here.
        MissingExtra: `prv` without Opacus.
    """
    merged = merge(events)
    gaussians = _collapse(merge(_gaussian(event, colluding=colluding) for event in merged))
    shared = [event for event in merged if isinstance(event, SharedGaussian)]
    left = delta - sum(event.slack * event.steps for event in shared)
    if not gaussians:
        return 0.0
    if not shared:
        return _epsilon(gaussians, delta, accountant)
    return _with_variation(gaussians, left, accountant, sum(event.steps for event in shared) * VARIATION)


def _with_variation(events: tuple[SampledGaussian, ...], delta: float, accountant: str, variation: float) -> float:
    """ε where all samples together are `variation` off their distribution, which costs `variation`·(1 + e^ε) of δ.

    The larger ε, the more: the least solution is found from below, and where there is none ε is infinite.
    """
    found = 0.0
    for _ in range(_MOST_CORRECTIONS):
        left = delta - variation * (1.0 + math.exp(min(found, 700.0)))
        if left <= 0.0:
            return math.inf
        before, found = found, _epsilon(events, left, accountant)
        if found <= before * (1.0 + 1e-9):
            return found
    return math.inf


def epsilon_at_two_sites(events: Sequence[Event], delta: float) -> float:
    """As `epsilon`, for a unit whose records lie at two sites, both of which did `events`; by loss distributions.

    Of noise that is each site's own the unit is in two releases that compose. Of a sum with shared noise it is in one,
    twice: each site samples it by a coin of its own, so a step moves the sum by 0, C or 2·C; the pair that dominates
    is a mixture of Gaussians (Choquette-Choo, Ganesh, Steinke, Thakurta 2024, "Privacy amplification for matrix
    mechanisms", Lemma 4.5). Without sampling that is the Gaussian of half the noise multiplier.
    """
    merged = merge(events)
    own = tuple(replace(event, steps=2 * event.steps) for event in merged if isinstance(event, SampledGaussian))
    shared = tuple(event for event in merged if isinstance(event, SharedGaussian))
    if not shared:
        return epsilon(own, delta)
    variation = sum(event.steps for event in shared) * VARIATION
    found = 0.0
    for _ in range(_MOST_CORRECTIONS):  # as in `_with_variation`; the coins of both sites must not fail
        left = delta - sum(2 * event.slack * event.steps for event in shared)
        left -= variation * (1.0 + math.exp(min(found, 700.0)))
        if left <= 0.0:
            return math.inf
        before, found = found, _mixture_epsilon(own, shared, left)
        if found <= before * (1.0 + 1e-9):
            return found
    return math.inf


@lru_cache(maxsize=256)
def _mixture_epsilon(own: tuple[SampledGaussian, ...], shared: tuple[SharedGaussian, ...], delta: float) -> float:
    halved = [_halved(event) for event in shared]
    if all(event is not None for event in halved):
        return _epsilon(_collapse([*own, *(event for event in halved if event is not None)]), delta, "pld")
    events: tuple[Event, ...] = (*own, *shared)
    grid = _MIXTURE_GRIDS[min(event.noise_multiplier for event in events) >= _MUCH_NOISE]
    total: Any = None
    for event in events:
        make = _mixture_pld if isinstance(event, SharedGaussian) else _gaussian_pld
        one = make(event.noise_multiplier, event.sampling_rate, grid).self_compose(event.steps)
        total = one if total is None else total.compose(one)
    return float(total.get_epsilon_for_delta(delta))


_MIXTURE_GRIDS, _MUCH_NOISE = (1e-2, 2e-3), 3.0
"""Privacy-loss grids of mixtures, which take a root for each of their points; coarse where the losses reach far. They
overstate ε by up to 0.3 percent."""


def _halved(event: SharedGaussian) -> SampledGaussian | None:
    """What the sum's noise is against twice the sensitivity, where nothing is sampled or it hardly helps."""
    if event.sampling_rate < 1.0 and event.noise_multiplier >= 2.0 * MIN_SIGMA:
        return None
    return SampledGaussian(event.noise_multiplier / 2.0, 1.0, event.steps)


def _mixture_pld(sigma: float, rate: float, grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415

    odds = [(1.0 - rate) ** 2, 2.0 * rate * (1.0 - rate), rate**2]
    return privacy_loss_distribution.from_mixture_gaussian_mechanism(
        sigma, [0.0, 1.0, 2.0], odds, value_discretization_interval=grid
    )


def _gaussian(event: Event, *, colluding: bool) -> SampledGaussian:
    """The sampled Gaussian that an event is to whoever looks.

    With so little noise that sampling hardly helps, as if it did not: the loss distribution would take gigabytes.
    """
    sigma = event.noise_multiplier
    if colluding and isinstance(event, SharedGaussian):
        sigma = event.own_noise_multiplier
    return SampledGaussian(sigma, event.sampling_rate if sigma >= MIN_SIGMA else 1.0, event.steps)


def _collapse(events: Sequence[Event]) -> tuple[SampledGaussian, ...]:
    """All unsampled Gaussians as one."""
    gaussians = [event for event in events if isinstance(event, SampledGaussian)]
    full = [event for event in gaussians if event.sampling_rate == 1.0]
    if not full:
        return tuple(gaussians)
    precision = sum(event.steps / event.noise_multiplier**2 for event in full)
    one = SampledGaussian(noise_multiplier=precision**-0.5, sampling_rate=1.0, steps=1)
    return (*[event for event in gaussians if event.sampling_rate < 1.0], one)


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[SampledGaussian, ...], delta: float, accountant: str) -> float:
    compute = _ACCOUNTANTS.get(accountant)
    if compute is None:
        raise UnknownMechanism(f"unknown accountant {accountant!r}")
    try:
        found = compute(events, delta)
    except (ArithmeticError, ValueError):
        found = math.nan
    if math.isnan(found):
        raise UnknownMechanism(f"accountant {accountant!r} cannot tell what {events[0]} costs at delta = {delta:g}")
    return found


PLD_GRID, COARSE_PLD_GRID = 1e-4, 1e-3
"""Privacy-loss grids: of what is reported, and ten times faster for searching. Both only ever overstate."""


def _pld(events: tuple[SampledGaussian, ...], delta: float, grid: float = PLD_GRID) -> float:
    if len(events) == 1 and events[0].sampling_rate == 1.0:
        return gaussian_epsilon(events[0].noise_multiplier, delta)
    total: Any = None
    for event in events:
        one = _gaussian_pld(event.noise_multiplier, event.sampling_rate, grid).self_compose(event.steps)
        total = one if total is None else total.compose(one)
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _gaussian_pld(sigma: float, sampling_rate: float, grid: float) -> Any:
    """The loss distribution of one step: most of an accountant's work, and the same for every number of steps."""
    from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=sampling_rate, value_discretization_interval=grid
    )


def _rdp(events: tuple[SampledGaussian, ...], delta: float) -> float:
    import dp_accounting  # noqa: PLC0415
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415

    tool = RdpAccountant()
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
        tool.compose(gaussian if event.sampling_rate == 1.0 else sampled, event.steps)
    with _quiet():
        return float(tool.get_epsilon(delta))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that the best Rényi order is an end of their range: the bound is loose then, not wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        yield


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """ε of one Gaussian of multiplier `sigma` at `delta`, exact (Balle and Wang 2018, Theorem 8)."""
    from scipy.optimize import brentq  # noqa: PLC0415
    from scipy.special import log_ndtr  # noqa: PLC0415

    def excess(eps: float) -> float:
        upper = log_ndtr(0.5 / sigma - eps * sigma)
        lower = eps + log_ndtr(-0.5 / sigma - eps * sigma)
        return float(upper + math.log(-math.expm1(min(lower - upper, -1e-300))) - math.log(delta))

    if excess(0.0) <= 0.0:
        return 0.0
    high = 1.0
    while excess(high) > 0.0:
        high *= 2.0
    return float(brentq(excess, 0.0, high, xtol=1e-12, rtol=1e-12)) * (1 + 1e-9)


def _prv(events: tuple[SampledGaussian, ...], delta: float) -> float:
    try:
        from opacus.accountants import PRVAccountant  # noqa: PLC0415
    except ImportError:
        raise MissingExtra('accountant "prv" needs Opacus: install the extra [client]') from None
    if len(events) == 1 and events[0].sampling_rate == 1.0:
        return gaussian_epsilon(events[0].noise_multiplier, delta)  # Opacus takes log(1 - q)
    tool = PRVAccountant()
    tool.history = [(event.noise_multiplier, event.sampling_rate, event.steps) for event in events]
    with _quiet():
        return float(tool.get_epsilon(delta=delta))


_ACCOUNTANTS: dict[str, Callable[[tuple[SampledGaussian, ...], float], float]] = {
    "pld": _pld,
    "pld-coarse": lambda events, delta: _pld(events, delta, COARSE_PLD_GRID),
    "prv": _prv,
    "rdp": _rdp,
}


@lru_cache(maxsize=256)
def calibrate(target: float, delta: float, sampling_rate: float, steps: int, accountant: str = "pld") -> float:
    """The least noise multiplier of four digits, at least `MIN_SIGMA`, whose `steps` cost at most `target` ε.

    Four significant digits, not more: parties compute it themselves, and must agree on it to the byte (PROTOCOL.md,
    section 11).

    Raises:
        PlanError: no sensible noise reaches the target: too small to train at all.
    """

    def exact(sigma: float) -> float:
        return epsilon([SampledGaussian(sigma, sampling_rate, steps)], delta, accountant)

    def coarse(sigma: float) -> float:
        return epsilon([SampledGaussian(sigma, sampling_rate, steps)], delta, "pld-coarse")

    if exact(MAX_SIGMA) > target:
        raise PlanError(f"privacy.epsilon = {target:g} is too small to train at all at delta = {delta:g}")
    near = MIN_SIGMA
    if accountant == "pld" and sampling_rate < 1.0:
        near = max(MIN_SIGMA, 0.98 * _root(coarse, target, MIN_SIGMA, 2.0))
    return _least(exact, target, _root(exact, target, near, 1.02 if near > MIN_SIGMA else 2.0))


def _root(cost: Callable[[float], float], target: float, low: float, factor: float) -> float:
    """About the smallest σ with `cost` ≤ `target`, searched from `low` in steps of `factor`."""
    from scipy.optimize import brentq  # noqa: PLC0415

    while cost(low) <= target:
        if low <= MIN_SIGMA:
            return MIN_SIGMA
        low = max(MIN_SIGMA, low / factor)
    high = low * factor
    while cost(high) > target:
        low, high = high, high * factor

    def excess(log_sigma: float) -> float:
        return math.log(min(max(cost(math.exp(log_sigma)) / target, 1e-9), 1e9))  # ε falls to 0 where δ alone suffices

    return math.exp(brentq(excess, math.log(low), math.log(high), xtol=1e-4))


_GRID = Context(prec=4, rounding=ROUND_CEILING)


def _least(cost: Callable[[float], float], target: float, near: float) -> float:
    """The least σ of four digits with `cost` ≤ `target`, from `near` it."""
    sigma = max(_GRID.plus(Decimal(near)), written(MIN_SIGMA))
    while cost(float(sigma)) > target:
        sigma = _GRID.next_plus(sigma)
    while sigma > written(MIN_SIGMA) and cost(float(below := _GRID.next_minus(sigma))) <= target:
        sigma = below
    return float(sigma)


def noise_multiplier(plan: Plan) -> float:
    """σ of the plan: 0 without privacy, the plan's own if it names one, else calibrated.

    All releases of a site cost at most `privacy.epsilon` at it.

    Raises:
        PlanError: the target is unreachable, or the σ that the plan names costs more.
    """
    privacy = plan.privacy
    if privacy.epsilon is None:
        return 0.0
    try:
        if privacy.noise_multiplier is not None:
            return _named(plan, privacy.noise_multiplier, privacy.epsilon)
        return _calibrated(plan, privacy.epsilon)
    except UnknownMechanism as error:
        raise PlanError(str(error)) from error


def _named(plan: Plan, sigma: float, target: float) -> float:
    event = round_event(plan, sigma)
    if event is None or run_epsilon(plan, event) > target:
        raise PlanError(f"privacy.noise_multiplier = {sigma:g} would spend more than privacy.epsilon = {target:g}")
    return sigma


def _calibrated(plan: Plan, target: float) -> float:
    privacy, steps = plan.privacy, plan.releases * plan.local.steps_per_round
    if not plan.shared_noise:
        return calibrate(target, privacy.delta, plan.local.sampling_rate, steps, privacy.accountant)
    delta = privacy.delta - plan.releases * (SLACK + VARIATION * (1.0 + math.exp(min(target, 700.0))))
    if delta <= 0.0:
        cost = f"what rounding costs in {plan.releases} releases at epsilon = {target:g}"
        raise PlanError(f"privacy.delta = {privacy.delta:g} is below {cost}")
    if privacy.noise == "participant":
        return calibrate(target, delta, 1.0, plan.releases, privacy.accountant)
    return calibrate(target, delta, plan.local.sampling_rate, steps, privacy.accountant)


def round_event(plan: Plan, sigma: float, own_sigma: float | None = None) -> Event | None:
    """What one release at noise multiplier `sigma` costs a site; None without privacy.

    `own_sigma` is what is left of shared noise if all others collude, as `NoiseShares` knows it (None: a bound that
    holds on every grid, since of a share of at least 18 squared steps at most 4 do not count).
    """
    rate = plan.local.sampling_rate
    if plan.privacy.noise == "none":
        return None
    if plan.privacy.noise == "site":
        return SampledGaussian(sigma, rate, plan.local.steps_per_round)
    own = own_sigma if own_sigma is not None else 0.88 * sigma / math.sqrt(max(1, plan.noise_sharers))
    return SharedGaussian(sigma, own, 1.0 if plan.privacy.noise == "participant" else rate, 1, SLACK)


def run_epsilon(plan: Plan, event: Event) -> float:
    """ε of a site that releases as often as the plan grants it, each time costing `event`."""
    whole = replace(event, steps=event.steps * plan.releases)
    return epsilon([whole], plan.privacy.delta, plan.privacy.accountant)


def plan_epsilon(plan: Plan, releases: int, *, coarse: bool = False) -> float | None:
    """ε that a site has spent after so many `releases` under the plan; None without privacy.

    `coarse` is ten times faster for `pld` and overstates by up to a percent: for curves, not for claims.
    """
    event = round_event(plan, noise_multiplier(plan))
    if event is None:
        return None
    name = plan.privacy.accountant
    accountant = "pld-coarse" if coarse and name == "pld" else name
    return epsilon([event] * releases, plan.privacy.delta, accountant)


def unit_epsilon_at_two_sites(plan: Plan, releases: int | None = None) -> float | None:
    """ε of a unit whose records lie at two sites, after so many `releases` of each (None: all that the plan grants).

    None where no unit can: a row, a participant, or no privacy at all.
    """
    event = round_event(plan, noise_multiplier(plan))
    count = plan.releases if releases is None else releases
    if event is None or not count or not plan.privacy_unit.startswith("column:"):
        return None
    return epsilon_at_two_sites([replace(event, steps=event.steps * count)], plan.privacy.delta)
