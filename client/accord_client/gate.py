"""Between the coordinator and the site: whose plan it is, the operator's policy, and the operator's word.

Asked at every message that begins work, not only when a plan is joined: policies change, and processes restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from accord_client.connectors import DataSpec
from accord_client.plans import PlanBook, PlanRecord
from accord_client.policy import Policy
from accord_client.settings import SiteFolder
from accord_shared.errors import AccordError, ImpostorError, PlanError, ProtocolError, SettingsError
from accord_shared.messages import Enquiry, MaskRequest, Message, TrainRequest
from accord_shared.plan import Plan
from accord_shared.signatures import PlanSignature


class Gate:
    """The policy and the plans of a site's folder.

    `coordinator` is the fingerprint that this site enrolled with, `data` what its settings declare.
    """

    def __init__(self, folder: SiteFolder, coordinator: str, data: Mapping[str, DataSpec]) -> None:
        self._path, self._coordinator, self._data = folder.policy, coordinator, data
        self.book = PlanBook(folder.plans)
        self._read: tuple[tuple[int, int], Policy] | None = None

    @property
    def policy(self) -> Policy:
        """The policy as the file has it now.

        Raises:
            SettingsError: it is malformed: nothing is allowed until it is mended.
        """
        now = stamp(self._path)
        if self._read is None or self._read[0] != now:
            self._read = now, Policy.read(self._path)
        return self._read[1]

    # --- for the operator

    def records(self) -> tuple[PlanRecord, ...]:
        """Plans that were ever offered, the newest last, as the policy judges them now.

        Raises:
            SettingsError: a record is damaged.
        """
        return tuple(self._judged(record) for record in self.book.records())

    def find(self, plan_hash: str) -> PlanRecord:
        """One of them; see `PlanBook.find`."""
        return self._judged(self.book.find(plan_hash))

    def approve(self, plan_hash: str) -> PlanRecord:
        """The operator's yes; see `PlanBook.approve`."""
        return self.book.approve(self.find(plan_hash).hash)

    def _judged(self, record: PlanRecord) -> PlanRecord:
        """A refusal of an earlier policy is none of this one's; what was noted stays while the policy is malformed."""
        with suppress(SettingsError):
            plan = record.parsed
            problem = self.policy.problem(plan, record.signer, self._coordinator, self._data)
            if problem != record.problem:
                return self.book.offer(plan, record.signer, problem, automatic=self.policy.approval == "policy")
        return record

    @staticmethod
    def begins_work(message: Message) -> bool:
        """Whether a message asks for something new. The later trips of a round only finish what was begun."""
        return isinstance(message, Enquiry | MaskRequest | TrainRequest)

    def check(self, message: Message, now: datetime) -> None:
        """Let a message pass.

        Raises:
            PolicyRefused, PlanNotApproved, ImpostorError: it may not; one line that says why.
            ProtocolError, PlanError: the plan is malformed, or not what the message says.
        """
        if isinstance(message, Enquiry):
            self._check_enquiry(message)
        elif isinstance(message, MaskRequest | TrainRequest):
            self.policy.check_hours(now)
            self.book.require(message.plan_hash)
            record = self.book.find(message.plan_hash)
            self.policy.check(record.parsed, record.signer, self._coordinator)

    def _check_enquiry(self, enquiry: Enquiry) -> None:
        plan = Plan.from_json(enquiry.plan_json)
        if plan.hash != enquiry.plan_hash:
            raise ProtocolError("the plan does not have the hash that came with it")
        if not enquiry.plan_signature:
            raise ImpostorError("the plan is not signed")
        signer = _signature(enquiry.plan_signature).verify(plan.hash)
        problem = self.policy.problem(plan, signer, self._coordinator, self._data)
        self.book.offer(plan, signer, problem, automatic=self.policy.approval == "policy")
        self.book.require(plan.hash)


def _signature(text: str) -> PlanSignature:
    try:
        return PlanSignature.from_json(text)
    except AccordError as error:
        raise PlanError(f"the plan's signature: {error}") from None


def stamp(path: Path) -> tuple[int, int]:
    """What tells that a file was changed; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
