"""How many signatures certify a survivor set and how many shares rebuild a secret (PROTOCOL.md, section 4).

Every site computes these numbers itself, from the plan and the cohort that it sees: a coordinator cannot
lower them. With n sites, at least n_min survivors and c colluders:

- 2·t_sign > n + c: two certified sets share an honest signer, who signs one set per attempt (the quorum
  intersection of Malkhi and Reiter 1998), so the survivor set is unique;
- t_share > N + c − n_min, N being the plan's cohort.size: an opening takes more than N − n_min honest sites. None of
  them joins another attempt of that round, so no second attempt gathers n_min of the at most N sites of a first
  cohort. (With n in the place of N two smaller cohorts of one round could overlap.)
- t_share ≥ c + 2: colluders and one honest site rebuild nothing;
- n_min ≥ max(c, 1) + 2: whoever subtracts what it knows from a sum, c colluders or one site that sees the model,
  is left with the sum of two. Not asked where every update carries its own full noise; above four sites it follows;
- `semi_honest` has no signatures, so 2·t_share > n + c does there what 2·t_sign does (Bonawitz et al. 2017,
  Theorem 6.5, with corrupt users).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from accord_shared.errors import PlanError

Mode = Literal["malicious", "semi_honest"]

COMPLETE_MAX = 128
"""Most sites of a run on the complete graph; above, `graph.sparse_thresholds`."""

SMALL_MAX = 4
"""Up to here every site must sign, answer and survive: no threshold below n tolerates a colluder and a dropout."""


@dataclass(frozen=True)
class Thresholds:
    """What certifies and what opens. `degree` is None on the complete graph, else k of the sparse one."""

    sites: int
    """Sites that the numbers were computed for: n of the cohort, on a sparse graph N of the roster."""
    sign: int
    """Signatures that certify a survivor set."""
    share: int
    """Shares that rebuild a secret, of `sites` holders, on a sparse graph of `degree` + 1."""
    degree: int | None


def signatures(n: int, colluders: int) -> int:
    """t_sign: the least count above two thirds of n and above (n + c)/2."""
    return max(2 * n // 3 + 1, (n + colluders) // 2 + 1)


def _shares(n: int, minimum: int, colluders: int, mode: Mode, size: int) -> int:
    quorum = n // 2 + 1 if mode == "malicious" else signatures(n, colluders)
    return max(quorum, colluders + 2, size + colluders - minimum + 1)


def require_cohort(n: int, minimum: int, colluders: int) -> None:
    """Refuse numbers that no graph can serve.

    Raises:
        PlanError: a negative count, fewer than two sites, none honest, or fewer than `minimum`.
    """
    if n < 2 or not 1 <= minimum <= n:
        raise PlanError(f"secure aggregation of {n} sites: needs at least 2 and cohort.minimum = {minimum}")
    if not 0 <= colluders < n:
        raise PlanError(f"cohort.colluders = {colluders} of {n} sites leaves none honest")


def _require_two(survivors: int, colluders: int) -> None:
    known = max(colluders, 1)
    if survivors < known + 2:
        raise PlanError(
            f'a sum of {survivors} sites with {colluders} colluders needs privacy.noise = "site": '
            f"whoever knows {known} of them learns a single update"
        )


@lru_cache(maxsize=1024)
def thresholds(
    n: int, minimum: int, colluders: int, mode: Mode, size: int | None = None, *, own_noise: bool = False
) -> Thresholds:
    """The thresholds of a complete graph over a cohort of `n` sites; `size` is the plan's (None: as many).

    `own_noise`: every update carries its own full noise, so that even a sum that tells a single one tells no more.

    Raises:
        PlanError: n < minimum, t_share > minimum, t_sign > n, no two sites, none of them honest, or a sum of which
            colluders or one site learn a single update.
    """
    require_cohort(n, minimum, colluders)
    small = n <= SMALL_MAX
    if small and not own_noise:
        _require_two(n, colluders)
    sign = n if small else signatures(n, colluders)
    share = n if small else _shares(n, minimum, colluders, mode, size or n)
    if share > minimum:
        raise PlanError(
            f"{n} sites with {colluders} colluders need {share} answers, more than cohort.minimum = {minimum}"
        )
    if sign > n:
        raise PlanError(f"{n} sites with {colluders} colluders need {sign} signatures, more than there are")
    return Thresholds(sites=n, sign=sign, share=share, degree=None)


def least_minimum(n: int, colluders: int, mode: Mode, *, own_noise: bool = False) -> int:
    """The smallest `cohort.minimum` that a complete graph of `n` sites accepts.

    Raises:
        PlanError: none does: too many colluders for so few sites.
    """
    for minimum in range(1, n):
        try:
            thresholds(n, minimum, colluders, mode, own_noise=own_noise)
        except PlanError:
            continue
        return minimum
    thresholds(n, n, colluders, mode, own_noise=own_noise)  # says why, if even "all" is refused
    return n
