"""A site: answers the coordinator's messages, or refuses them. The same core in simulation and deployment."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

from accord_client.data import Examples
from accord_client.members import Members
from accord_client.metrics import hold_back, released_counts
from accord_client.store import Releases, SiteStore
from accord_client.trainer import Batches, Runtime, clipped_gradient, clipped_update, train
from accord_client.workspace import Workspace
from accord_shared import PROTOCOL_VERSION
from accord_shared.canonical import decimal_string
from accord_shared.dp.accounting import noise_multiplier, round_event, run_epsilon
from accord_shared.dp.events import Event
from accord_shared.dp.noise import SecureGenerator
from accord_shared.dp.sharing import NoiseShares
from accord_shared.errors import (
    AccordError,
    BudgetExhausted,
    DataError,
    LedgerRolledBack,
    PlanError,
    PrivacyError,
    ProtocolError,
    RoundOpened,
    Withheld,
    printable,
)
from accord_shared.frames import hash_frame
from accord_shared.messages import (
    Enquiry,
    IntroduceRequest,
    Joined,
    MaskedUpload,
    MaskRequest,
    Message,
    Opened,
    OpenRequest,
    Refusal,
    SurvivorsRequest,
    TrainReply,
    TrainRequest,
)
from accord_shared.plan import Plan
from accord_shared.quantize import encode
from accord_shared.receipts import Receipt, Seen
from accord_shared.secagg.keys import RunTerms
from accord_shared.secagg.masking import Words
from accord_shared.vectors import Vector, check_finite, check_length

log = logging.getLogger(__name__)
RESTARTS = 8
"""A coordinator that restarts within a round begins its attempts anew: so often, under `site` noise, it may."""
SecureMode = Literal["malicious", "semi_honest", "off"]
_STRENGTH: dict[str, int] = {"off": 0, "semi_honest": 1, "malicious": 2}


class _Randomness(TypedDict):
    generator: SecureGenerator
    runtime: Runtime


class _Noise(_Randomness):
    noise_multiplier: float


_HASH = re.compile(r"[0-9a-f]{64}")


class Site:
    """One participant with its records, its model and its durable privacy state.

    `workspace_of` gives the workspace of a plan and `examples_of` the records that the plan's task reads.
    `noise_multiplier_of` calibrates σ from the plan; a simulation, whose processes would each repeat the same
    search, hands in what it found (it is checked). A plan without noise is refused unless the operator
    accepts it by `accept_without_privacy`; so is one whose secure aggregation is less than
    `least_secure_aggregation`. `dataset` is the operator's name for the records: its budget in the store's ledger is
    charged. `members` holds the site's identity and the roster it accepted. `generator` is
    for tests alone: neither plan nor command line reaches it.
    """

    def __init__(
        self,
        name: str,
        *,
        store: SiteStore,
        workspace_of: Callable[[Plan], Workspace],
        examples_of: Callable[[Plan], Examples],
        noise_multiplier_of: Callable[[Plan], float] = noise_multiplier,
        members: Members | None = None,
        least_secure_aggregation: SecureMode = "malicious",
        accept_without_privacy: bool = False,
        dataset: str = "default",
        generator: SecureGenerator | None = None,
    ) -> None:
        self.name = name
        self._dataset = dataset
        self._store = store
        self._workspace_of = workspace_of
        self._examples_of = examples_of
        self._noise_multiplier_of = noise_multiplier_of
        self._members = members
        self._least_secure_aggregation = least_secure_aggregation
        self._accept_without_privacy = accept_without_privacy
        self._generator = generator or SecureGenerator()
        self.last_refusal = ""
        """Kind and reason of the last refusal in full, for the site's own operator."""
        self._plans: dict[str, Plan] = {}
        self._batches: dict[str, tuple[Batches, Batches | None]] = {}

    def handle(self, message: Message) -> Message:
        """Answer one message; a refusal is an answer too."""
        try:
            return self.answer(message)
        except AccordError as error:
            self.last_refusal = printable(f"{type(error).__name__}: {error}")
            log.warning("%s refuses: %s", self.name, self.last_refusal)
            return Refusal.of(error)

    def answer(self, message: Message) -> Message:
        """Answer one message.

        Raises:
            AccordError: the site refuses; its line is for this site's operator, `Refusal.of` says what may leave.
        """
        if isinstance(message, Enquiry):
            return self._join(message)
        if isinstance(message, TrainRequest):
            return self._train(message)
        if isinstance(message, MaskRequest):
            return self._mask(message)
        if isinstance(message, OpenRequest):
            return self._open(message)
        if isinstance(message, IntroduceRequest | SurvivorsRequest):
            return self._secured().answer(message)
        raise ProtocolError(f"a site has no answer to {type(message).__name__}")

    def releases(self, plan: Plan) -> Releases:
        """What this site has released and spent under the plan."""
        return self._store.releases(plan.hash)

    def _join(self, enquiry: Enquiry) -> Joined:
        _check_version(enquiry.protocol)
        plan = Plan.from_json(enquiry.plan_json)
        if plan.hash != enquiry.plan_hash:
            raise ProtocolError("the plan does not have the hash that came with it")
        self._check_policy(plan)
        if enquiry.receipt:
            self._check_ledger(enquiry.receipt)
        self._workspace_of(plan)  # a model that cannot be loaded is told now, and the first round need not wait for it
        shares = None
        if plan.shared_noise:
            shares = self._terms(plan, enquiry.run_id).noise
        self._check_noise(enquiry, plan)
        event = self._checked_event(plan, shares)
        self._store.check_plan(plan.hash, event, plan.releases, dataset=self._dataset)
        credential, bundle, receipt = self._join_secured(enquiry, plan)
        self._store.keep_plan(plan.hash, plan.to_json())
        return Joined(self.name, PROTOCOL_VERSION, plan.hash, credential, bundle, receipt)

    def _check_noise(self, enquiry: Enquiry, plan: Plan) -> None:
        """Whoever calibrated another σ would derive other masks in every round, and nobody would know why."""
        own = decimal_string(self._noise_multiplier_of(plan))
        if enquiry.noise_multiplier not in ("", own):
            raise PlanError(
                f"the coordinator's noise multiplier is {enquiry.noise_multiplier[:32]!r}, this site calibrated {own}: "
                "let the plan name it (privacy.noise_multiplier)"
            )

    def _check_ledger(self, data: bytes) -> None:
        """A witness shows this site's own receipt: an old copy of the ledger is refused, and the receipt kept."""
        self._secured().check_receipt(data)
        receipt = Receipt.from_json(data)
        try:
            self._store.ledger.check_witness(receipt.head)
        except LedgerRolledBack:
            self._store.keep_receipt(receipt)
            raise

    def _join_secured(self, enquiry: Enquiry, plan: Plan) -> tuple[bytes, bytes, bytes]:
        """Keys of this site for the run, and its receipt; empty where the plan does without secure aggregation."""
        if plan.secure_aggregation.mode == "off":
            return b"", b"", b""
        roster = self._secured().roster
        if enquiry.roster_hash != roster.hash:
            raise ProtocolError(f"the run's roster is not the one that this site accepted ({roster.hash[:12]}…)")
        if plan.cohort.minimum < roster.minimum or plan.cohort.colluders < roster.colluders:
            raise PlanError(
                f"the plan's cohort.minimum = {plan.cohort.minimum} and colluders = {plan.cohort.colluders} are "
                f"weaker than the roster's {roster.minimum} and {roster.colluders}"
            )
        return self._secured().join(self._terms(plan, enquiry.run_id), self._store.ledger.statement())

    def _check_policy(self, plan: Plan) -> None:
        """The operator's terms, asked at every use: a plan may have been joined on others before a restart."""
        mode, least = plan.secure_aggregation.mode, self._least_secure_aggregation
        if plan.privacy.noise == "none" and not self._accept_without_privacy:
            raise PlanError('privacy.noise = "none": this site does not train without privacy')
        if _STRENGTH[mode] < _STRENGTH[least]:
            raise PlanError(f'secure_aggregation.mode = "{mode}": this site asks for "{least}"')

    def _terms(self, plan: Plan, run_id: str) -> RunTerms:
        dimension = self._workspace_of(plan).model.layout.dimension
        roster = self._secured().roster
        return RunTerms.of(plan, run_id, roster.hash, len(roster.members), dimension, self._noise_multiplier_of(plan))

    def _secured(self) -> Members:
        if self._members is None:
            raise PlanError("this site has no identity and roster for secure aggregation")
        return self._members

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
        plan = self._plan_of(request)
        if plan.secure_aggregation.mode != "off":
            raise ProtocolError("the plan has secure aggregation: no update leaves this site unmasked")
        with self._store.exclusive():  # one at a time, over all processes: check, train and charge are one step
            update = self._update(request, plan, self._store.releases(request.plan_hash))
        return TrainReply(run_id=request.run_id, round=request.round, attempt=request.attempt, update=update)

    def _mask(self, request: MaskRequest) -> MaskedUpload:
        """Trip 1 of PROTOCOL.md, section 7: check, train, charge, and only then mask and answer."""
        plan = self._plan_of(request)
        if plan.secure_aggregation.mode == "off":
            raise ProtocolError("the plan does without secure aggregation")
        with self._store.exclusive():
            spent = self._store.releases(request.plan_hash)
            if request.round <= spent.opened_round:
                raise RoundOpened(f"round {spent.opened_round} was opened")
            if (request.round, request.attempt) <= (spent.last_round, spent.last_attempt):
                raise ProtocolError(f"R2: attempt {request.attempt} of round {request.round} is past")
            if request.round == spent.last_round and not set(request.cohort) <= set(spent.last_cohort):
                raise ProtocolError("R2: a further attempt asks sites that were not in the first")
            heads = self._secured().accept(request, request.model_hash)
            terms = self._terms(plan, request.run_id)
            if terms.noise is not None:
                words = self._shared(request, plan, spent, terms.noise, heads)
            else:
                self._store.ledger.witness(heads)  # R11
                update = self._update(request, plan, spent)
                if request.round == spent.last_round:
                    _check_repeats(plan, spent)
                    self._store.note_attempt(request.plan_hash, request.attempt)
                words = encode(update, terms.encoding, self._generator)
            return self._secured().mask(request.run_id, words, self._store.ledger.statement())

    def _shared(
        self, request: MaskRequest, plan: Plan, spent: Releases, shares: NoiseShares, heads: Mapping[str, Seen]
    ) -> Words:
        """The update under shared noise: each attempt has a sample and noise of its own, and is charged.

        Two attempts with one update and other survivors would tell, by their difference, what single sites sent.
        """
        if request.round == spent.last_round and request.model_hash != spent.last_model:
            raise ProtocolError(f"round {request.round} was released before, from other weights")
        self._check_budget(plan, spent)
        event = self._checked_event(plan, shares)
        self._check_weights(request, plan)
        self._reserve(request, event)
        self._generator.renew(_asked(request))
        with _withheld():
            words = encode(self._unnoised(request, plan), shares, self._generator)
        self._charge(request, event, None, heads)
        return words

    def _reserve(self, request: TrainRequest | MaskRequest, event: Event | None) -> None:
        """Before training, durably."""
        self._store.reserve(
            request.plan_hash,
            request.round,
            event,
            dataset=self._dataset,
            run_id=request.run_id,
            attempt=request.attempt,
        )

    def _charge(
        self,
        request: TrainRequest | MaskRequest,
        event: Event | None,
        update: Vector | None,
        heads: Mapping[str, Seen] | None = None,
    ) -> None:
        """Before the first byte leaves, durably. R11 with it: a peer's ledger that went back stops the release."""
        self._store.release(
            request.plan_hash,
            request.round,
            request.model_hash,
            update,
            event,
            request.cohort if isinstance(request, MaskRequest) else (),
            request.attempt,
            dataset=self._dataset,
            run_id=request.run_id,
            witnessed=heads,
        )

    def _unnoised(self, request: MaskRequest, plan: Plan) -> npt.NDArray[np.float64]:
        """What this site adds to the sum, before any noise: it goes into `encode` and nowhere else."""
        workspace = self._workspace_of(plan)
        records, held_back = self._records(plan, workspace)
        options: _Randomness = {"generator": self._generator, "runtime": workspace.runtime}
        if plan.privacy.noise == "participant":
            return clipped_update(workspace.model, records, plan.local, request.weights, **options)
        update = clipped_gradient(workspace.model, records, plan.local, request.weights, **options)
        if not plan.extra_coordinates:
            return update
        workspace.model.load(request.weights)
        counts = released_counts(workspace.model, held_back, plan.local, noise_multiplier=0.0, **options)
        return np.concatenate([update, counts])

    def _checked_event(self, plan: Plan, shares: NoiseShares | None) -> Event | None:
        """What a release costs, if the plan's budget bears as many as it grants."""
        sigma = self._noise_multiplier_of(plan)
        event = round_event(plan, sigma, shares.own_multiplier if shares else None)
        if event is not None and run_epsilon(plan, event) > (plan.privacy.epsilon or 0.0):
            raise BudgetExhausted(f"noise multiplier {sigma:g} would spend more than the plan's epsilon")
        return event

    def _check_weights(self, request: TrainRequest | MaskRequest, plan: Plan) -> None:
        check_length(request.weights, self._workspace_of(plan).model.layout.dimension)
        check_finite(request.weights, "the joint weights")

    def _open(self, request: OpenRequest) -> Opened:
        """Trip 3: durable before the first share leaves (R10)."""
        with self._store.exclusive():
            plan_hash = self._secured().check_opening(request)
            spent = self._store.releases(plan_hash)
            if (request.round, request.attempt) != (spent.last_round, spent.last_attempt):
                raise ProtocolError("R2: a later attempt was answered, in another run or process")
            self._store.note_opened(plan_hash, request.round)
            return self._secured().open(request)

    def _plan_of(self, request: TrainRequest | MaskRequest) -> Plan:
        _check_version(request.protocol)
        plan = self._plan(request.plan_hash)
        self._check_policy(plan)
        if not 1 <= request.round <= plan.run.rounds:
            raise ProtocolError(f"round {request.round} of a plan of {plan.run.rounds} rounds")
        return plan

    def _update(self, request: TrainRequest | MaskRequest, plan: Plan, spent: Releases) -> Vector:
        """The finished update: trained and charged, or unchanged from disk, since the same bytes cost nothing more."""
        if request.round > spent.last_round:
            self._check_budget(plan, spent)
            update = self._release(request, plan)
        elif request.round != spent.last_round or request.model_hash != spent.last_model:
            raise ProtocolError(f"round {request.round} was released before, from other weights")
        else:
            update = self._store.last_update(spent)
        with _withheld():
            check_finite(update, "the update")  # after its charge: how often noise overflows tells of what it hides
        return update

    def _check_budget(self, plan: Plan, spent: Releases) -> None:
        if spent.rounds >= plan.releases:
            raise BudgetExhausted(f"all {plan.releases} releases that the plan grants a site are spent")
        if plan.privacy.noise != "none" and spent.steps + plan.local.steps_per_round > plan.steps:
            raise BudgetExhausted(f"{spent.steps} of the plan's {plan.steps} steps are spent")

    def _release(self, request: TrainRequest | MaskRequest, plan: Plan) -> Vector:
        workspace = self._workspace_of(plan)
        self._check_weights(request, plan)
        event = self._checked_event(plan, None)
        records, held_back = self._records(plan, workspace)
        self._reserve(request, event)
        noise: _Noise = {
            "noise_multiplier": 0.0 if event is None else self._noise_multiplier_of(plan),
            "generator": self._generator,
            "runtime": workspace.runtime,
        }
        counts = np.empty(0, dtype=np.float32)
        self._generator.renew(_asked(request))
        with _withheld():
            if plan.extra_coordinates:
                workspace.model.load(request.weights)
                counts = released_counts(workspace.model, held_back, plan.local, **noise).astype(np.float32)
            result = train(workspace.model, records, plan.local, request.weights, **noise)
        update = np.concatenate([result.update, counts])
        self._charge(request, event, update)
        return update

    def _records(self, plan: Plan, workspace: Workspace) -> tuple[Batches, Batches | None]:
        """Records to train on, and those held back to score."""
        if plan.hash not in self._batches:
            with _withheld():
                rest, held_back = hold_back(self._examples_of(plan), plan.evaluation.released_fraction)
                if not len(rest):
                    raise DataError(f"{self.name} has no records")
                scored = workspace.batches(held_back) if len(held_back) else None
                self._batches[plan.hash] = (workspace.batches(rest), scored)
        return self._batches[plan.hash]


def _asked(request: TrainRequest | MaskRequest) -> bytes:
    """What a release is asked for; under secure aggregation with keys of this attempt that others drew."""
    numbers = (request.run_id, request.round, request.attempt, request.model_hash)
    if isinstance(request, TrainRequest):
        return hash_frame("accord asked", *numbers)
    return hash_frame("accord asked", *numbers, request.coordinator, request.cohort, request.bundles)


def _check_repeats(plan: Plan, spent: Releases) -> None:
    """One update is masked for the attempts of a round at most, and those of a coordinator that restarts a while."""
    most = RESTARTS * (1 + plan.run.max_extra_attempts)
    if spent.repeats + 1 >= most:
        raise ProtocolError(f"R2: round {spent.last_round} was masked for {most} attempts")


@contextmanager
def _withheld() -> Iterator[None]:
    """Around all that reads records: whatever fails there may depend on them, so the coordinator learns that alone."""
    try:
        yield
    except Withheld:
        raise
    except AccordError as error:
        raise Withheld(f"{type(error).__name__}: {error}") from error


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the coordinator speaks protocol {version}, this site {PROTOCOL_VERSION}")
