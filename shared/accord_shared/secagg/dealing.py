"""What a site deals to a holder, and the part of it that may be opened (PROTOCOL.md, section 7, "Shares").

The plaintext is a bit map of the sender's mask partners over the cohort, its share of the self-mask seed, then one
share of each pair's mask seed in ascending order of the partner, then of each noise component's seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from accord_shared.secagg.shamir import SHARE_BYTES, to_bytes


def map_bytes(cohort: int) -> int:
    """Bytes of a bit map of `cohort` sites."""
    return -(-cohort // 8)


def dealt(partners: Sequence[int], cohort: int, shares: npt.NDArray[np.uint32]) -> bytes:
    """The plaintext for one holder; `shares` [1 + partners + components, 9] has the self-mask seed's first."""
    flags = np.zeros(cohort, dtype=np.bool_)
    flags[list(partners)] = True
    return np.packbits(flags).tobytes() + to_bytes(shares)


def opened_part(
    plain: bytes, cohort: int, survivors: Sequence[int], components: int = 0, removed: Sequence[int] = ()
) -> bytes:
    """Of what a *survivor* dealt: the share of its self-mask seed, those of its pairs with the dropped, and those of
    the noise components that are `removed`.

    Never a share of a pair of two survivors: `survivors` is the one set that this site opens. Empty if `plain` is
    not of the form that `dealt` makes.
    """
    head = map_bytes(cohort)
    flags = np.unpackbits(np.frombuffer(plain[:head], dtype=np.uint8))
    partners = np.flatnonzero(flags)
    if len(flags) != 8 * head or (partners >= cohort).any():
        return b""
    shares = plain[head:]
    if len(shares) != SHARE_BYTES * (1 + len(partners) + components):
        return b""
    alive = frozenset(survivors)
    open_ = [0, *(position for position, index in enumerate(partners.tolist(), start=1) if index not in alive)]
    open_ += [1 + len(partners) + index for index in removed]
    return b"".join(shares[SHARE_BYTES * position : SHARE_BYTES * (position + 1)] for position in open_)
