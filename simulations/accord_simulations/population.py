"""From a scenario's `[data]` and `[population]` to participants with their own records.

Splits are by a fixed hash of the text, so they depend on neither the seed nor the order of the rows,
and exact duplicates never sit on both sides of the train/test line.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from accord_client.data import EmptyTexts, read_examples, read_hub
from accord_client.examples import Examples, RowCounts
from accord_shared.errors import DataError
from accord_shared.plan import label_text
from accord_simulations.generators import Generated, bank, retail
from accord_simulations.partition import Indices, Shares, parse, partition

HASH_BUCKETS = 10_000
"""Splits are cut at this resolution: fractions are honoured to 0.01 %."""


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Labelled(_Spec):
    """What files and hub data sets have in common."""

    text: str = "text"
    label: str = "label"
    labels: tuple[str, ...] = Field(min_length=2)
    label_texts: tuple[str, ...] = ()
    label_map: dict[str, str] = {}
    unit: str = "row"
    columns: tuple[str, ...] = ()
    empty_texts: EmptyTexts = "refuse"
    delimiter: str = Field(default=",", pattern=r"^[\t -!#-~]$")
    max_cell_lines: int = Field(default=200, ge=1, le=1_000_000)
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    hub: str | None = None
    hub_revision: str | None = None
    hub_train: str = "train"
    hub_test: str = "test"

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: names must differ")
        if self.label_texts and len(self.label_texts) != len(self.labels):
            raise ValueError(f"label_texts: {len(self.label_texts)} names for {len(self.labels)} labels")
        if strays := sorted(set(self.label_map.values()) - set(self.labels)):
            raise ValueError(f"label_map: {strays[0]!r} is not one of the labels")
        return self


class FilesData(_Labelled):
    """Files in the folder that the user gives (`--data`), or the file itself.

    Either `train` and `test`, or one `file` that is split by hash with `test_fraction`. Without
    `--data`, `hub` names the same data set on the Hugging Face hub.
    """

    kind: Literal["files"]
    train: str = "train.csv"
    test: str = "test.csv"
    file: str | None = None

    @field_validator("train", "test", "file")
    @classmethod
    def _inside(cls, name: str | None) -> str | None:
        if name is not None and (PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts):
            raise ValueError(f"{name!r} must be a path inside the data folder")
        return name

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.file is not None and {"train", "test"} & self.model_fields_set:
            raise ValueError("give either `file` (split by hash) or `train` and `test`")
        return self


class HubData(_Labelled):
    """A data set of the Hugging Face hub, or a local folder that `datasets` reads, by `hub` name.

    `hub_test` names the test split; if empty, the training split is split by hash.
    """

    kind: Literal["hub"]
    hub: str


class _Synthetic(_Spec):
    """What the generators have in common: sizes, skews and the share of wrong labels."""

    records_per_participant: int = Field(default=600, ge=20, le=100_000)
    test_records_per_participant: int = Field(default=150, ge=10, le=100_000)
    size_spread: float = Field(default=0.4, ge=0, le=2)
    class_skew: float = Field(default=2.0, gt=0)
    label_noise: float = Field(default=0.06, ge=0, lt=0.5)


class BankDemo(_Synthetic):
    """Synthetic customer messages to banks: see `generators.bank`."""

    kind: Literal["bank-demo"]
    unit: Literal["row"] = "row"
    distractions: float = Field(default=0.08, ge=0, le=1)


class RetailDemo(_Synthetic):
    """Synthetic reviews of chains' customers: see `generators.retail`."""

    kind: Literal["retail-demo"]
    mixed: float = Field(default=0.04, ge=0, le=1)
    unit: Literal["row", "column:customer"] = "row"
    records_per_customer: float = Field(default=3.0, ge=1, le=100)


DataSpec = Annotated[FilesData | HubData | BankDemo | RetailDemo, Field(discriminator="kind")]
"""A scenario's `[data]` table; `kind` is "files", "hub", "bank-demo" or "retail-demo"."""


class PopulationSpec(_Spec):
    """A scenario's `[population]` table.

    `validation_fraction` is carved from the training records, by hash and by whole privacy units,
    before they are shared out: those records serve for tuning and never train.
    """

    participants: int = Field(ge=2, le=1000)
    partition: str = "iid"
    validation_fraction: float = Field(default=0.0, ge=0, le=0.5)

    @field_validator("partition")
    @classmethod
    def _known(cls, spec: str) -> str:
        parse(spec)
        return spec


@dataclass(frozen=True)
class Participant:
    """A simulated site: what it trains on, and test records of its own distribution (maybe none)."""

    name: str
    train: Examples
    test: Examples


