"""How the noise of a sum is divided among the sites that add it, and the integers that carry it.

PROTOCOL.md, section 13. Letters: N = cohort.size, c colluders (on a sparse graph and honest survivors that the sum may
miss), n_min the least survivors, u survivors, z the noise multiplier, k steps of the grid per clip norm, Δ the
sensitivity in steps, d coordinates.

*Add, then remove* (Jiang et al. 2024, "Dordis", XNoise). With u survivors each must have added variance at least
V(u) = σ²/(u - c) for the honest ones together to hide behind σ². Nobody knows u beforehand. So a site adds V(n_min), in
independent parts: a base of V(N), which stays, and components, each from a seed of its own, that fill up to V(n_min).
Once u is certified, the seeds of what exceeds V(u) are opened and subtracted: the sum carries the promised noise.

*Nested, where u is not one number.* On a sparse graph u counts signatures, and no two holders need be shown as many:
each opens what its own count does not need, so what stays in the end is what all of these counts keep. Hence there
the components that a smaller count keeps include those of every larger one: the union of what is opened is then what
the largest count opens. On a complete graph u is the certified set's, the same for all, and a binary scale is finer.

*Sensitivity.* A unit moves one site's clipped sum by at most C, that is k steps. The sum is put on a grid of 2^-8 steps
by a coin that no data touch, which moves it a little further: but for a chance of 2^-60 to at most Δ (Kairouz, Liu,
Steinke 2021, Theorem 1 with d/4 the variance of coins, in units of 2^-8 steps). From there on everything is noise.

*Accounting.* Σ of D(centre, variance) over the honest survivors is D(Σ centres, σ²) and that a post-processing of
N(Σ centres, σ² - 4), both to within factors e^(±2^-60): `accord_shared.dp.discrete`. So σ² = z²Δ² + 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

from accord_shared.dp.discrete import (
    FRACTION_BITS,
    LEAST_VARIANCE,
    ROUNDING_VARIANCE,
    DiscreteGaussian,
)
from accord_shared.errors import PlanError
from accord_shared.exact import LN_2, ceil_root, exact, fifty_digits, nearest, rounded_up, written
from accord_shared.plan import Plan
from accord_shared.secagg.thresholds import COMPLETE_MAX

ARITHMETIC_MARGIN = 2.0**-16
"""Relative allowance for sums in double precision: U² · 2^-53 for U units of a site, so up to 3·10^5 of them."""
VIRTUAL_VARIANCE = 4
"""What of σ² the continuous Gaussian lacks from which the discrete one follows: 2·exp(-2π²·4) = 1e-34 a coordinate."""
_COIN_FAILURE_BITS = 60
WRAP_BITS = 40
"""A sum of a run wraps with probability 2^-40 at most."""
_FIXED_BITS = 16
"""Bits of fraction below the grid of centres: the coin's."""
_FINEST, _COARSEST, _ASKED = Fraction(1, 1024), Fraction(1, 256), Fraction(1, 100)
"""Relative excess of σ over a sum of real numbers: what the grid is refined to, what decides the width of the modulus,
and what a plan that names a width may cost at most."""
_MOST_COMPONENTS = 9
"""More levels of dropouts than this share a binary scale of components."""
_MOST_STEPS = 1 << 40
_MAGNITUDES = (1e-200, 1e200)
"""Of a clip norm and a bound in units of an update: beyond, products with them lose digits or overflow a double."""
_FIXED_WIDTH = 62
"""Bits of a clamped coordinate in fixed point: it must fit into a signed integer of 64 with the coin on top."""
_MOST_SAMPLES, _MOST_SMOOTH = 1 << 40, 1 << 51
"""Samples of one sum: together within 2^-80 of their distribution, each within 2^-120 (`discrete.TOTAL_VARIATION`).
Samples of a run: their probabilities are together within e^±(2^-60) of what the proof takes, each within 2^-111: two
smoothing errors of variances of 9 or more, and one of `VIRTUAL_VARIANCE`, 4·exp(-8π²)."""
_SIXTEENTH = 16
_SENSITIVITY_DIGITS, _BOUND_DIGITS = 12, 3
_PLANES = 4
"""Words have a multiple of so many bits: single bits take long to pack."""


