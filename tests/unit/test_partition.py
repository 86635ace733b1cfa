"""Partitions: the skew that each one promises, and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from accord_client.data import Examples, number_units
from accord_shared.errors import PlanError
from accord_simulations.partition import Shares, parse, partition, zipf_sizes


def _examples(labels: list[int], shops: list[str] | None = None, customers: list[str] | None = None) -> Examples:
    return Examples(
        texts=tuple(f"text {i}" for i in range(len(labels))),
        labels=np.array(labels, dtype=np.int64),
        units=number_units(range(len(labels)) if customers is None else customers),
        columns={} if shops is None else {"shop": np.array(shops, dtype=np.str_)},
    )


def _divide(spec: str, train: Examples, test: Examples, participants: int, seed: int = 1) -> Shares:
    return partition(
        spec, train=train, test=test, participants=participants, rng=np.random.Generator(np.random.PCG64(seed))
    )


def _largest_class_share(examples: Examples, shares: tuple[np.ndarray, ...], n_classes: int) -> float:
    """Mean over participants of the share of the most frequent class: 1/n_classes is no skew, 1 is all."""
    counts = [np.bincount(examples.labels[share], minlength=n_classes) for share in shares]
    return float(np.mean([c.max() / c.sum() for c in counts if c.sum()]))


BALANCED = _examples([i % 5 for i in range(2000)])
TEST = _examples([i % 5 for i in range(500)])


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(share) for share in _divide("iid", BALANCED, TEST, 7).train]
    assert max(sizes) - min(sizes) <= 1


def test_zipf_sizes_follow_the_ranks() -> None:
    shares = _divide("zipf:1", BALANCED, TEST, 10)
    sizes = [len(share) for share in shares.train]
    for rank, size in enumerate(sizes, start=1):
        assert size == pytest.approx(sizes[0] / rank, abs=1.0)
    assert all(len(share) == 500 for share in shares.test)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [((12, 3, 1.0), [7, 3, 2]), ((6, 3, 0.0), [2, 2, 2]), ((6, 4, 9.0), [3, 1, 1, 1]), ((3, 3, 5.0), [1, 1, 1])],
)
def test_zipf_known_sizes(arguments: tuple[int, int, float], sizes: list[int]) -> None:
    assert zipf_sizes(*arguments).tolist() == sizes


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    skewed = _divide("dirichlet:0.1", BALANCED, TEST, 20)
    even = _divide("dirichlet:1000", BALANCED, TEST, 20)
    assert _largest_class_share(BALANCED, skewed.train, 5) > 0.6
    assert _largest_class_share(BALANCED, even.train, 5) < 0.25
    assert np.std([len(share) for share in skewed.train]) > 5 * np.std([len(share) for share in even.train])


def test_dirichlet_test_rows_follow_the_training_mix() -> None:
    shares = _divide("dirichlet:0.3", BALANCED, TEST, 5)
    for train, test in zip(shares.train, shares.test, strict=True):
        if len(test) < 50:
            continue
        mixes = [np.bincount(e.labels[s], minlength=5) / len(s) for e, s in ((BALANCED, train), (TEST, test))]
        assert np.abs(mixes[0] - mixes[1]).max() < 0.05


def test_a_tiny_alpha_leaves_nobody_empty() -> None:
    sizes = [len(share) for share in _divide("dirichlet:1e-6", BALANCED, TEST, 100).train]
    assert min(sizes) >= 1


def _shops(**sizes: int) -> Examples:
    shops = [shop for shop, size in sizes.items() for _ in range(size)]
    return _examples([i % 2 for i in range(len(shops))], shops)


def test_each_value_of_a_column_is_a_participant_largest_first() -> None:
    shares = _divide("column:shop", _shops(a=2, b=5, c=3), _shops(c=2, a=1), 3)
    assert shares.names == ("b", "c", "a")
    assert [len(share) for share in shares.train] == [5, 3, 2]
    assert [share.tolist() for share in shares.test] == [[], [0, 1], [2]]


def test_smaller_values_join_the_largest_in_turn() -> None:
    shares = _divide("column:shop", _shops(a=9, b=8, c=3, d=2, e=1), _shops(c=1, d=1, e=1), 2)
    assert shares.names == ("a+2", "b+1")
    assert [len(share) for share in shares.train] == [13, 10]
    assert [share.tolist() for share in shares.test] == [[0, 2], [1]]


def test_the_largest_values_are_split_further() -> None:
    shares = _divide("column:shop", _shops(a=9, b=4), _shops(a=2, b=1), 4)
    assert shares.names == ("a-1", "a-2", "a-3", "b")
    assert [len(share) for share in shares.train] == [3, 3, 3, 4]
    assert [share.tolist() for share in shares.test] == [[0, 1]] * 3 + [[2]]


def test_a_customer_of_two_shops_stays_whole_with_the_more_frequent() -> None:
    train = _examples([0] * 5, ["a", "b", "b", "a", "a"], ["C1", "C1", "C1", "C2", "C3"])
    shares = _divide("column:shop", train, train, 2)
    assert shares.names == ("a", "b")
    assert [share.tolist() for share in shares.train] == [[3, 4], [0, 1, 2]]


def test_equal_names_are_told_apart() -> None:
    names = _divide("column:shop", _examples([0] * 7, ["a"] * 4 + ["a-1"] * 3), _shops(a=1), 3).names
    assert names == ("01-a-1", "02-a-2", "03-a-1")


def test_another_seed_gives_another_division() -> None:
    one, two = (_divide("iid", BALANCED, TEST, 3, seed) for seed in (1, 2))
    assert one.train[0].tolist() != two.train[0].tolist()


@pytest.mark.parametrize(
    "spec",
    ["", "IID", "iid:3", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:x",
     "zipf", "zipf:-0.5", "zipf:inf", "column", "column:", "natural:shop"],
)  # fmt: skip
def test_unknown_partitions_are_refused_by_name(spec: str) -> None:
    with pytest.raises(PlanError) as refusal:
        parse(spec)
    assert repr(spec) in str(refusal.value)


def test_too_many_participants_and_missing_columns_are_refused() -> None:
    few = _examples([0, 1, 0], customers=["a", "b", "a"])
    with pytest.raises(PlanError, match="3 participants, but only 2 units"):
        _divide("iid", few, few, 3)
    with pytest.raises(PlanError, match="at least 1"):
        _divide("iid", few, few, 0)
    with pytest.raises(PlanError, match="no column 'shop'"):
        _divide("column:shop", few, few, 2)
