"""Canaries: records whose gradients are of norm C, near-orthogonal to each other, and known to the attacker.

A canary is a text with an embedding of its own in the sites' feature cache; from there on it is a record as any other.
Gradients of a linear head are r xᵀ with r near -e_y: the d features of one label are an orthonormal basis, drawn at
random for each label. So L labels hold L·d canaries. Where more are wanted, the plan gets spare classes in which no
real record is: nothing of the mechanism (clipping, noise, sum, accounting) depends on their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from accord_client.data import Examples
from accord_client.workspace import Workspace
from accord_shared.plan import Plan
from accord_simulations.audit.gradients import Floats, Integers
from accord_simulations.audit.one_run import Coins

_SPARE = "canary class"


@dataclass(frozen=True)
class Canaries:
    """`features` [m, d] and `labels` [m], whether each is a `member` [m], and the `site` [m] that would hold it."""

    features: Floats
    labels: Integers
    members: Coins
    site: Integers

    @staticmethod
    def draw(count: int, width: int, sites: int, seed: int) -> Canaries:
        """`count` canaries over `sites`, each a member by a fair coin."""
        dice = np.random.default_rng([seed, 0xCA])
        bases = [np.linalg.qr(dice.normal(size=(width, width)))[0] for _ in range(classes_for(count, width))]
        numbers = np.arange(count, dtype=np.int64)
        return Canaries(
            features=np.concatenate(bases)[:count].astype(np.float32),
            labels=numbers // width,
            members=dice.integers(0, 2, count).astype(np.bool_),
            site=numbers % sites,
        )

    def planted(self, site: int, examples: Examples) -> tuple[Examples, Integers]:
        """The records of a site with its member canaries, each a unit of its own, behind; and which those are."""
        chosen = np.flatnonzero(self.members & (self.site == site))
        units = examples.n_units + np.arange(len(chosen), dtype=np.int64)
        planted = Examples(
            texts=(*examples.texts, *(f"canary {number}" for number in chosen.tolist())),
            labels=np.concatenate([examples.labels, self.labels[chosen]]),
            units=np.concatenate([examples.units, units]),
        )
        return planted, chosen


def classes_for(count: int, width: int) -> int:
    """Labels that hold `count` orthogonal canaries."""
    return math.ceil(count / width)


def with_spare_classes(plan: Plan, count: int, width: int) -> Plan:
    """The plan with as many more classes, an even number, as `count` canaries need."""
    missing = max(0, classes_for(count, width) - len(plan.task.labels))
    spare = [f"{_SPARE} {number}" for number in range(missing + missing % 2)]
    if not spare:
        return plan
    return plan.revised({"task.labels": [*plan.task.labels, *spare], "task.label_texts": [*plan.task.texts, *spare]})


def label_embeddings(own: Floats, classes: int, seed: int) -> Floats:
    """Embeddings [classes, d] of the label texts: the plan's `own` [L, d] and, for spare classes, unit vectors.

    Those come in pairs c ± √(1-|c|²) w around the mean c of the unit `own`: so the mean, on which features are
    centred, stays where it was.
    """
    center = np.mean(own / np.linalg.norm(own, axis=1, keepdims=True), axis=0)
    dice = np.random.default_rng([seed, 0xC1])
    across = dice.normal(size=((classes - len(own)) // 2, own.shape[1]))
    across -= np.outer(across @ center, center) / max(float(center @ center), 1e-12)
    across *= math.sqrt(1.0 - float(center @ center)) / np.linalg.norm(across, axis=1, keepdims=True)
    return np.concatenate([own, center + across, center - across]).astype(np.float32)


def embeddings_of(features: Floats, workspace: Workspace) -> Floats:
    """Pooled embeddings [n, d] that the plan's label frame turns into unit `features` [n, d]."""
    if workspace.plan.adapter.features != "label-centered":
        return features
    center = workspace.frame.center.numpy().astype(np.float64)
    along = features @ center  # |c + a x| = 1
    length = -along + np.sqrt(along**2 + 1.0 - float(center @ center))
    embeddings: npt.NDArray[np.float64] = center + length[:, None] * features
    return embeddings.astype(np.float32)
