"""For any data and any partition: every unit once, whole, nobody empty, the same every time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from accord_client.data import Examples, number_units
from accord_simulations.partition import Shares, partition, zipf_sizes

SPECS = ("iid", "dirichlet:0.001", "dirichlet:0.1", "dirichlet:50", "zipf:0", "zipf:1.3", "zipf:40", "column:shop")


def _examples(rows: list[tuple[int, int, int]]) -> Examples:
    """From (label, customer, shop) triples."""
    labels, customers, shops = (list(cells) for cells in zip(*rows, strict=True))
    return Examples(
        texts=tuple(f"text {i}" for i in range(len(rows))),
        labels=np.array(labels, dtype=np.int64),
        units=number_units(customers),
        columns={"shop": np.array([f"shop {s}" for s in shops])},
    )


_rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=80)


def _divide(spec: str, train: Examples, test: Examples, participants: int, seed: int) -> Shares:
    rng = np.random.Generator(np.random.PCG64(seed))
    return partition(spec, train=train, test=test, participants=participants, rng=rng)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=_rows, test_rows=_rows, spec=st.sampled_from(SPECS), seed=st.integers(0, 2**32), data=st.data())
def test_every_unit_goes_whole_to_exactly_one_participant(
    rows: list[tuple[int, int, int]],
    test_rows: list[tuple[int, int, int]],
    spec: str,
    seed: int,
    data: st.DataObject,
) -> None:
    train, test = _examples(rows), _examples(test_rows)
    participants = data.draw(st.integers(1, train.n_units))
    shares = _divide(spec, train, test, participants, seed)

    assert len(shares.train) == len(shares.test) == participants
    assert all(len(share) for share in shares.train)
    assert sorted(np.concatenate(shares.train).tolist()) == list(range(len(train)))
    owners = [set(train.units[share].tolist()) for share in shares.train]
    assert sum(len(own) for own in owners) == train.n_units
    for share in shares.test:
        assert len(set(share.tolist())) == len(share)
        assert all(0 <= row < len(test) for row in share.tolist())
    if spec.startswith("dirichlet"):
        assert sorted(np.concatenate(shares.test).tolist()) == list(range(len(test)))
    if spec.startswith(("iid", "zipf")):
        assert all(len(share) == len(test) for share in shares.test)
    if shares.names is not None:
        assert len(set(shares.names)) == participants

    again = _divide(spec, train, test, participants, seed)
    for left, right in zip((*shares.train, *shares.test), (*again.train, *again.test), strict=True):
        assert left.tolist() == right.tolist()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(participants=st.integers(1, 60), extra=st.integers(0, 500), exponent=st.floats(0, 50))
def test_zipf_sizes_descend_and_use_everything(participants: int, extra: int, exponent: float) -> None:
    sizes = zipf_sizes(participants + extra, participants, exponent).tolist()
    assert sum(sizes) == participants + extra
    assert min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)
