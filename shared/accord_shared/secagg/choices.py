"""Whom the sites of a sparse graph chose: bit maps over the roster (PROTOCOL.md, section 9).

A site's choice is a function of its identity, the roster and the plan: no rejoining, other run or restart draws anew,
and nobody without its keys can foresee it. All parties compute the edges from the choices alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from accord_shared.errors import ProtocolError
from accord_shared.frames import frame
from accord_shared.identity import Identity
from accord_shared.secagg.dealing import map_bytes
from accord_shared.secagg.graph import choose_neighbours


def own_choice(identity: Identity, roster_hash: str, plan_hash: str, own: int, sites: int, degree: int) -> bytes:
    """The bit map of a site's `degree` neighbours among the `sites` members of the roster; `own` is its place there.

    Raises:
        PlanError: there are not `degree` others.
    """
    key = identity.derive(frame("accord/1/neighbours", roster_hash, plan_hash))
    keystream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    flags = np.zeros(sites, dtype=np.bool_)
    flags[list(choose_neighbours(own, sites, degree, lambda count: keystream.update(bytes(count))))] = True
    return np.packbits(flags).tobytes()


def chose(choice: bytes, place: int) -> bool:
    """Whether the member at `place` of the roster was chosen."""
    return bool(choice[place >> 3] >> (7 - place % 8) & 1)


def check_choice(choice: bytes, name: str, own: int, sites: int, degree: int) -> None:
    """Refuse what is no choice: an honest site always has `degree` holders beside itself.

    Raises:
        ProtocolError: another length or number of neighbours, `own` among them, or padding that is not zero.
    """
    bits = int.from_bytes(choice)
    padding = bits & ((1 << -sites % 8) - 1)
    if len(choice) != map_bytes(sites) or bits.bit_count() != degree or padding or chose(choice, own):
        raise ProtocolError(f"R5: the choice of {name!r} is not of {degree} others among {sites}")


class Edges:
    """Who shares masks and secrets with whom in a cohort, from its sites' choices; complete where there are none.

    `places` are the cohort's on the roster. Indices are of the cohort.
    """

    def __init__(self, choices: Sequence[bytes], places: Sequence[int]) -> None:
        self._count, self._places = len(places), np.array(places, dtype=np.int64)
        self._packed = np.frombuffer(b"".join(choices), dtype=np.uint8).reshape(len(choices), -1) if choices else None

    def of(self, own: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Mask partners of a site, which chose it or were chosen by it; holders, which are those it chose, and itself.

        Both ascending.
        """
        if self._packed is None:
            return tuple(i for i in range(self._count) if i != own), tuple(range(self._count))
        place = int(self._places[own])
        chosen = np.unpackbits(self._packed[own])[self._places].astype(np.bool_)
        choosers = (self._packed[:, place >> 3] >> (7 - place % 8) & 1).astype(np.bool_)
        holds = chosen.copy()
        holds[own] = True
        return tuple(np.flatnonzero(chosen | choosers).tolist()), tuple(np.flatnonzero(holds).tolist())
