"""The sparse graph: how many neighbours, how many shares, and whom a site chooses (PROTOCOL.md, section 9).

Each of the N members of the roster chooses k others, uniformly, by a key of its own (`choices`): once for a plan, in
whatever run, session or process. Mask partners in a cohort are those it chose and those that chose it; holders are
those it chose, and itself. Bell et al. 2020 draw a graph that must stay secret until sites have dropped. Here the
coordinator sees every choice, holds c sites (fixed before the choices) and *then* picks up to d = N − n_min that are
missing from a cohort, dead, or shown something else, again in every round. So each bound below is a union over what
it can pick, and one failure probability covers all runs of a plan. Let Hyp(m) be how many of k choices fall among m
marked of the N − 1 others: hypergeometric, and independent from one chooser to the next, which does all the work.

All honest sites of a context were shown the same choices, and those among them their own: choices are part of it. So
of two such sites either both have the mask of their pair or neither, and both exactly where one chose the other (R5).
*Survivors* are from here on the honest sites of U that are in the context; n_min − c or more, since so many signed.

1. *Secrets of pairs.* Nobody honest opens a mask between two survivors, nor the own seed of a site outside U. So the
   corrupt holders alone would have to: N·P[Hyp(c) ≥ t_share].
2. *Parts.* Let the masks between honest survivors fall into components, and S be a union of components, s sites, at
   most half of the honest survivors; R the others, so s + |R| ≥ h = n_min − c. To learn the sum over S:
   (a) every own seed in S is opened. Who answers for u ∈ S is corrupt, or a holder of u that survives, so a mask
       partner (masks with another survivor are never opened), so in S. Each u has t_share − 1 chosen holders among
       s − 1 + c sites, independently of each other:
       (N over s)·P[Hyp(s − 1 + c) ≥ t_share − 1]^s. Strong for small S: to cut a few sites off, the coordinator
       kills their holders, and then nobody opens them.
   (b) no site of S chose one of R, nor the other way round: either choice makes the mask. R may be shrunk to
       r = max(s, h − s) sites, so the dead need no union of their own:
       (N over s)·(N−s over r)·P[Hyp(r) = 0]^s·P[Hyp(s) = 0]^r.
       Strong for large S: about 2·k·s·r/N edges would all have to be missing.
   The lesser, summed over 1 ≤ s ≤ N/2. Neither alone is ever small for all s.
3. *Second attempts.* Who opened an attempt joins no other of that round, so a second sum of n_min sites needs a first
   that at most d honest sites opened. By 2 that sum covers more than h/2 sites, each with t_share − 1 chosen holders
   among d openers and c colluders: (N over d)·(N over s)·P[Hyp(d + c) ≥ t_share − 1]^s, s = ⌊h/2⌋ + 1.

The counts run over all N where honest sites would do: so each bound also covers fewer colluders than c. What corrupt
sites choose, and whether they show one choice, is in no bound: it only adds masks that they know anyway. A coordinator
that brings P plans through the sites' approval, or R rosters, has P·R draws: log2 of that comes off the bits.

What 2 does not say: the one sum that is opened need not cover all survivors. A coordinator with d ≥ 2k can kill every
partner of one site, and it is left out (nothing about it is learned). By (b) no more than `most_left_out` are missing.
Honest sites of U that are *not* in the context (never asked, or shown something else) are no survivors: of their
pairs only those count that the others' own choices make, since nobody in the context has to be shown their true
choice, so more of them can be missing. They did not sign. So whoever counts shares of noise counts the signatures of
the certificate: of s of them at least s − c − most_left_out are of sites in the sum.

*Signatures.* 1 to 3 suppose that all openings of an attempt follow one survivor set U in one context. At least n_min
sites answer every trip, so t_sign = n_min, refused below `signatures`, of N: a certified U has n_min − c honest
signers, and two such sets, or contexts, of an attempt would share one.

*Without signatures* (`semi_honest`) the numbers are the same, for a coordinator that follows the protocol. Nothing is
claimed against one that deviates. A majority rule on t_share would not help: masks between u and v are opened by
holders of u *or* of v, and with d ≥ 2k the coordinator tells each holder of u that all other partners of u died.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from accord_shared.errors import PlanError
from accord_shared.secagg.thresholds import Thresholds, require_cohort, signatures

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ABORT_BITS = 20.0
"""An honest round may fail for want of shares with probability 2^-20."""

DEGREE_MAX = 1024
"""Most neighbours: shares grow with the square of the degree, and here reach 75 MB a site and round."""

_NEGLIGIBLE = -1000.0
"""Terms of bound 2 below 2^-1000 by (b) are not tightened by (a): N of them weigh nothing."""


@lru_cache(maxsize=8)
def _log2_factorials(top: int) -> Floats:
    table = np.array([math.lgamma(i + 1.0) for i in range(top + 1)]) / math.log(2.0)
    table.setflags(write=False)
    return table


def _log2_binomial(sites: int, n: Integers | int, k: Integers | int) -> Floats:
    """log2 of n over k by element, for n ≤ `sites`; −inf where there is no such choice."""
    n, k = np.asarray(n), np.asarray(k)
    possible = (k >= 0) & (k <= n)
    top, low = np.where(possible, n, 0), np.where(possible, k, 0)
    table = _log2_factorials(sites)
    return np.where(possible, table[top] - table[low] - table[top - low], -np.inf)


def _log2_sum(terms: Floats) -> float:
    """log2 Σ 2^terms; −inf for none."""
    peak = float(np.max(terms, initial=-np.inf))
    return peak if math.isinf(peak) else peak + math.log2(float(np.exp2(terms - peak).sum()))


def _log2_hits(sites: int, marked: int, degree: int) -> Floats:
    """log2 P[j of `degree` choices among `sites` − 1 others are marked], for j = 0 … degree."""
    others, j = sites - 1, np.arange(degree + 1)
    ways = _log2_binomial(sites, marked, j) + _log2_binomial(sites, others - marked, degree - j)
    return ways - _log2_binomial(sites, others, degree)


def log2_tail(sites: int, marked: int, degree: int, least: int) -> float:
    """log2 P[a site chooses at least `least` of `marked` others]: the hypergeometric tail, summed exactly."""
    if least <= 0:
        return 0.0
    return min(0.0, _log2_sum(_log2_hits(sites, min(marked, sites - 1), degree)[least:]))


def _rebuilt(sites: int, colluders: int, degree: int, share: int) -> float:
    """Bound 1, log2."""
    return math.log2(sites) + log2_tail(sites, colluders, degree, share)


def _cuts(sites: int, minimum: int, colluders: int, degree: int) -> Floats:
    """Bound 2 (b), log2, for s = 1 … `sites`//2."""
    s = np.arange(1, sites // 2 + 1)
    r = np.maximum(s, minimum - colluders - s)
    pairs = _log2_binomial(sites, sites, s) + _log2_binomial(sites, sites - s, r)
    every = _log2_binomial(sites, sites - 1, degree)
    ours = _log2_binomial(sites, sites - 1 - r, degree) - every
    theirs = _log2_binomial(sites, sites - 1 - s, degree) - every
    return np.asarray(pairs + s * ours + r * theirs, dtype=np.float64)


def _parts(sites: int, minimum: int, colluders: int, degree: int, share: int) -> float:
    """Bound 2, log2: the lesser of (a) and (b), summed over the sizes of the smaller part."""
    terms = _cuts(sites, minimum, colluders, degree)
    for s in (np.flatnonzero(terms > _NEGLIGIBLE) + 1).tolist():
        each = log2_tail(sites, s - 1 + colluders, degree, share - 1)
        terms[s - 1] = min(terms[s - 1], float(_log2_binomial(sites, sites, s)) + s * each)
    return _log2_sum(terms)


def _again(sites: int, minimum: int, colluders: int, degree: int, share: int) -> float:
    """Bound 3, log2."""
    dead, opened = sites - minimum, (minimum - colluders) // 2 + 1
    ways = float(_log2_binomial(sites, sites, dead) + _log2_binomial(sites, sites, opened))
    return ways + opened * log2_tail(sites, dead + colluders, degree, share - 1)


def secrecy_bits(sites: int, minimum: int, colluders: int, degree: int, share: int) -> float:
    """−log2 of the probability that the graph of a plan fails its members: bounds 1 to 3 added, at least 0.

    Holds for every coordinator that sees the graph before it says who died (module docstring).
    """
    bounds = (
        _rebuilt(sites, colluders, degree, share),
        _again(sites, minimum, colluders, degree, share),
        _parts(sites, minimum, colluders, degree, share),
    )
    return max(0.0, -_log2_sum(np.array(bounds)))


def abort_bits(sites: int, minimum: int, degree: int, share: int) -> float:
    """−log2 of the probability that an honest round fails: all but `minimum` sites, chosen at random, drop.

    A union over the survivors: one of them keeps fewer than `share` of its holders, itself included.
    """
    hits = _log2_hits(sites, minimum - 1, degree)
    return max(0.0, -math.log2(minimum) - _log2_sum(hits[: max(share - 1, 0)]))


def most_left_out(sites: int, minimum: int, colluders: int, degree: int, bits: float = 40.0) -> int:
    """Most honest survivors that the opened sum may miss, but for 2^-`bits`: the coordinator killed their partners."""
    terms = _cuts(sites, minimum, colluders, degree)
    sums = np.logaddexp2.accumulate(terms[::-1])[::-1]
    return int((sums > -bits).sum())


def _most_share(sites: int, minimum: int, degree: int) -> int:
    """The greatest t_share with `abort_bits` ≥ ABORT_BITS; 1 if there is none above."""
    failure = np.logaddexp2.accumulate(_log2_hits(sites, minimum - 1, degree)) + math.log2(minimum)
    return min(int((failure <= -ABORT_BITS).sum()) + 1, degree + 1)


def _is_secret(sites: int, minimum: int, colluders: int, degree: int, share: int, bits: float) -> bool:
    # Bound 1 costs microseconds and refuses almost every degree that is too small.
    if share < 2 or _rebuilt(sites, colluders, degree, share) > -bits:
        return False
    if _again(sites, minimum, colluders, degree, share) > -bits:
        return False
    return secrecy_bits(sites, minimum, colluders, degree, share) >= bits


@lru_cache(maxsize=256)
def sparse_thresholds(sites: int, minimum: int, colluders: int, bits: float = 40.0) -> Thresholds:
    """The least degree that keeps secrets with 2^-`bits` and honest rounds alive with 2^-20; then the least t_share.

    The same for both modes. t_sign is `minimum`, which is refused where it would not make certified sets unique.

    Args:
        sites: N, all members of the roster; those outside a cohort count as dropped.
        minimum: n_min, survivors of any round.
        colluders: c, sites that the coordinator may hold.
        bits: of secrecy, over all runs of a plan.

    Raises:
        PlanError: impossible counts, or no degree up to 1024 does both: one line with the numbers.
    """
    require_cohort(sites, minimum, colluders)
    sign = max(signatures(sites, colluders), minimum)
    if minimum < (least := max(sign, colluders + 2)):
        raise PlanError(
            f"{sites} sites with {colluders} colluders need {least} to sign, more than cohort.minimum = {minimum}"
        )
    for degree in range(1, min(sites - 1, DEGREE_MAX) + 1):
        share = _most_share(sites, minimum, degree)
        if _is_secret(sites, minimum, colluders, degree, share, bits):
            while _is_secret(sites, minimum, colluders, degree, share - 1, bits):
                share -= 1
            return Thresholds(sites=sites, sign=sign, share=share, degree=degree)
    raise PlanError(
        f"no sparse graph serves {sites} sites with cohort.minimum = {minimum} and {colluders} colluders: "
        "ask for more survivors or fewer colluders"
    )


def _below(bound: int, random: Callable[[int], bytes]) -> int:
    """A uniform integer in [0, `bound`): words beyond the last whole multiple are drawn again."""
    limit = (1 << 64) - (1 << 64) % bound
    while (word := int.from_bytes(random(8), "little")) >= limit:
        pass
    return word % bound


def choose_neighbours(own: int, sites: int, degree: int, random: Callable[[int], bytes]) -> tuple[int, ...]:
    """A uniform set of `degree` of the other `sites` − 1 indices, ascending (Floyd's algorithm, Bentley 1987).

    Args:
        own: the index of the site that chooses; it is never chosen.
        sites: N, all members of the roster.
        degree: k.
        random: `random(count)` gives `count` cryptographic bytes.

    Raises:
        PlanError: `own` is no index, or there are not `degree` others.
    """
    if not (0 <= own < sites and 1 <= degree < sites):
        raise PlanError(f"site {own} of {sites} cannot choose {degree} neighbours")
    chosen: set[int] = set()
    for last in range(sites - 1 - degree, sites - 1):
        pick = _below(last + 1, random)
        chosen.add(last if pick in chosen else pick)
    return tuple(sorted(index + (index >= own) for index in chosen))
