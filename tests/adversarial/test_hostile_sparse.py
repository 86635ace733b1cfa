"""Searches for what a coordinator may learn on a sparse graph (section 9), and for noise that it may remove (13).

Written against the protocol, not with it. A test named `…control` takes one check out and shows that the same search
then succeeds.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise

import pytest

from accord_shared.dp.sharing import NoiseShares
from accord_shared.messages import OpenRequest
from accord_shared.secagg.shamir import SHARE_BYTES
from adversarial.hostile import DIMENSION, World, _rebuild
from adversarial.test_hostile_choices import Graph, with_graph

# --- noise: holders that are shown different counts of signatures


def shares_of(
    sites: int, minimum: int, colluders: int = 0, *, steps: int = 256, bits: int = 24, nested: bool = True
) -> NoiseShares:
    return NoiseShares(
        multiplier=1.0,
        sites=sites,
        minimum=minimum,
        colluders=colluders,
        dimension=DIMENSION,
        steps=steps,
        clip=1.0,
        bound=1.5,
        bits=bits,
        draws=9,
        nested=nested,
    )


def least_left(shares: NoiseShares) -> Fraction:
    """What stays of the promised variance, at least, where holders open for any counts up to the true one."""
    worst = Fraction(10)
    for most in range(shares.minimum, shares.sites + 1):
        opened = {index for shown in range(shares.minimum, most + 1) for index in shares.removed(shown)}
        left = shares.base + 9 + sum(v for index, v in enumerate(shares.components) if index not in opened)
        worst = min(worst, left * (most - shares.colluders) / shares.variance)
    return worst


@pytest.mark.parametrize(
    ("sites", "minimum", "colluders"),
    [(24, 13, 0), (130, 125, 0), (160, 148, 3), (250, 238, 1), (400, 393, 2), (1000, 700, 3), (1000, 900, 103)],
)
def test_no_counts_that_holders_are_shown_open_more_noise_than_the_true_one(
    sites: int, minimum: int, colluders: int
) -> None:
    shares = shares_of(sites, minimum, colluders, steps=1 << 16, bits=40)
    assert least_left(shares) >= 1
    kept = [shares.kept(count) for count in range(minimum, sites + 1)]
    assert all(set(more) <= set(fewer) for fewer, more in pairwise(kept))
    binary = shares_of(sites, minimum, colluders, steps=1 << 16, bits=40, nested=False)
    assert (least_left(binary) < 1) is (sites - minimum > 9)  # control: .98 z and .91 z at 160 and 1000


def test_a_nested_scale_costs_at_most_a_ninth_of_what_dropouts_cost() -> None:
    for sites, minimum, colluders in [(160, 148, 3), (1000, 700, 3), (1000, 900, 103)]:
        shares = shares_of(sites, minimum, colluders, steps=1 << 16, bits=40)
        step = -(-(sites - minimum) // 9)
        for count in range(minimum, sites + 1):
            kept = shares.base + 9 + sum(shares.components[index] for index in shares.kept(count))
            assert shares.share(count) <= kept <= shares.share(max(minimum, count - step))


def split_counts(setting: Graph, dead: int, fewer: int) -> tuple[World, Fraction]:
    """All but `dead` sites sign; half of the holders are shown `fewer` signatures less than the others.

    Returns what stays of the noise of the sum after all components that either half opens are taken away, as a part of
    what was promised.
    """
    run = World(setting).run().join()
    noise = setting.noise
    assert noise is not None
    alive = run.names[: len(run.names) - dead]
    for name in alive:
        run.upload(name)
    survivors = tuple(run.names.index(name) for name in alive)
    for name in alive:
        run.sign(name, survivors)
    shown: dict[int, int] = {}
    for place, name in enumerate(alive):
        request: OpenRequest = run.open_request(name, survivors)
        count = len(request.signers) - (fewer if place % 2 else 0)
        shown[run.names.index(name)] = count
        run.open(name, survivors, signers=request.signers[:count], signatures=request.signatures[:count])
    left = Fraction(0)
    for upload in run.world.uploads:
        held: dict[int, dict[int, bytes]] = {index: {} for index in range(len(noise.components))}
        dropped = sum(partner not in survivors for partner in upload.partners)
        for opening in run.world.openings:
            part, removed = opening.shares[survivors.index(upload.own)], noise.removed(shown[opening.holder])
            for place, index in enumerate(removed if part else ()):
                at = SHARE_BYTES * (1 + dropped + place)
                held[index][opening.holder] = part[at : at + SHARE_BYTES]
        stay = [index for index, shares in held.items() if len(shares) < 3 or _rebuild(shares) is None]
        left += noise.base + 9 + sum(noise.components[index] for index in stay)
    return run.world, left / noise.variance


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "binary control"])
def test_halves_of_the_holders_that_are_shown_other_counts(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One half opens the large components, the other one the small ones: each count alone was true."""
    with_graph(monkeypatch, 3, 9)
    names = tuple("abcdefghijklmnopqrstuvwx")
    noise = shares_of(24, 13, steps=256, bits=20, nested=nested)
    counts = combinations(range(13, 25), 2)
    fewer, most = min(
        counts,
        key=lambda pair: (
            sum(noise.components[i] for i in set(noise.kept(pair[0])) & set(noise.kept(pair[1]))) - noise.share(pair[1])
        ),
    )
    setting = Graph(names=names, minimum=13, noise=noise)
    world, left = split_counts(setting, 24 - most, most - fewer)
    assert not world.refusals
    assert (left >= 1) is nested
