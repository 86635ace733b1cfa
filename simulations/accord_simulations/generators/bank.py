"""`bank-demo`: messages that customers write to their banks, 12 intents in six pairs of sisters.

Each bank has its own size (log-normal), mix of intents (Dirichlet), dialect, greeting and names for
its products, so "my Nimbus" is a card at one bank and "a Nimbus to my landlord" a transfer at another.
What makes a message hard is language: indirect wording, and a second intent that is mentioned but
settled, denied or postponed, so that only grammar tells which one the customer means.

**Noise ceiling.** A message's text comes from its clean intent alone. The recorded label is the clean
intent with probability 1 - label_noise, and else its sister intent, independently of the text. So no
rule on texts is right more often than 1 - label_noise < 1 in expectation, and knowing the clean intent
attains it. The clean intent is kept in the column `clean_label` for tests; nothing trains on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from accord_client.data import Examples
from accord_simulations.generators import Generated
from accord_simulations.generators._bank_words import (
    ASIDES,
    BRANDS,
    CLOSINGS,
    COMMON,
    DIALECTS,
    DISTRACTIONS,
    GREETINGS,
    INTENTS,
    PRODUCTS,
    Intent,
)
from accord_simulations.generators._grammar import Dice, Slots, expand, sentence, typed
from accord_simulations.generators._sampling import Integers, check_noise, classes, confuse, sizes

LABELS = tuple(intent.name for intent in INTENTS)
LABEL_TEXTS = tuple(intent.text for intent in INTENTS)
SISTER = tuple(LABELS.index(intent.sister) for intent in INTENTS)
"""Per intent, the one that careless labelling confuses it with."""

_TYPOS = 0.18


@dataclass(frozen=True)
class _Bank:
    name: str
    slots: Slots
    mix: npt.NDArray[np.float64]
    greeting_rate: float
    distraction_rate: float


def generate(
    *,
    participants: int,
    seed: int,
    records_per_participant: int = 600,
    test_records_per_participant: int = 150,
    size_spread: float = 0.4,
    class_skew: float = 2.0,
    label_noise: float = 0.06,
    distractions: float = 0.08,
) -> Generated:
    """Draws the banks and their messages; the same arguments give the same records.

    `size_spread` is the σ of the log-normal sizes, `class_skew` the α of each bank's Dirichlet mix of
    intents (small is skewed), `label_noise` the chance of a sister's label, `distractions` the share of
    messages that mention a second intent. Columns: `bank` ("bank-01",
    …) for `partition = "column:bank"`, and `clean_label`. The privacy unit is the message.

    Raises:
        PlanError: `label_noise` outside [0, 0.5).
    """
    check_noise(label_noise)
    dice = Dice(seed, 0xBA)
    banks = [_bank(i, participants, class_skew, distractions, dice) for i in range(participants)]
    factors = (size_spread, 10, dice.rng)
    train = _records(banks, sizes(participants, records_per_participant, *factors), label_noise, dice)
    test = _records(banks, sizes(participants, test_records_per_participant, *factors), label_noise, dice)
    source = f"bank-demo: synthetic messages, {len(LABELS)} intents, {label_noise:g} label noise"
    return Generated(LABELS, LABEL_TEXTS, train, test, 1.0 - label_noise, source)


def _bank(i: int, participants: int, class_skew: float, distractions: float, dice: Dice) -> _Bank:
    width = max(2, len(str(participants)))
    names = dice.rng.permutation(len(PRODUCTS))[:4]
    card, account, app, send = (PRODUCTS[k] for k in names)
    brand = dice.pick(BRANDS[0]) + dice.pick(BRANDS[1])
    own = {
        "brand": (brand,),
        "card": (f"{card} card", f"{card} card", card, "card"),
        "account": (f"{account} account", account, "account"),
        "app": (f"{app} app", app, "app"),
        "transfer": (f"{send} transfer", f"{send} payment", send, "transfer"),
        "greeting": dice.pick(GREETINGS),
    }
    mix = dice.rng.dirichlet(np.full(len(INTENTS), class_skew))
    slots = {**COMMON, **dice.pick(DIALECTS), **own}
    return _Bank(f"bank-{i + 1:0{width}d}", slots, mix, 0.3 + 0.5 * dice.uniform(), distractions)


def _records(banks: list[_Bank], counts: Integers, label_noise: float, dice: Dice) -> Examples:
    owners = np.repeat(np.arange(len(banks)), counts)
    clean = np.concatenate([classes(int(n), b.mix, dice.rng) for b, n in zip(banks, counts, strict=True)])
    texts = tuple(_message(banks[o], c, dice) for o, c in zip(owners.tolist(), clean.tolist(), strict=True))
    return Examples(
        texts=texts,
        labels=confuse(clean, SISTER, label_noise, dice.rng),
        units=np.arange(len(texts), dtype=np.int64),
        columns={
            "bank": np.array([bank.name for bank in banks], dtype=np.str_)[owners],
            "clean_label": np.array(LABELS, dtype=np.str_)[clean],
        },
    )


def _message(bank: _Bank, intent: int, dice: Dice) -> str:
    """One message whose main intent is `intent`."""
    slots = bank.slots
    core = expand(dice.pick(INTENTS[intent].clauses), slots, dice)
    parts = [expand("{greeting}", slots, dice)] if dice.chance(bank.greeting_rate) else []
    if dice.chance(0.2):
        parts.append(expand(dice.pick(ASIDES), slots, dice))
    if dice.chance(bank.distraction_rate):
        parts.append(_distracted(core, _other(intent, dice), slots, dice))
    else:
        parts.append(sentence(core) + ".")
    if dice.chance(0.5):
        parts.append(expand(dice.pick(CLOSINGS), slots, dice))
    return typed(" ".join(parts), dice, _TYPOS)


def _distracted(core: str, other: Intent, slots: Slots, dice: Dice) -> str:
    """The core beside another intent, which the frame marks as settled, denied or postponed."""
    topic = expand(dice.pick(other.topics), slots, dice)
    story = expand(dice.pick(other.clauses), slots, dice)
    frame = expand(dice.pick(DISTRACTIONS), slots, dice)
    filled = frame.replace("<topic>", topic).replace("<story>", story)
    return filled.replace("<Core>", sentence(core)).replace("<core>", core)


def _other(intent: int, dice: Dice) -> Intent:
    """The sister half of the time, otherwise any other intent."""
    if dice.chance(0.5):
        return INTENTS[SISTER[intent]]
    return INTENTS[(intent + 1 + dice.below(len(INTENTS) - 1)) % len(INTENTS)]
