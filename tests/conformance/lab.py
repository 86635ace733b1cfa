"""Sites on synthetic embeddings: the deployed `Site`, without a pretrained model to load.

Workspaces find the embeddings in the cache under the digest that the plan names, as a simulated participant
does; everything from the request to the reply is product code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from accord_client.data import Examples
from accord_client.features import FeatureCache
from accord_client.site import Site
from accord_client.store import SiteStore
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.noise import SecureGenerator
from accord_shared.messages import Enquiry, Message, TrainReply, TrainRequest
from accord_shared.plan import Plan, make_plan
from accord_shared.vectors import Vector


def lab_plan(changes: dict[str, Any] | None = None, *, labels: int = 5) -> Plan:
    """A private plan of four rounds without secure aggregation, its model known by digest alone."""
    table: dict[str, Any] = {
        "run": {"name": "lab", "rounds": 4},
        "model": {"source": "path:absent", "digest": "sha256:" + "0" * 64},
        "task": {"labels": [f"class {index}" for index in range(labels)]},
        "adapter": {"depth": "head", "init": "zeros", "features": "pooled"},
        "local": {"expected_records": 12, "clip_norm": 0.5, "learning_rate": 0.7},
        "privacy": {"noise": "site", "epsilon": 4.0},
        "cohort": {"size": 2, "minimum": 1},
        "secure_aggregation": {"mode": "off"},
    }
    return make_plan(table).revised(changes or {})


@dataclass
class Lab:
    """One participant: its records as embeddings [n, d], its folder, and what its coordinator sends.

    `zero_gradients` makes every embedding 0, so that updates are noise alone.
    """

    folder: Path
    records: int = 12
    width: int = 16
    zero_gradients: bool = False
    units: tuple[int, ...] | None = None
    data_seed: int = 0
    examples: Examples = field(init=False)

    def __post_init__(self) -> None:
        units = self.units or tuple(range(self.records))
        generator = np.random.default_rng(self.data_seed)
        self.examples = Examples(
            texts=tuple(f"record {self.data_seed}/{index}" for index in range(self.records)),
            labels=generator.integers(0, 5, self.records),
            units=np.asarray(units, dtype=np.int64),
        )
        self.embeddings = generator.normal(size=(self.records, self.width)).astype(np.float32)
        if self.zero_gradients:
            self.embeddings[:] = 0.0

    def workspace(self, plan: Plan) -> Workspace:
        """The product's workspace, its embeddings in the cache."""
        workspace = Workspace(plan, FeatureCache(self.folder / "cache"), Runtime())
        names = np.random.default_rng(99).normal(size=(len(plan.task.labels), self.width)).astype(np.float32)
        workspace.keep_embeddings(plan.task.texts, names)
        workspace.keep_embeddings(self.examples.texts, self.embeddings)
        return workspace

    def store(self) -> SiteStore:
        """The durable state."""
        return SiteStore(self.folder / "site")

    def site(self, name: str = "site-a", generator: SecureGenerator | None = None, **options: Any) -> Site:
        """A freshly started site on the folder; it takes any plan unless `options` say otherwise."""
        workspaces: dict[str, Workspace] = {}

        def workspace_of(plan: Plan) -> Workspace:
            return workspaces.setdefault(plan.hash, self.workspace(plan))

        return Site(
            name,
            **{"accept_without_privacy": True, "least_secure_aggregation": "off", **options},
            store=self.store(),
            workspace_of=workspace_of,
            examples_of=lambda _: self.examples,
            generator=generator,
        )

    def joined(self, plan: Plan, **options: Any) -> Site:
        """A freshly started site that has joined the plan."""
        site = self.site(**options)
        join(site, plan)
        return site


def join(site: Site, plan: Plan, run_id: str = "run") -> Message:
    """Send the plan."""
    return site.handle(Enquiry(PROTOCOL_VERSION, run_id, plan.to_json(), plan.hash, ""))


def dimension(plan: Plan, lab: Lab) -> int:
    """Trainable parameters."""
    return len(plan.task.labels) * lab.width


def request(plan: Plan, number: int, weights: Vector, *, run_id: str = "run", attempt: int = 1) -> TrainRequest:
    """The request of one round."""
    return TrainRequest(PROTOCOL_VERSION, run_id, plan.hash, number, attempt, weights)


def joint_weights(plan: Plan, lab: Lab, number: int) -> Vector:
    """What the lab's coordinator sends in a round: fixed, so that a repeated request is the same request."""
    start = np.random.default_rng([7, number]).normal(size=dimension(plan, lab))
    return (0.01 * start).astype(np.float32)


def trained(answer: Message) -> TrainReply:
    """The answer as an update; an AssertionError where the site refused."""
    assert isinstance(answer, TrainReply), answer
    return answer


def ask(site: Site, plan: Plan, lab: Lab, number: int, **options: Any) -> Message:
    """One round's request to the site."""
    return site.handle(request(plan, number, joint_weights(plan, lab, number), **options))


def clipped_sum(lab: Lab, plan: Plan) -> npt.NDArray[np.float64]:
    """Σ of clipped per-unit gradients [5, width] at zero weights and sampling rate 1, by hand in fp64."""
    assert plan.local.clip_norm is not None
    features = lab.embeddings.astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    residual = np.full((lab.records, 5), 0.2) - np.eye(5)[lab.examples.labels]
    total = np.zeros((5, lab.width))
    for unit in np.unique(lab.examples.units):
        rows = lab.examples.units == unit
        gradient = residual[rows].T @ features[rows]
        total += gradient * min(1.0, plan.local.clip_norm / np.linalg.norm(gradient))
    return total


class CountingGenerator(SecureGenerator):
    """Counts draws: `gaussian` once a noised step, `bernoulli` once a Poisson sample."""

    def __init__(self, key: bytes | None = None) -> None:
        super().__init__(key)
        self.noised = 0
        self.sampled: list[int] = []

    def gaussian(self, count: int, scale: float = 1.0) -> Any:
        self.noised += 1
        return super().gaussian(count, scale)

    def bernoulli(self, rate: float, count: int) -> Any:
        chosen = super().bernoulli(rate, count)
        self.sampled.append(int(chosen.sum()))
        return chosen
