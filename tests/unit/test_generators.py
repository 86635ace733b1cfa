"""Synthetic populations keep their promises; `build` loads, splits and shares out."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from accord_client.data import Examples
from accord_shared.errors import DataError, PlanError
from accord_simulations.generators import Generated, bank, retail
from accord_simulations.generators._grammar import Dice, expand
from accord_simulations.population import DataSpec, Population, PopulationSpec, build, hash_split, text_bucket

REAL = Path(__file__).parents[3] / "shared" / "data"
DATA: TypeAdapter[object] = TypeAdapter(DataSpec)
GENERATORS = pytest.mark.parametrize("generator", [bank, retail], ids=["bank", "retail"])


def _build(data: dict[str, object], path: Path | None = None, seed: int = 3, **population: object) -> Population:
    spec = PopulationSpec(**{"participants": 4, **population})  # type: ignore[arg-type]
    return build(DATA.validate_python(data), spec, path=path, seed=seed)  # type: ignore[arg-type]


def _clean(generated: Generated, examples: Examples) -> np.ndarray:
    return np.array([generated.labels.index(name) for name in examples.columns["clean_label"].tolist()])


# --- the generators


@GENERATORS
def test_the_same_seed_gives_the_same_records(generator: object) -> None:
    one, two, other = (generator.generate(participants=3, seed=s) for s in (1, 1, 2))  # type: ignore[attr-defined]
    assert one.train.texts == two.train.texts
    assert one.test.labels.tolist() == two.test.labels.tolist()
    assert one.train.texts != other.train.texts


@GENERATORS
def test_knowing_the_clean_class_reaches_exactly_the_ceiling(generator: object) -> None:
    g = generator.generate(participants=10, seed=5, label_noise=0.1)  # type: ignore[attr-defined]
    for examples in (g.train, g.test):
        accuracy = float((_clean(g, examples) == examples.labels).mean())
        standard_error = math.sqrt(0.1 * 0.9 / len(examples))
        assert g.ceiling == pytest.approx(0.9)
        assert abs(accuracy - 0.9) < 4 * standard_error
        # the same check rejects 2/3 and 3/2 of the stated noise on the larger split
        if examples is g.train:
            assert abs(accuracy - (1 - 0.1 * 2 / 3)) > 4 * standard_error
            assert abs(accuracy - (1 - 0.1 * 3 / 2)) > 4 * standard_error


@GENERATORS
def test_noise_ignores_the_text_given_the_clean_class(generator: object) -> None:
    g = generator.generate(participants=20, seed=6, label_noise=0.1)  # type: ignore[attr-defined]
    clean = _clean(g, g.train)
    flipped = clean != g.train.labels
    traits = {
        "long": np.array([len(t) > 120 for t in g.train.texts]),
        "lower case": np.array([t == t.lower() for t in g.train.texts]),
        "ends without a stop": np.array([t[-1] not in ".?" for t in g.train.texts]),
        "first bank": np.arange(len(g.train)) < len(g.train) // 20,
        **{label: clean == i for i, label in enumerate(g.labels)},
    }
    for name, trait in traits.items():
        standard_error = math.sqrt(0.09 / trait.sum())
        assert abs(flipped[trait].mean() - 0.1) < 4.5 * standard_error, name


@GENERATORS
def test_a_text_belongs_to_one_clean_class(generator: object) -> None:
    g = generator.generate(participants=20, seed=7)  # type: ignore[attr-defined]
    meanings: dict[str, set[int]] = {}
    for examples in (g.train, g.test):
        for text, label in zip(examples.texts, _clean(g, examples).tolist(), strict=True):
            meanings.setdefault(text, set()).add(label)
    assert all(len(labels) == 1 for labels in meanings.values())


def test_a_flipped_bank_label_is_the_sister_intent() -> None:
    g = bank.generate(participants=5, seed=8)
    clean, recorded = _clean(g, g.train), g.train.labels
    sister = np.array(bank.SISTER)
    assert set(recorded[recorded != clean] == sister[clean[recorded != clean]]) == {True}
    assert sister[sister].tolist() == list(range(len(sister)))
    assert (sister != np.arange(len(sister))).all()


@GENERATORS
def test_texts_are_diverse_and_complete(generator: object) -> None:
    g = generator.generate(participants=10, seed=9)  # type: ignore[attr-defined]
    assert len(set(g.train.texts)) > 0.9 * len(g.train)
    assert not [t for t in g.train.texts if set(t) & set("{}[]<>|") or "  " in t]
    assert g.train.label_counts(len(g.labels)).min() > 0.01 * len(g.train)


@GENERATORS
def test_participants_differ_in_size_mix_and_words(generator: object) -> None:
    g = generator.generate(participants=10, seed=10)  # type: ignore[attr-defined]
    names = g.train.columns["bank" if generator is bank else "chain"]
    rows = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    sizes = [len(r) for r in rows]
    assert len(sizes) == 10
    assert max(sizes) > 1.5 * min(sizes)
    assert 300 < np.mean(sizes) < 900
    mixes = np.array([np.bincount(g.train.labels[r], minlength=len(g.labels)) / len(r) for r in rows])
    assert mixes.std(axis=0).max() > 0.03


def test_generation_takes_less_than_a_second() -> None:
    started = time.process_time()
    bank.generate(participants=10, seed=11)
    retail.generate(participants=10, seed=11)
    assert time.process_time() - started < 2.0


@GENERATORS
@pytest.mark.parametrize("noise", [0.5, -0.1, float("nan")])
def test_noise_that_hides_the_class_is_refused(generator: object, noise: float) -> None:
    with pytest.raises(PlanError, match="label_noise"):
        generator.generate(participants=2, seed=1, label_noise=noise)  # type: ignore[attr-defined]


def test_customers_have_several_reviews_and_one_chain_and_split() -> None:
    g = retail.generate(participants=5, seed=12, unit="column:customer")
    per_customer = len(g.train) / g.train.n_units
    assert 2 < per_customer < 4
    assert not set(g.train.columns["customer"].tolist()) & set(g.test.columns["customer"].tolist())
    pairs = set(zip(g.train.columns["customer"].tolist(), g.train.columns["chain"].tolist(), strict=True))
    assert len(pairs) == g.train.n_units


def test_slots_and_alternatives_nest() -> None:
    slots = {"a": ("[x|y] {b}",), "b": ("z",)}
    assert {expand("<{a}>", slots, Dice(i)) for i in range(50)} == {"<x z>", "<y z>"}


# --- the hash split


@pytest.mark.parametrize(("text", "bucket"), [("How do I locate my card?", 3817), ("", 6549), ("质量很好", 8112)])
def test_buckets_are_frozen(text: str, bucket: int) -> None:
    assert text_bucket(text) == bucket


def test_buckets_ignore_case_and_white_space() -> None:
    assert text_bucket(" How do\tI  LOCATE my card?\n") == text_bucket("how do i locate my card?")
    assert text_bucket("how", salt="validation\n") != text_bucket("how")


def test_the_hash_split_keeps_duplicates_together_and_ignores_order() -> None:
    texts = tuple(f"text {i % 500}" for i in range(1000))
    whole = Examples(texts, np.zeros(1000, dtype=np.int64), np.arange(1000))
    train, test = hash_split(whole, 0.2)
    assert not set(train.texts) & set(test.texts)
    assert len(train) + len(test) == 1000
    assert abs(len(test) / 1000 - 0.2) < 0.08
    assert set(hash_split(whole.take(np.arange(1000)[::-1]), 0.2)[1].texts) == set(test.texts)
    with pytest.raises(DataError, match="too few"):
        hash_split(whole.take([0]), 0.2)


# --- build


def test_demo_populations_are_built_and_shared_out() -> None:
    people = _build({"kind": "bank-demo", "records_per_participant": 100}, partition="column:bank")
    assert sorted(p.name for p in people.participants) == ["bank-01", "bank-02", "bank-03", "bank-04"]
    assert people.ceiling == pytest.approx(0.94)
    assert people.validation is None
    assert people.train.texts == tuple(t for p in people.participants for t in p.train.texts)
    assert len(people.labels) == len(people.label_texts) == 12


def test_validation_is_carved_by_whole_customers() -> None:
    data = {"kind": "retail-demo", "unit": "column:customer"}
    people = _build(data, validation_fraction=0.2, partition="column:chain")
    assert people.validation is not None
    kept, held = (set(e.columns["customer"].tolist()) for e in (people.train, people.validation))
    assert not kept & held
    assert abs(len(held) / (len(held) + len(kept)) - 0.2) < 0.06


FILES = {"kind": "files", "label": "y", "labels": ["no", "yes"]}


def _folder(tmp_path: Path) -> Path:
    for name, n in (("train.csv", 40), ("test.csv", 10)):
        rows = [f"text {name} {i},{('no', 'yes')[i % 2]},{'abc'[i % 3]}" for i in range(n)]
        (tmp_path / name).write_text("\n".join(["text,y,shop", *rows]))
    return tmp_path


def test_files_are_read_from_a_folder_or_from_one_file(tmp_path: Path) -> None:
    people = _build(FILES, _folder(tmp_path), partition="column:shop", participants=3)
    assert [p.name for p in people.participants] == ["a", "b", "c"]
    assert (len(people.train), len(people.test), people.ceiling) == (40, 10, None)
    single = _build(FILES, tmp_path / "train.csv")
    assert len(single.train) + len(single.test) == 40
    assert [p.name for p in single.participants] == ["site-01", "site-02", "site-03", "site-04"]
    named = _build({**FILES, "file": "train.csv", "label_texts": ["not at all", "yes"]}, tmp_path)
    assert named.train.texts == single.train.texts
    assert (named.label_texts, single.label_texts) == (("not at all", "yes"), ("no", "yes"))


def test_the_seed_decides_the_shares_and_not_the_splits(tmp_path: Path) -> None:
    one, two = (_build(FILES, _folder(tmp_path), seed=seed, validation_fraction=0.2) for seed in (1, 2))
    assert one.validation is not None
    assert two.validation is not None
    assert one.validation.texts == two.validation.texts
    assert one.participants[0].train.texts != two.participants[0].train.texts
    assert sorted(one.train.texts) == sorted(two.train.texts)


def test_data_that_is_not_there_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pass --data PATH"):
        _build(FILES)
    with pytest.raises(DataError, match=r"train\.csv: no such file"):
        _build(FILES, tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        _build(FILES, tmp_path / "nowhere")
    with pytest.raises(DataError, match="takes no --data"):
        _build({"kind": "bank-demo"}, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "files", "labels": ["a"]},
        {"kind": "files", "labels": ["a", "a"]},
        {**FILES, "label_texts": ["one"]},
        {**FILES, "label_map": {"0": "maybe"}},
        {**FILES, "file": "x.csv", "train": "y.csv"},
        {**FILES, "train": "../secret.csv"},
        {**FILES, "file": "/etc/passwd"},
        {**FILES, "colour": "red"},
        {"kind": "hub", "labels": ["a", "b"]},
        {"kind": "bank-demo", "label_noise": 0.5},
        {"kind": "bank-demo", "text": "text"},
        {"kind": "sql"},
    ],
)
def test_contradictory_data_tables_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DATA.validate_python(wrong)


@pytest.mark.parametrize("wrong", [{"participants": 1}, {"participants": 1001}, {"validation_fraction": 0.6}, {"x": 1}])
def test_population_tables_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PopulationSpec(**{"participants": 4, **wrong})  # type: ignore[arg-type]
    with pytest.raises(PlanError):
        PopulationSpec(participants=4, partition="zipf:x")


# --- real data, where it lies beside the checkout


def _real(name: str) -> Path:
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"real data set {name} is not beside the checkout (../shared/data)")
    return folder


def test_banking77_loads() -> None:
    folder = _real("banking77")
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        labels = sorted({row["category"] for row in csv.DictReader(file)})
    data = {"kind": "files", "label": "category", "labels": labels}
    people = _build(data, folder, participants=20, partition="dirichlet:0.3", validation_fraction=0.1)
    assert (len(people.labels), len(people.test)) == (77, 3080)
    assert people.validation is not None
    assert len(people.train) + len(people.validation) == 10_003


REVIEWS = {"kind": "files", "file": "reviews.csv.gz", "labels": ["negative", "positive"]}
SENTIMENT = {"label_map": {"0": "negative", "1": "positive"}}


def test_amazon_reviews_load() -> None:
    data = {**REVIEWS, **SENTIMENT, "text": "reviewText", "label": "Positive"}
    people = _build(data, _real("amazon_reviews"), partition="zipf:1")
    assert len(people.train) + len(people.test) == 20_000
    assert abs(len(people.test) - 4000) < 300


def test_online_shopping_loads_by_category() -> None:
    data = {**REVIEWS, **SENTIMENT, "text": "review", "label": "label"}
    folder = _real("online_shopping")
    with pytest.raises(DataError, match=r"reviews\.csv\.gz, row 36427: the text .* is empty"):
        _build(data, folder, partition="column:cat", participants=10)
    people = _build({**data, "empty_texts": "drop"}, folder, partition="column:cat", participants=10)
    assert {p.name for p in people.participants} >= {"酒店", "书籍", "水果"}
    assert len(people.train) + len(people.test) == 62_773
    assert all(set(p.test.columns["cat"].tolist()) == {p.name} for p in people.participants)
