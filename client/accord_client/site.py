"""A site: answers the coordinator's messages, or refuses them. The same core in simulation and deployment."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from accord_client.data import Examples
from accord_client.store import Releases, SiteStore
from accord_client.trainer import Batches, train
from accord_client.workspace import Workspace
from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.accounting import noise_multiplier, round_event, run_epsilon
from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import AccordError, BudgetExhausted, DataError, PlanError, PrivacyError, ProtocolError
from accord_shared.messages import Enquiry, Joined, Message, Refusal, TrainReply, TrainRequest
from accord_shared.plan import Plan
from accord_shared.vectors import Vector, check_finite, check_length

log = logging.getLogger(__name__)
_HASH = re.compile(r"[0-9a-f]{64}")


class Site:
    """One participant with its records, its model and its durable privacy state.

    `workspace_of` gives the workspace of a plan and `examples_of` the records that the plan's task reads.
    `noise_multiplier_of` calibrates σ from the plan; a simulation, whose processes would each repeat the same
    search, hands in what it found (it is checked). A plan without noise is refused unless the operator
    accepts it by `accept_without_privacy`. `generator` is for tests alone: neither plan nor command line reaches it.
    """

    def __init__(
        self,
        name: str,
        *,
        store: SiteStore,
        workspace_of: Callable[[Plan], Workspace],
        examples_of: Callable[[Plan], Examples],
        noise_multiplier_of: Callable[[Plan], float] = noise_multiplier,
        accept_without_privacy: bool = False,
        generator: SecureGenerator | None = None,
    ) -> None:
        self.name = name
        self._store = store
        self._workspace_of = workspace_of
        self._examples_of = examples_of
        self._noise_multiplier_of = noise_multiplier_of
        self._accept_without_privacy = accept_without_privacy
        self._generator = generator or SecureGenerator()
        self._plans: dict[str, Plan] = {}
        self._batches: dict[str, Batches] = {}

    def handle(self, message: Message) -> Message:
        """Answer one message; a refusal is an answer too."""
        try:
            if isinstance(message, Enquiry):
                return self._join(message)
            if isinstance(message, TrainRequest):
                return self._train(message)
            raise ProtocolError(f"a site has no answer to {type(message).__name__}")
        except AccordError as error:
            log.warning("%s refuses: %s: %s", self.name, type(error).__name__, error)
            return Refusal.of(error)

    def releases(self, plan: Plan) -> Releases:
        """What this site has released and spent under the plan."""
        return self._store.releases(plan.hash)

    def _join(self, enquiry: Enquiry) -> Joined:
        _check_version(enquiry.protocol)
        plan = Plan.from_json(enquiry.plan_json)
        if plan.hash != enquiry.plan_hash:
            raise ProtocolError("the plan does not have the hash that came with it")
        if plan.privacy.noise == "none" and not self._accept_without_privacy:
            raise PlanError('privacy.noise = "none": this site does not train without privacy')
        if plan.privacy.noise in ("cohort", "participant"):
            raise PlanError(f'privacy.noise = "{plan.privacy.noise}" is not implemented at this site')
        self._workspace_of(plan)  # a model that cannot be loaded is told now, and the first round need not wait for it
        self._store.keep_plan(plan.hash, plan.to_json())
        return Joined(site=self.name, protocol=PROTOCOL_VERSION, plan_hash=plan.hash)

    def _plan(self, plan_hash: str) -> Plan:
        if plan_hash not in self._plans:
            text = self._store.plan_json(plan_hash) if _HASH.fullmatch(plan_hash) else None
            if text is None:
                raise ProtocolError(f"plan {plan_hash[:12]}… was never joined")
            plan = Plan.from_json(text)
            if plan.hash != plan_hash:
                raise PrivacyError("the stored plan is not the one of this hash")
            self._plans[plan_hash] = plan
        return self._plans[plan_hash]

    def _train(self, request: TrainRequest) -> TrainReply:
        _check_version(request.protocol)
        plan = self._plan(request.plan_hash)
        if not 1 <= request.round <= plan.run.rounds:
            raise ProtocolError(f"round {request.round} of a plan of {plan.run.rounds} rounds")
        with self._store.exclusive():  # one at a time, over all processes: check, train and charge are one step
            spent = self._store.releases(request.plan_hash)
            if request.round <= spent.last_round:
                return self._again(request, spent)
            self._check_budget(plan, spent)
            return self._release(request, plan)

    def _again(self, request: TrainRequest, spent: Releases) -> TrainReply:
        """Resend the finished update unchanged: the same bytes cost nothing more."""
        if request.round != spent.last_round or request.model_hash != spent.last_model:
            raise ProtocolError(f"round {request.round} was released before, from other weights")
        return _reply(request, self._store.last_update(spent))

    def _check_budget(self, plan: Plan, spent: Releases) -> None:
        if spent.rounds >= plan.rounds_per_site:
            raise BudgetExhausted(f"all {plan.rounds_per_site} rounds that the plan grants a site are released")
        if plan.privacy.noise != "none" and spent.steps + plan.local.steps_per_round > plan.steps:
            raise BudgetExhausted(f"{spent.steps} of the plan's {plan.steps} steps are spent")

    def _release(self, request: TrainRequest, plan: Plan) -> TrainReply:
        workspace = self._workspace_of(plan)
        check_length(request.weights, workspace.model.layout.dimension)
        check_finite(request.weights, "the joint weights")
        sigma = self._noise_multiplier_of(plan)
        event = round_event(plan, sigma)
        if event is not None and run_epsilon(plan, event) > (plan.privacy.epsilon or 0.0):
            raise BudgetExhausted(f"noise multiplier {sigma:g} would spend more than the plan's epsilon")
        result = train(
            workspace.model,
            self._records(plan, workspace),
            plan.local,
            request.weights,
            noise_multiplier=0.0 if event is None else sigma,
            generator=self._generator,
            runtime=workspace.runtime,
        )
        self._store.release(request.plan_hash, request.round, request.model_hash, result.update, event)
        return _reply(request, result.update)

    def _records(self, plan: Plan, workspace: Workspace) -> Batches:
        if plan.hash not in self._batches:
            examples = self._examples_of(plan)
            if not len(examples):
                raise DataError(f"{self.name} has no records")
            self._batches[plan.hash] = workspace.batches(examples)
        return self._batches[plan.hash]


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the coordinator speaks protocol {version}, this site {PROTOCOL_VERSION}")


def _reply(request: TrainRequest, update: Vector) -> TrainReply:
    check_finite(update, "the update")  # after its charge: how often noise overflows tells of what it hides
    return TrainReply(run_id=request.run_id, round=request.round, attempt=request.attempt, update=update)
