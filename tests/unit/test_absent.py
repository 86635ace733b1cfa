"""Who of a run is waited for, and why: the first reason that keeps each, never what a site says of its records."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from accord_server.absent import absent
from accord_server.app import FlowerExchange, Timing
from accord_server.exchange import Failure
from accord_server.sites import Presence
from accord_shared.errors import REFUSALS, PlanNotApproved
from accord_shared.messages import Enquiry, Joined, Refusal

ROSTER, NOW = "a" * 64, 1000.0
ALL = ("a", "b", "c")


class Town:
    """Sites that are all well, with changes."""

    def __init__(self, **changes: Any) -> None:
        self._states = dict.fromkeys(ALL, "approved") | changes.pop("states", {})
        self._changes = changes

    def states(self) -> dict[str, str]:
        return {name: state for name, state in self._states.items() if state}

    def presence(self, name: str) -> Presence:
        well: dict[str, Any] = {"boot": "b", "seen_s": NOW - 1, "state": "ready", "roster": ROSTER}
        return Presence(**well | (self._changes if name == "b" else {}))


def told(
    town: Town,
    joined: Collection[str] = ALL,
    failed: Collection[str] = (),
    refusals: dict[str, str] | None = None,
) -> dict[str, str]:
    found = absent(
        ALL, town, joined=joined, failed=failed, refusals=refusals or {}, roster=ROSTER, most_skew_s=60.0, now=NOW
    )
    return {one.site: one.why for one in found}


def test_whoever_takes_part_is_not_named() -> None:
    assert told(Town()) == {}
    assert told(Town(state="preparing")) == {}  # for another plan: it is in this run


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"states": {"b": ""}}, "not enrolled"),
        ({"states": {"b": "pending"}}, "not approved here: `accord server sites approve`"),
        ({"states": {"b": "revoked"}}, "revoked"),
        ({"seen_s": 0.0}, "offline"),
        ({"state": "paused"}, "paused by its operator"),
        ({"skew_s": -600.0}, "its clock is off by -600 s"),
        ({"roster": "b" * 64}, "trusts another roster"),
        ({"roster": ""}, "has accepted no roster"),
    ],
)
def test_each_reason_is_said_of_the_one_site(changes: dict[str, Any], why: str) -> None:
    assert told(Town(**changes)) == {"b": why}


@pytest.mark.parametrize("kind", [*REFUSALS, "", "Nonsense", "x" * 500])
def test_a_refusal_is_named_in_the_coordinators_own_words(kind: str) -> None:
    """Where it may depend on records, all kinds read the same."""
    words = {
        "PlanNotApproved": "its operator has not approved the plan",
        "SitePreparing": "prepares its records",
        "SitePaused": "paused by its operator",
    }
    other = "refuses: `accord site status` there tells why"
    assert told(Town(), {"a", "c"}, refusals={"b": kind}) == {"b": words.get(kind, other)}
    assert told(Town(), {"a", "c"}) == {"b": "has not answered yet"}
    assert told(Town(), failed={"b"}) == {"b": "failed, and is not back yet"}


class Grid:
    """Nobody."""

    def get_node_ids(self) -> list[int]:
        return []


class Named:
    def name_of(self, node: int) -> str:
        return "abc"[node]

    def boot(self, site: str) -> str:
        return ""

    def is_there(self, site: str) -> bool:
        return True

    def heard(self, site: str) -> float:
        return 0.0

    def wait(self, seconds: float) -> bool:
        return False


def test_the_exchange_keeps_the_kind_of_a_refusal_until_the_site_joins() -> None:
    enquiry = Enquiry(1, "run", "", "p", "")
    exchange = FlowerExchange(Grid(), Timing(), lambda: False, enquiry, Named())  # type: ignore[arg-type]
    exchange._enter(0, Failure.of(Refusal.of(PlanNotApproved("it waits"))))
    exchange._enter(1, Failure("the client failed"))
    assert exchange.refused == {"a": "PlanNotApproved", "b": ""}
    exchange._enter(0, Joined("a", 1, "p", b"", b"", b""))
    assert (exchange.refused, list(exchange.sites())) == ({"b": ""}, ["a"])
