"""What an agent trains with: ledger, data, models and secrets, made when they are first needed."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from accord_client.connectors import DataSpec, load
from accord_client.data import Examples
from accord_client.features import FeatureCache
from accord_client.members import LocalMembers
from accord_client.models import verified
from accord_client.policy import Policy
from accord_client.rosters import RosterBook
from accord_client.settings import SiteFolder, SiteSettings
from accord_client.site import Site
from accord_client.store import SiteStore
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared.identity import Identity
from accord_shared.plan import Plan
from accord_shared.service.pb import accord_pb2 as pb

log = logging.getLogger(__name__)

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
        return _kept(self._workspaces, plan.hash, lambda: self._opened(plan))

    def _opened(self, plan: Plan) -> Workspace:
        """The model is compared with the plan's digest here: with all embeddings cached nobody else would load it."""
        verified(plan.model)
        return Workspace(plan, FeatureCache(self._folder.cache), self._runtime or self._settings.device.runtime())

    def _records(self, plan: Plan, policy: Policy) -> Examples:
        spec, dataset = policy.spec(self._settings.data), str(policy.dataset)
        return _kept(self._examples, f"{plan.hash}/{dataset}", lambda: self._loaded(plan, dataset, spec))

    def _loaded(self, plan: Plan, dataset: str, spec: DataSpec) -> Examples:
        quarantine = self._folder.quarantine / f"{dataset}.csv"
        loaded = load(spec, plan, quarantine, folder=self._folder.path)
        level = logging.WARNING if loaded.rejected else logging.INFO
        facts = {"dataset": dataset, "rows": loaded.rows, "rejected": loaded.rejected, "digest": loaded.digest}
        log.log(level, "the data set is read", extra=facts)
        return loaded.examples

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


def _kept(cache: OrderedDict[str, T], name: str, make: Callable[[], T]) -> T:
    """From the cache, or made and put there; the oldest goes."""
    if name not in cache:
        cache[name] = make()
        while len(cache) > MOST_PLANS:
            cache.popitem(last=False)
    cache.move_to_end(name)
    return cache[name]
