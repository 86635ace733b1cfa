"""Which sites a round asks. A public choice from the plan's seed; never counted as amplification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accord_shared.errors import RoundAborted
from accord_shared.plan import Plan


def choose_cohort(plan: Plan, sites: Sequence[str], round_number: int, attempt: int) -> tuple[str, ...]:
    """`cohort.size` of the `sites`, the same for the same plan, round and attempt.

    Raises:
        RoundAborted: fewer sites are there than a round must finish with.
    """
    if len(sites) < plan.cohort.minimum:
        raise RoundAborted(f"{len(sites)} sites are connected, cohort.minimum is {plan.cohort.minimum}")
    ordered = sorted(sites)
    if len(ordered) <= plan.cohort.size:
        return tuple(ordered)
    generator = np.random.default_rng([plan.run.seed, round_number, attempt])  # public, not secret
    chosen = generator.choice(len(ordered), size=plan.cohort.size, replace=False)
    return tuple(ordered[index] for index in sorted(chosen))
