"""What an agent trains with: ledger, data, models and secrets, made when they are first needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from accord_client.costs import release_event
from accord_client.data import Examples
from accord_client.members import LocalMembers
from accord_client.policy import Policy
from accord_client.preparation import Progress, open_workspace, prepare, read_records
from accord_client.rosters import RosterBook
from accord_client.settings import SiteFolder, SiteSettings
from accord_client.site import Site
from accord_client.store import SiteStore
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared.identity import Identity
from accord_shared.plan import Plan
from accord_shared.service.pb import accord_pb2 as pb

MOST_PLANS = 4
"""Plans whose model and records stay in memory."""
T = TypeVar("T")


class Workplace:
    """The `Site` of a folder. It is made anew when its policy or its roster changes; the ledger is the same."""

    def __init__(
        self,
        folder: SiteFolder,
        settings: SiteSettings,
        name: str,
        identity: Identity,
        rosters: RosterBook,
        policy_of: Callable[[], Policy],
    ) -> None:
        self._folder, self._settings, self._name, self._policy_of = folder, settings, name, policy_of
        self._identity, self._rosters = identity, rosters
        self._runtime: Runtime | None = None
        self._workspaces: OrderedDict[str, Workspace] = OrderedDict()
        self._examples: OrderedDict[str, Examples] = OrderedDict()
        self._site: tuple[tuple[Policy, str], Site] | None = None
        self._newest_run: dict[str, str] = {}
        self._stored: tuple[Policy, SiteStore] | None = None
        self._lock = threading.Lock()
        """Of what is kept in memory, which two threads fill."""

    def check(self) -> None:
        """Before the agent is up: settings and policy fit each other, the ledger is whole, there is such a device.

        Raises:
            SettingsError: a data set of the policy is not in the settings, or there is no such device.
            PrivacyError: the ledger is damaged.
        """
        policy = self._policy_of()
        if policy.dataset is not None:
            policy.spec(self._settings.data)
        self._store(policy).ledger.verify()
        self._runtime = self._settings.device.runtime()

    @property
    def site(self) -> Site:
        """The site under the present policy and roster."""
        wanted = self._policy_of(), self._rosters.hash
        if self._site is None or self._site[0] != wanted:
            self._site = wanted, self._made(wanted[0])
        return self._site[1]

    def _made(self, policy: Policy) -> Site:
        roster = self._rosters.roster
        return Site(
            self._name,
            store=self._store(policy),
            workspace_of=self._workspace,
            examples_of=lambda plan: self._records(plan, policy),
            members=LocalMembers(self._name, self._identity, roster) if roster is not None else None,
            least_secure_aggregation=policy.secure_aggregation,
            accept_without_privacy=policy.noise == "none",
            dataset=policy.dataset or "default",
        )

    def _store(self, policy: Policy) -> SiteStore:
        if self._stored is None or self._stored[0] != policy:
            self._stored = policy, SiteStore(self._folder.path, datasets=policy.datasets())
        return self._stored[1]

    def _workspace(self, plan: Plan) -> Workspace:
        return self._kept(self._workspaces, plan.hash, lambda: open_workspace(plan, self._folder, self._device()))

    def _device(self) -> Runtime:
        return self._runtime or self._settings.device.runtime()

    def _records(self, plan: Plan, policy: Policy) -> Examples:
        return self._kept(
            self._examples,
            _records_of(plan, policy),
            lambda: read_records(plan, self._folder, self._settings, policy),
        )

    def prepare(self, plan: Plan, progress: Progress) -> None:
        """In a thread of its own: make, and keep at hand, what the site would else make within a trip.

        Raises:
            AccordError: as `preparation.prepare`.
        """
        policy = self._policy_of()

        def within_limits(workspace: Workspace) -> None:
            """A plan that the budget does not bear is refused before hours are spent on its records."""
            event = release_event(plan, lambda: workspace.model.layout.dimension)
            self._store(policy).check_plan(plan.hash, event, plan.releases, dataset=str(policy.dataset))

        made, records = prepare(plan, self._folder, self._settings, policy, self._device(), progress, within_limits)
        self._kept(self._examples, _records_of(plan, policy), lambda: records)
        self._kept(self._workspaces, plan.hash, lambda: made)

    def is_prepared(self, plan: Plan) -> bool:
        """Whether all of that is at hand."""
        with self._lock:
            return plan.hash in self._workspaces and _records_of(plan, self._policy_of()) in self._examples

    def _kept(self, cache: OrderedDict[str, T], name: str, make: Callable[[], T]) -> T:
        """From the cache, or made and put there; the oldest goes. Nobody waits for what another thread makes."""
        with self._lock:
            known = cache.get(name)
        value = make() if known is None else known
        with self._lock:
            value = cache.setdefault(name, value)
            cache.move_to_end(name)
            while len(cache) > MOST_PLANS:
                cache.popitem(last=False)
        return value

    def note_run(self, plan_hash: str, run: str) -> None:
        """Remember the newest run of a plan, for the status."""
        self._newest_run[plan_hash] = run

    def end(self, plan_hash: str) -> None:
        """A plan's run has ended: what is reserved for a step that will never be released is free again."""
        self._store(self._policy_of()).ledger.void(plan_hash)

    def runs(self) -> list[pb.SiteRun]:
        """What was released under each plan, from the ledger, and its newest run that this process heard of."""
        balance = self._store(self._policy_of()).ledger.verify()
        plans = {plan for dataset in balance.datasets() for plan in balance.by_plan(dataset)}
        return [
            pb.SiteRun(
                run=self._newest_run.get(plan, ""),
                plan_hash=plan,
                last_round=balance.plan(plan).last_round,
                releases=balance.plan(plan).rounds,
            )
            for plan in sorted(plans)
        ]


def _records_of(plan: Plan, policy: Policy) -> str:
    """The name of a plan's records in memory."""
    return f"{plan.hash}/{policy.dataset}"