def sensitivity(steps: int, dimension: int) -> float:
    """Δ, in steps: how far one unit moves a vector [d] of clip norm `steps` on the grid of 2^-8 steps."""
    fine = 1 << FRACTION_BITS
    with fifty_digits():
        root = Decimal(dimension).sqrt()
        moved = fine * steps * (1 + written(ARITHMETIC_MARGIN)) + root * written(2.0**-_FIXED_BITS)
        luck = (2 * _COIN_FAILURE_BITS * LN_2).sqrt()
        likely = moved * moved + Decimal(dimension) / 4 + luck * (moved + root / 2)
        worst = (moved + root) * (moved + root)
        return rounded_up(min(likely, worst).sqrt() / fine, _SENSITIVITY_DIGITS)


@dataclass(frozen=True)
class NoiseShares:
    """Everything public about the integers of a plan under shared noise; `of` makes it.

    Raises:
        PlanError: components too small to be smooth, or a sum that could wrap.
    """

    multiplier: float
    """z."""
    sites: int
    minimum: int
    colluders: int
    """c, with the honest survivors that a sum on a sparse graph may miss."""
    dimension: int
    steps: int
    """k: steps of the grid per clip norm."""
    clip: float
    """The clip norm in units of an update."""
    bound: float
    """A: coordinates of a site's update are clamped to it before anything else."""
    bits: int
    draws: int
    """Vectors that are ever summed, for the chance of a wrap."""
    nested: bool = False
    """Whether holders may be shown different counts of survivors: on a sparse graph."""

    def __post_init__(self) -> None:
        for name, value in (("clip norm", self.clip), ("bound", self.bound)):
            if not _MAGNITUDES[0] <= value <= _MAGNITUDES[1]:
                raise PlanError(f"a {name} of {value:g} in units of an update leaves no grid")
        if self.reach >= 1 << (_FIXED_WIDTH - FRACTION_BITS - _FIXED_BITS):
            raise PlanError(f"a bound of {self.bound / self.clip:.3g} clip norms is too wide for any grid")
        least = min([self.base, *self.components])
        if least < LEAST_VARIANCE:
            raise PlanError(
                f"a share of noise of variance {float(least):.3g} on a grid of {self.steps} steps is not smooth"
            )
        if self.limit >= 1 << (self.bits - 1):
            raise PlanError(f"sums up to {self.limit} could wrap in {self.bits} bits")
        if not self.is_precise:
            raise PlanError(f"{self.dimension} coordinates of {self.sites} sites are too many for this noise")

    @cached_property
    def delta_steps(self) -> float:
        """Δ in steps."""
        return sensitivity(self.steps, self.dimension)

    @cached_property
    def variance(self) -> Fraction:
        """σ², in squared steps: what the honest survivors' shares add up to at least."""
        return _ceil(exact(self.multiplier) ** 2 * exact(self.delta_steps) ** 2) + VIRTUAL_VARIANCE

    def share(self, survivors: int) -> Fraction:
        """V(u): what each survivor's noise must keep."""
        return _ceil(self.variance / (survivors - self.colluders))

    @property
    def base(self) -> Fraction:
        """Variance of the part that stays whatever happens, beside the rounding's own."""
        return self.share(self.sites) - ROUNDING_VARIANCE

    @cached_property
    def components(self) -> tuple[Fraction, ...]:
        """Variances of the removable parts."""
        if self._levels:
            return tuple(more - less for less, more in pairwise(map(self.share, self._levels)))
        excess = _ceil(self.share(self.minimum) - self.share(self.sites))
        halves = [_ceil(excess / 2**place) for place in range(1, _MOST_COMPONENTS)]
        return (*halves, halves[-1])

    @cached_property
    def _levels(self) -> tuple[int, ...]:
        """Of how many survivors the base and the first 0, 1, … components are the share; none on a binary scale."""
        drops = self.sites - self.minimum
        count = min(drops, _MOST_COMPONENTS)
        if drops > count and not self.nested:
            return ()
        return tuple(self.sites - step * drops // max(count, 1) for step in range(count + 1))

    def kept(self, survivors: int) -> tuple[int, ...]:
        """Indices of the components that stay in a sum over so many survivors: the rest is opened and subtracted."""
        if self._levels:
            return tuple(range(sum(level > survivors for level in self._levels)))
        missing = self.share(survivors) - self.share(self.sites)
        kept: list[int] = []
        for index in range(len(self.components)):
            rest = sum(self.components[index + 1 :])
            if missing > 0 and rest < missing:  # the smaller ones would not do
                kept.append(index)
                missing -= self.components[index]
        return tuple(kept)

    def removed(self, survivors: int) -> tuple[int, ...]:
        """Indices of the components that are opened, ascending."""
        kept = frozenset(self.kept(survivors))
        return tuple(index for index in range(len(self.components)) if index not in kept)

    @property
    def own_multiplier(self) -> float:
        """What is left of z for a site whose fellow sites all collude, at 6 digits rounded down: its base."""
        own = math.sqrt(float(self.share(self.sites) - VIRTUAL_VARIANCE)) / self.delta_steps
        unit = 10.0 ** (math.floor(math.log10(own)) - 5)
        return min(self.multiplier, float(f"{math.floor(own / unit) * unit:.6g}"))

    @property
    def scale(self) -> float:
        """Steps per unit of an update."""
        return self.steps / self.clip

    @property
    def reach(self) -> int:
        """Largest magnitude of a site's clamped coordinate, in steps."""
        return math.ceil(exact(self.bound) * self.steps / exact(self.clip)) + 1

    @cached_property
    def tail(self) -> int:
        """What the noise of all sites together does not exceed, but for a chance of 2^-40 in a run."""
        whole = self.sites * (self.share(self.sites) + sum(self.components))
        values = self.dimension * self.draws
        return ceil_root(whole * 2 * Fraction(LN_2) * (1 + WRAP_BITS + values.bit_length()))

    @property
    def limit(self) -> int:
        """Largest magnitude of a sum of all sites' words (but for `tail`'s chance)."""
        return self.sites * self.reach + self.tail

    @property
    def excess(self) -> float:
        """How much more σ is than without integers, relatively."""
        return math.sqrt(float(self.variance)) / (self.multiplier * self.steps) - 1.0

    def costs_at_most(self, excess: Fraction) -> bool:
        """Whether `excess` is no more than that, exactly."""
        return self.variance <= (exact(self.multiplier) * self.steps * (1 + excess)) ** 2

    @property
    def is_precise(self) -> bool:
        """Whether all samples of a sum are together within 2^-80 of their distribution, a run's smooth to 2^-60."""
        samples = self.dimension * self.sites * (2 + len(self.components))
        return samples <= _MOST_SAMPLES and samples * self.draws <= _MOST_SMOOTH

    @cached_property
    def base_noise(self) -> DiscreteGaussian:
        """The part of a site's noise that stays."""
        return DiscreteGaussian(self.base)

    @cached_property
    def component_noise(self) -> tuple[DiscreteGaussian, ...]:
        """The removable parts."""
        return tuple(DiscreteGaussian(variance) for variance in self.components)

    @property
    def facts(self) -> tuple[int, ...]:
        """What two parties must agree on to the byte, as integers: they enter the attempt's context."""
        variances = [self.base, *self.components]
        return (self.steps, self.bits, *(int(variance * _SIXTEENTH) for variance in variances))

    @staticmethod
    def of(plan: Plan, dimension: int, noise_multiplier: float) -> NoiseShares:
        """The shares of a plan whose updates have `dimension` coordinates, at multiplier z.

        The grid is coarse, so that words are short: the modulus is the narrowest multiple of four bits in which the
        grid costs at most 1/256 of σ, or the plan's.

        Raises:
            PlanError: no grid fits the plan's modulus, or none at all.
        """
        draft = _Draft(plan, dimension, noise_multiplier)
        finest = draft.coarsest_grid(_FINEST)
        bits = plan.secure_aggregation.bits
        if bits is None:
            coarse = draft.coarsest_grid(_COARSEST)
            bits = max(8, -(-(draft.at(coarse, 62).limit.bit_length() + 1) // _PLANES) * _PLANES)
        try:
            shares = draft.at(draft.finest_grid(bits, finest), bits)
        except PlanError as error:
            raise PlanError(f"secure_aggregation.bits = {bits} is too narrow: {error}") from None
        if not shares.costs_at_most(_ASKED):
            raise PlanError(f"secure_aggregation.bits = {bits} would cost {shares.excess:.1%} more noise: too narrow")
        return shares


@dataclass(frozen=True)
class _Draft:
    """A plan's numbers, tried on grids."""

    plan: Plan
    dimension: int
    multiplier: float

    def at(self, steps: int, bits: int) -> NoiseShares:
        plan, cohort = self.plan, self.plan.cohort
        return NoiseShares(
            multiplier=self.multiplier,
            sites=cohort.size,
            minimum=cohort.minimum,
            colluders=cohort.size - plan.noise_sharers,
            dimension=self.dimension,
            steps=steps,
            clip=nearest(clip_in_updates(plan)),
            bound=plan.secure_aggregation.bound or default_bound(plan),
            bits=bits,
            draws=plan.run.rounds * (1 + plan.run.max_extra_attempts),
            nested=cohort.size > COMPLETE_MAX,
        )

    def coarsest_grid(self, excess: Fraction) -> int:
        """The least k that costs at most `excess` of σ and leaves every share smooth."""

        def fits(steps: int) -> bool:
            try:
                return self.at(steps, 62).costs_at_most(excess)
            except PlanError:
                return False

        steps = 1
        while not fits(steps):
            steps *= 2
            if steps > _MOST_STEPS:
                self.at(steps, 62)  # says why
                raise PlanError("no grid carries this noise")
        low = steps // 2
        while steps - low > 1:
            middle = (low + steps) // 2
            low, steps = (low, middle) if fits(middle) else (middle, steps)
        return steps

    def finest_grid(self, bits: int, finest: int) -> int:
        """The greatest k up to `finest` whose sums cannot wrap in `bits`."""
        low, high = 0, finest + 1
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self.at(middle, bits)
            except PlanError:
                fits = not self._wraps(middle, bits)  # too coarse: look further up
            else:
                fits = True
            low, high = (middle, high) if fits else (low, middle)
        return max(1, low)

    def _wraps(self, steps: int, bits: int) -> bool:
        try:
            return self.at(steps, 62).limit >= 1 << (bits - 1)
        except PlanError:
            return False


def clip_in_updates(plan: Plan) -> Fraction:
    """Γ: the clip norm in units of an update, C·η/(q·E); a whole update under `participant` noise is one."""
    local = plan.local
    clip = exact(local.clip_norm or 0.0)
    if plan.privacy.noise == "participant":
        return clip
    return clip * exact(local.learning_rate) / (exact(local.sampling_rate) * local.expected_records)


def default_bound(plan: Plan) -> float:
    """A where the plan names none: 4·√(q·E) + 4 clip norms, which sums of gradients that do not all agree stay below.

    With `evaluation.released_fraction`, half as much again as the count of held-back units. Rounded up to three digits.
    Clamping costs accuracy, never privacy.
    """
    local, clip = plan.local, clip_in_updates(plan)
    with fifty_digits():
        unit = Decimal(clip.numerator) / Decimal(clip.denominator)
        if plan.privacy.noise == "participant":
            return rounded_up(unit, _BOUND_DIGITS)
        batch = written(local.sampling_rate) * local.expected_records
        counted = written(1.5) * written(plan.evaluation.released_fraction) * batch
        return rounded_up(max(4 * batch.sqrt() + 4, counted) * unit, _BOUND_DIGITS)


def _ceil(value: Fraction) -> Fraction:
    """Rounded up to a multiple of 1/16."""
    return Fraction(math.ceil(value * _SIXTEENTH), _SIXTEENTH)
