"""Who of a run's members does not take part now, and why, in this coordinator's own words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol

from accord_server.sites import Presence
from accord_shared.errors import PlanNotApproved, SitePaused, SitePreparing
from accord_shared.service.pb import accord_pb2 as pb

_REFUSALS = {
    PlanNotApproved.__name__: "its operator has not approved the plan",
    SitePreparing.__name__: "prepares its records",
    SitePaused.__name__: "paused by its operator",
}
_STATES = {"pending": "not approved here: `accord server sites approve`", "revoked": "revoked"}


class Known(Protocol):
    """What is known of sites; `Sites` is it."""

    def states(self) -> Mapping[str, str]:
        """State of every site that enrolled."""

    def presence(self, name: str) -> Presence:
        """What was last heard of one."""


def absent(
    wanted: Iterable[str],
    sites: Known,
    *,
    joined: Collection[str],
    failed: Collection[str],
    refusals: Mapping[str, str],
    roster: str,
    most_skew_s: float,
    now: float,
) -> Iterator[pb.AbsentSite]:
    """Those of the `wanted` that cannot be asked, with the first reason that keeps each.

    `joined` are in the run, `failed` those of them that did not come back yet, `refusals` the kinds of typed errors by
    which others answered. What a site says of itself is never shown: a refusal that may depend on records is told at
    the site alone.
    """
    states = sites.states()
    for name in wanted:
        why = _STATES.get(states.get(name, ""), "" if name in states else "not enrolled")
        why = why or _of_presence(sites.presence(name), roster, most_skew_s, now)
        if not why and name not in joined:
            why = _of_answer(refusals.get(name))
        if not why and name in failed:
            why = "failed, and is not back yet"
        if why:
            yield pb.AbsentSite(site=name, why=why)


def _of_presence(seen: Presence, roster: str, most_skew_s: float, now: float) -> str:
    if not seen.online(now):
        return "offline"
    if seen.state == "paused":
        return "paused by its operator"
    if abs(seen.skew_s) > most_skew_s:
        return f"its clock is off by {seen.skew_s:+.0f} s"
    if roster and seen.roster != roster:
        return "trusts another roster" if seen.roster else "has accepted no roster"
    return ""


def _of_answer(refusal: str | None) -> str:
    if refusal is None:
        return "has not answered yet"
    return _REFUSALS.get(refusal, "refuses: `accord site status` there tells why")