@dataclass(frozen=True)
class Population:
    """All participants and the splits of the whole.

    `train` is every participant's training data in participant order; `test` is the whole test
    split. `ceiling` is the accuracy that no classifier can exceed in expectation, where it is known.
    `label_texts` are the labels as people would say them.
    """

    labels: tuple[str, ...]
    label_texts: tuple[str, ...]
    participants: tuple[Participant, ...]
    train: Examples
    test: Examples
    validation: Examples | None
    ceiling: float | None
    source: str
    unit: str = "row"
    """What the units of all these records are, as plans name it."""
    counts: tuple[RowCounts, ...] = ()
    """What became of the rows of every file; none for generated records."""

    def labelled(self, labels: tuple[str, ...]) -> Population:
        """The same records with classes numbered as in `labels`: by name, whatever order the data names them in.

        Raises:
            DataError: records have a label that is not among them.
        """
        if labels == self.labels:
            return self
        place = {label: number for number, label in enumerate(labels)}
        numbers = np.array([place.get(label, -1) for label in self.labels], dtype=np.int64)
        texts = dict(zip(self.labels, self.label_texts, strict=True))

        def renumbered(examples: Examples) -> Examples:
            found = numbers[examples.labels]
            if (found < 0).any():
                label = self.labels[examples.labels[found < 0][0]]
                raise DataError(f"records have the label {label!r}, which is not one of task.labels")
            return replace(examples, labels=found)

        return replace(
            self,
            labels=labels,
            label_texts=tuple(texts.get(label) or label_text(label) for label in labels),
            participants=tuple(
                Participant(one.name, renumbered(one.train), renumbered(one.test)) for one in self.participants
            ),
            train=renumbered(self.train),
            test=renumbered(self.test),
            validation=None if self.validation is None else renumbered(self.validation),
        )

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of every record of every participant and split, in order."""
        hasher = hashlib.sha256(repr((self.labels, [one.name for one in self.participants])).encode())
        parts = [split for one in self.participants for split in (one.train, one.test)]
        for part in (*parts, self.test, self.validation or self.test.take([])):
            hasher.update(f"|{len(part)}|".encode())
            for text in part.texts:
                data = text.encode()
                hasher.update(len(data).to_bytes(8, "big") + data)
            hasher.update(part.labels.tobytes())
            hasher.update(part.units.tobytes())
        return hasher.hexdigest()


def label_names(data: FilesData | HubData | BankDemo | RetailDemo) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels and how people would say them, before any record is read."""
    if isinstance(data, BankDemo):
        return bank.LABELS, bank.LABEL_TEXTS
    if isinstance(data, RetailDemo):
        return retail.LABELS, retail.LABEL_TEXTS
    return data.labels, data.label_texts or tuple(label_text(label) for label in data.labels)


def build(
    data: FilesData | HubData | BankDemo | RetailDemo,
    population: PopulationSpec,
    *,
    path: Path | None,
    seed: int,
) -> Population:
    """Loads or generates the data, splits it and shares it out. The same arguments, the same population.

    `path` is the user's `--data`, for `files` only; `seed` is the run's public seed.

    Raises:
        DataError: the data is missing or does not fit (file and row named), or a split is empty.
        PlanError: the partition does not fit the data.
    """
    whole = _load(data, population, path, seed)
    train, validation = _carve(whole.train, _unit_column(data), population.validation_fraction)
    # PCG64 on a public seed: reproducible, and nothing here is secret
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x5A])))
    shares = partition(
        population.partition, train=train, test=whole.test, participants=population.participants, rng=rng
    )
    return Population(
        labels=whole.labels,
        label_texts=whole.label_texts,
        participants=_participants(shares, train, whole.test, _prefix(data)),
        train=train.take(np.concatenate(shares.train)),
        test=whole.test,
        validation=validation,
        ceiling=whole.ceiling,
        source=whole.source,
        unit=data.unit,
        counts=whole.counts,
    )


def text_bucket(text: str, salt: str = "") -> int:
    """The text's bucket, 0..HASH_BUCKETS-1: SHA-256 of salt + normalised text, big-endian, modulo.

    Normalised: NFKC, case-folded, runs of white space to one blank. This function is frozen: a change
    would move records between splits of published results.
    """
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(hashlib.sha256((salt + normal).encode()).digest()) % HASH_BUCKETS


