"""`retail-demo`: reviews that shoppers leave at retail chains, negative or positive, in five categories.

Each chain has its own size (log-normal), mix of sentiments and categories (Dirichlet), dialect and
names for its loyalty card, delivery and own brand. Its customers write one or more reviews each, so
`unit = "column:customer"` protects a shopper and not just a line. What makes a review hard is language:
opinions without opinion words, and mixed reviews in which grammar tells which side outweighs.

**Noise ceiling.** A review's text comes from its clean sentiment alone. The recorded label is the clean
one with probability 1 - label_noise, and else the opposite, independently of the text. So no rule on
texts is right more often than 1 - label_noise in expectation, and knowing the clean sentiment attains
it. The clean sentiment is kept in the column `clean_label` for tests; nothing trains on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from accord_client.data import Examples, number_units
from accord_simulations.generators import Generated
from accord_simulations.generators._grammar import Dice, Slots, expand, sentence, typed
from accord_simulations.generators._retail_words import (
    CATEGORIES,
    CHAINS,
    COMMON,
    DIALECTS,
    GREETINGS,
    MIXED,
    NEUTRAL,
    OPENINGS,
    OWN_NAMES,
    PLAIN,
    SERVICE,
    VERDICTS,
)
from accord_simulations.generators._sampling import Integers, check_noise, classes, confuse, sizes

LABELS = ("negative", "positive")
LABEL_TEXTS = ("a disappointed customer", "a satisfied customer")
_OPPOSITE = (1, 0)
_TYPOS = 0.18


@dataclass(frozen=True)
class _Chain:
    name: str
    slots: Slots
    mix: npt.NDArray[np.float64]  # [2] negative, positive
    categories: npt.NDArray[np.float64]  # [5]
    mixed_rate: float


@dataclass(frozen=True)
class _Knobs:
    label_noise: float
    per_customer: float
    unit: str


def generate(
    *,
    participants: int,
    seed: int,
    records_per_participant: int = 600,
    test_records_per_participant: int = 150,
    size_spread: float = 0.4,
    class_skew: float = 2.0,
    label_noise: float = 0.06,
    mixed: float = 0.04,
    records_per_customer: float = 3.0,
    unit: str = "row",
) -> Generated:
    """Draws the chains, their customers and their reviews; the same arguments give the same records.

    `size_spread` is the σ of the log-normal sizes, `class_skew` the α of each chain's Dirichlet mixes
    (small is skewed), `label_noise` the chance of the opposite label, `mixed` the share of reviews that
    mention the other side, `records_per_customer` the mean of a geometric count. Columns: `chain`
    ("chain-01", …) for `partition = "column:chain"`, `category`, `customer` (nobody is in both train and
    test) and `clean_label`. `unit` is "row" or "column:customer".

    Raises:
        PlanError: `label_noise` outside [0, 0.5).
    """
    check_noise(label_noise)
    dice = Dice(seed, 0x5E)
    chains = [_chain(i, participants, class_skew, mixed, dice) for i in range(participants)]
    counts = sizes(participants, records_per_participant, size_spread, 10, dice.rng)
    test_counts = sizes(participants, test_records_per_participant, size_spread, 10, dice.rng)
    knobs = _Knobs(label_noise, records_per_customer, unit)
    train = _records(chains, counts, "c", knobs, dice)
    test = _records(chains, test_counts, "t", knobs, dice)
    source = f"retail-demo: synthetic reviews, {label_noise:g} label noise"
    return Generated(LABELS, LABEL_TEXTS, train, test, 1.0 - label_noise, source)


def _chain(i: int, participants: int, class_skew: float, mixed: float, dice: Dice) -> _Chain:
    width = max(2, len(str(participants)))
    loyalty, service, label = (OWN_NAMES[k] for k in dice.rng.permutation(len(OWN_NAMES))[:3])
    own = {
        "chain": (dice.pick(CHAINS[0]) + dice.pick(CHAINS[1]),),
        "loyalty": (loyalty,),
        "service": (f"{service} delivery", f"{service} pick-up", service),
        "label": (label,),
        "greeting": dice.pick(GREETINGS),
    }
    return _Chain(
        name=f"chain-{i + 1:0{width}d}",
        slots={**COMMON, **dice.pick(DIALECTS), **own},
        mix=dice.rng.dirichlet(np.full(2, 2 * class_skew)),
        categories=dice.rng.dirichlet(np.full(len(CATEGORIES), class_skew)),
        mixed_rate=mixed,
    )


def _records(chains: list[_Chain], counts: Integers, kind: str, knobs: _Knobs, dice: Dice) -> Examples:
    owners = np.repeat(np.arange(len(chains)), counts)
    pairs = list(zip(chains, counts.tolist(), strict=True))
    clean = np.concatenate([classes(n, chain.mix, dice.rng) for chain, n in pairs])
    category = np.concatenate([classes(n, chain.categories, dice.rng) for chain, n in pairs])
    customers = [name for chain, n in pairs for name in _customers(chain, n, kind, knobs.per_customer, dice)]
    rows = zip(owners.tolist(), category.tolist(), clean.tolist(), strict=True)
    texts = tuple(_review(chains[owner], c, sentiment, dice) for owner, c, sentiment in rows)
    return Examples(
        texts=texts,
        labels=confuse(clean, _OPPOSITE, knobs.label_noise, dice.rng),
        units=number_units(range(len(texts)) if knobs.unit == "row" else customers),
        columns={
            "chain": np.array([chain.name for chain in chains], dtype=np.str_)[owners],
            "category": np.array([c.name for c in CATEGORIES], dtype=np.str_)[category],
            "customer": np.array(customers, dtype=np.str_),
            "clean_label": np.array(LABELS, dtype=np.str_)[clean],
        },
    )


def _customers(chain: _Chain, count: int, kind: str, mean: float, dice: Dice) -> list[str]:
    """A customer id per review of the chain, [count]: geometric numbers of reviews, in random order."""
    repeats = dice.rng.geometric(1 / mean, size=count)  # enough customers even at one review each
    ids = np.repeat(np.arange(count), repeats)[:count]
    return [f"{chain.name}-{kind}{i:05d}" for i in dice.rng.permutation(ids).tolist()]


def _review(chain: _Chain, category: int, sentiment: int, dice: Dice) -> str:
    """One review of something in the category whose overall sentiment is `sentiment`."""
    slots = {**chain.slots, "item": (dice.pick(CATEGORIES[category].goods),)}
    main = _opinion(category, sentiment, slots, dice)
    parts = [expand(dice.pick(OPENINGS), slots, dice)] if dice.chance(0.5) else []
    if dice.chance(chain.mixed_rate):
        other = _opinion(category, 1 - sentiment, slots, dice)
        parts.append(_weighed(expand(dice.pick(MIXED), slots, dice), main, other))
    else:
        parts.append(sentence(main) + ".")
        second = _opinion(category, sentiment, slots, dice)
        if dice.chance(0.7) and second != main:
            parts.append(sentence(second) + ".")
    if dice.chance(0.25):
        parts.append(sentence(expand(dice.pick(NEUTRAL), slots, dice)))
    if dice.chance(0.7):
        parts.append(expand(dice.pick(VERDICTS[LABELS[sentiment]]), slots, dice))
    return typed(" ".join(parts), dice, _TYPOS)


def _opinion(category: int, sentiment: int, slots: Slots, dice: Dice) -> str:
    goods, draw = CATEGORIES[category], dice.uniform()
    clauses = (goods.bad, goods.good)[sentiment]
    if draw < 0.2:
        clauses = SERVICE[LABELS[sentiment]]
    elif draw < 0.5:
        clauses = PLAIN[LABELS[sentiment]]
    return expand(dice.pick(clauses), slots, dice)


def _weighed(frame: str, main: str, other: str) -> str:
    filled = frame.replace("<main>", main).replace("<Main>", sentence(main))
    return filled.replace("<other>", other).replace("<Other>", sentence(other))
