"""The federation that is attacked: product sites, product rounds, product sums, in this process, and a recorder.

From a record to what the coordinator decodes nothing is the audit's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from accord_client.data import Examples
from accord_client.members import LocalMembers
from accord_client.site import Site
from accord_client.workspace import Workspace
from accord_server.aggregation import Aggregate, Aggregation, Begin, PlainAggregation, unnoted
from accord_server.exchange import Exchange, LocalExchange, Reply
from accord_server.secagg import SecureAggregation
from accord_shared import PROTOCOL_VERSION
from accord_shared.errors import Interrupted, RoundAborted
from accord_shared.identity import Identity
from accord_shared.messages import Enquiry, MaskRequest, Message, TrainReply, TrainRequest
from accord_shared.plan import Plan
from accord_shared.vectors import Vector
from accord_simulations.audit.gradients import Floats
from accord_simulations.participants import WorkFolder
from accord_simulations.vault import SimulatedRoster

RUN_ID = "audit"
Array = npt.NDArray[np.float64]
Watch = Callable[[int, int], None]
"""Called with how much is done, of how much."""


def ignore(_done: int, _of: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Release:
    """What an attacker sees of one round: the weights [P] that it was asked at, and sums [P] of the updates of `sites`.

    Under shared noise that is the one sum which secure aggregation opens; under `site` noise, which promises that each
    update may be seen, it is every update by itself.
    """

    round: int
    weights: Vector
    sums: tuple[tuple[tuple[str, ...], Array], ...]
    unnoised: dict[str, Array] = field(default_factory=dict)
    """What sites put under shared noise, for tests of that noise: no attacker sees it."""


@dataclass(frozen=True)
class Attacked:
    """Sites with their records, and what sums their updates."""

    plan: Plan
    exchange: LocalExchange
    aggregation: Aggregation
    unnoised: dict[str, Array]
    """What each site put under shared noise last."""

    @staticmethod
    def make(
        plan: Plan,
        workspace: Workspace,
        work: WorkFolder,
        members: Sequence[tuple[str, Examples]],
    ) -> Attacked:
        """Start the sites and let them join.

        Raises:
            AccordError: a site refuses the plan.
        """
        secured = plan.secure_aggregation.mode != "off"
        names = tuple(name for name, _ in members)
        roster = SimulatedRoster.make(plan, names) if secured else None
        unnoised: dict[str, Array] = {}
        handlers = {
            name: _site(plan, workspace, work, index, members[index], roster, unnoised).handle
            for index, name in enumerate(names)
        }
        accepted = roster.signed.roster if roster is not None else None
        exchange = LocalExchange(
            handlers,
            Enquiry(PROTOCOL_VERSION, RUN_ID, plan.to_json(), plan.hash, accepted.hash if accepted else ""),
        )
        exchange.join()
        aggregation: Aggregation = PlainAggregation(plan.extra_coordinates)
        if accepted is not None:
            dimension = workspace.model.layout.dimension
            aggregation = SecureAggregation(plan, accepted, dimension, work.noise_multiplier)
        return Attacked(plan, exchange, aggregation, unnoised)

    def first_round(self, weights: Vector, stopping: Callable[[], bool] = lambda: False) -> Release:
        """The release of the first round at `weights` [P], for attacks on a single one.

        Raises:
            RoundAborted: a site did not finish.
            Interrupted: asked to stop.
        """
        seen: list[Release] = []
        request = TrainRequest(PROTOCOL_VERSION, RUN_ID, self.plan.hash, 1, 1, weights)
        sites = tuple(self.exchange.sites())
        aggregate = Recorder(self.aggregation, seen.append, stopping, self.unnoised).collect(
            request, sites, self.exchange
        )
        if len(aggregate.survivors) != len(sites):
            raise RoundAborted("; ".join(aggregate.failures.values()) or "no sum was opened")
        return seen[0]


def _site(
    plan: Plan,
    workspace: Workspace,
    work: WorkFolder,
    index: int,
    member: tuple[str, Examples],
    roster: SimulatedRoster | None,
    unnoised: dict[str, Array],
) -> Site:
    name, examples = member
    own = LocalMembers(name, Identity.from_seeds(*roster.seeds[index]), roster.signed.roster) if roster else None
    return _WatchedSite(
        name,
        unnoised=unnoised,
        store=work.store(index),
        workspace_of=lambda _: workspace,
        examples_of=lambda _: examples,
        noise_multiplier_of=lambda _: work.noise_multiplier,
        members=own,
        least_secure_aggregation=plan.secure_aggregation.mode,
        accept_without_privacy=plan.privacy.noise == "none",
    )


class _WatchedSite(Site):
    """A site of which the harness knows what it put under shared noise, so that the noise alone can be tested."""

    def __init__(self, name: str, *, unnoised: dict[str, Array], **rest: Any) -> None:
        super().__init__(name, **rest)
        self._seen = unnoised

    def _unnoised(self, request: MaskRequest, plan: Plan) -> Array:
        self._seen[self.name] = super()._unnoised(request, plan)
        return self._seen[self.name].copy()


class Recorder:
    """An `Aggregation` that shows each round's release to `watch`, and changes nothing."""

    def __init__(
        self,
        inner: Aggregation,
        watch: Callable[[Release], None],
        stopping: Callable[[], bool] = lambda: False,
        unnoised: Mapping[str, Array] | None = None,
    ) -> None:
        self.trips, self.bound = inner.trips, inner.bound
        self._inner, self._watch, self._stopping = inner, watch, stopping
        self._unnoised = unnoised if unnoised is not None else {}

    def collect(
        self, request: TrainRequest, cohort: tuple[str, ...], exchange: Exchange, begin: Begin = unnoted
    ) -> Aggregate:
        """As the inner aggregation's.

        Raises:
            Interrupted: asked to stop.
        """
        if self._stopping():
            raise Interrupted("asked to stop: an audit keeps nothing of an unfinished run")
        listening = _Listening(exchange)
        aggregate = self._inner.collect(request, cohort, listening, begin)
        sums: tuple[tuple[tuple[str, ...], Array], ...] = ((aggregate.survivors, aggregate.total),)
        if listening.updates:
            sums = tuple(((site,), update.astype(np.float64)) for site, update in listening.updates.items())
        if aggregate.survivors:
            self._watch(Release(request.round, request.weights, sums, dict(self._unnoised)))
        return aggregate


class _Listening:
    """An `Exchange` that keeps the plain updates which come through it."""

    def __init__(self, inner: Exchange) -> None:
        self.enquiry, self.joined = inner.enquiry, inner.joined
        self.updates: dict[str, Vector] = {}
        self._inner = inner

    def sites(self) -> Sequence[str]:
        return self._inner.sites()

    def present(self) -> Sequence[str]:
        return self._inner.present()

    def restarted(self) -> frozenset[str]:
        return self._inner.restarted()

    def ready(self, minimum: int, among: Collection[str] | None = None) -> bool:
        return self._inner.ready(minimum, among)

    def rest(self, in_vain: int) -> None:
        self._inner.rest(in_vain)

    def send(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Reply]]:
        for site, reply in self._inner.send(requests):
            if isinstance(reply, TrainReply):
                self.updates[site] = reply.update
            yield site, reply


def gradient_sum(plan: Plan, total: Array, shape: tuple[int, ...]) -> Floats:
    """The sum of gradients [L, d] that an update [P, and extra coordinates] of one step of sgd is."""
    local = plan.local
    scale = -local.sampling_rate * local.expected_records / local.learning_rate
    return (scale * total[: int(np.prod(shape))]).reshape(shape).astype(np.float32)