def hash_split(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    """Splits by `text_bucket` into (train, test); about `fraction` of the distinct texts are test.

    Raises:
        DataError: one side would be empty.
    """
    rest, cut = _below(examples.texts, fraction, salt="")
    if not len(rest) or not len(cut):
        raise DataError(f"{len(examples)} records are too few for a test split of {fraction}")
    return examples.take(rest), examples.take(cut)


def _carve(train: Examples, unit_column: str | None, fraction: float) -> tuple[Examples, Examples | None]:
    """(train, validation), with whole units on one side; another salt than the test split's."""
    if fraction == 0:
        return train, None
    keys = train.texts if unit_column is None else train.columns[unit_column].tolist()
    rest, cut = _below(keys, fraction, salt="validation\n")
    if not len(rest) or not len(cut):
        raise DataError(f"{len(train)} training records are too few for a validation fraction of {fraction}")
    return train.take(rest), train.take(cut)


def _below(keys: Iterable[str], fraction: float, salt: str) -> tuple[Indices, Indices]:
    chosen = np.array([text_bucket(key, salt) < round(fraction * HASH_BUCKETS) for key in keys], dtype=bool)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


# --- where the records come from

_Read = tuple[Examples, Examples, str, tuple[RowCounts, ...]]
"""Training and test records, where they come from, and the rows of each source."""


def _load(
    data: FilesData | HubData | BankDemo | RetailDemo,
    population: PopulationSpec,
    path: Path | None,
    seed: int,
) -> Generated:
    if path is not None and data.kind != "files":
        raise DataError(f'data of kind "{data.kind}" takes no --data; {path} would be ignored')
    if isinstance(data, BankDemo):
        knobs = data.model_dump(exclude={"kind", "unit"})
        return bank.generate(participants=population.participants, seed=seed, **knobs)
    if isinstance(data, RetailDemo):
        knobs = data.model_dump(exclude={"kind"})
        return retail.generate(participants=population.participants, seed=seed, **knobs)
    train, test, source, counts = _labelled(data, population, path)
    return Generated(*label_names(data), train, test, None, source, counts)


def _labelled(data: FilesData | HubData, population: PopulationSpec, path: Path | None) -> _Read:
    if isinstance(data, FilesData) and path is not None:
        return _from_files(data, population, path)
    if data.hub is not None:
        return _from_hub(data, population, data.hub)
    wanted = data.file if isinstance(data, FilesData) and data.file else "train and test files"
    raise DataError(f"no data given: pass --data PATH, a folder with {wanted} or the file itself")


def _from_files(data: FilesData, population: PopulationSpec, path: Path) -> _Read:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    single = path if path.is_file() else path / data.file if data.file else None
    if single is not None:
        whole = _read(data, population, single)
        said = f"{single.name}, split by hash ({data.test_fraction:g} test)"
        return *hash_split(whole, data.test_fraction), said, _counts(whole)
    train, test = (_read(data, population, path / name) for name in (data.train, data.test))
    return train, test, f"{data.train} and {data.test}", _counts(train, test)


def _counts(*read: Examples) -> tuple[RowCounts, ...]:
    return tuple(examples.counts for examples in read if examples.counts is not None)


def _read(data: FilesData, population: PopulationSpec, path: Path) -> Examples:
    return read_examples(
        path,
        text=data.text,
        label=data.label,
        labels=data.labels,
        unit=data.unit,
        columns=_columns(data, population),
        label_map=data.label_map,
        empty_texts=data.empty_texts,
        delimiter=data.delimiter,
        max_cell_lines=data.max_cell_lines,
    )


def _from_hub(data: FilesData | HubData, population: PopulationSpec, hub: str) -> _Read:
    def read(split: str) -> Examples:
        return read_hub(
            hub,
            split,
            text=data.text,
            label=data.label,
            labels=data.labels,
            unit=data.unit,
            columns=_columns(data, population),
            label_map=data.label_map,
            empty_texts=data.empty_texts,
            revision=data.hub_revision,
        )

    revision = f"@{data.hub_revision}" if data.hub_revision else ""
    if data.hub_test:
        train, test = read(data.hub_train), read(data.hub_test)
        return train, test, f"hub:{hub}{revision}", _counts(train, test)
    whole = read(data.hub_train)
    said = f"hub:{hub}{revision}, split by hash ({data.test_fraction:g} test)"
    return *hash_split(whole, data.test_fraction), said, _counts(whole)


def _columns(data: FilesData | HubData, population: PopulationSpec) -> tuple[str, ...]:
    """The columns to keep, the partition's among them."""
    column = parse(population.partition).column
    return tuple(dict.fromkeys((*data.columns, *filter(None, [column]))))


def _unit_column(data: FilesData | HubData | BankDemo | RetailDemo) -> str | None:
    return data.unit.partition(":")[2] or None


# --- participants


def _participants(shares: Shares, train: Examples, test: Examples, prefix: str) -> tuple[Participant, ...]:
    width = max(2, len(str(len(shares.train))))
    names = shares.names or tuple(f"{prefix}-{i:0{width}d}" for i in range(1, len(shares.train) + 1))
    return tuple(
        Participant(name, train.take(rows), test if len(own) == len(test) else test.take(own))
        for name, rows, own in zip(names, shares.train, shares.test, strict=True)
    )


def _prefix(data: FilesData | HubData | BankDemo | RetailDemo) -> str:
    return {"bank-demo": "bank", "retail-demo": "chain"}.get(data.kind, "site")
