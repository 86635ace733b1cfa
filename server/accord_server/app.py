"""Flower's side of the coordinator: a ServerApp on the Message API around `Coordinator`."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid, ServerApp

from accord_server.exchange import Failure, Reply
from accord_server.rounds import Coordinator
from accord_shared import PROTOCOL_VERSION
from accord_shared.errors import (
    AccordError,
    BudgetExhausted,
    Interrupted,
    LedgerBehind,
    LedgerRolledBack,
    ProtocolError,
    RoundAborted,
    RoundOpened,
    SessionLost,
    printable,
)
from accord_shared.messages import Enquiry, Joined, Message, Refusal
from accord_shared.plan import Plan
from accord_shared.vectors import Vector
from accord_shared.wire import decode, encode

log = logging.getLogger(__name__)

POLL_S = 0.005
"""Pause between two looks for replies: Flower's own 3 s would be most of a short round."""
LONGEST_POLL_S = 1.0
"""Where a look is itself expensive."""
JOIN_POLL_S = 0.1
IDLE_POLL_S = 5.0
"""Longest pause between two looks for sites to come; what they do themselves ends it."""
IDLE_SHARE = 0.05
"""A pause between two looks, as a part of the time that nothing changed."""
LOOK_S = 0.5
"""How soon a stop is obeyed."""
MOST_ASK_AGAIN_S = 120.0
"""Longest pause before a node that did not join is asked once more; it grows with the time it did not."""
PRESENCE_S = 0.5
"""Pause between two looks for sites that went away."""
GOODBYE_S = 3.0
"""A site that says goodbye to Flower for less only connects anew, and answers yet."""
COME_BACK_S = 60.0
"""How long a round that only some sites may finish waits for these, while others are there to go on without it."""
MOST_REST_S = 60.0
"""Longest pause between two attempts at a round."""
_IN_STEP = frozenset(
    kind.__name__ for kind in (BudgetExhausted, LedgerBehind, LedgerRolledBack, ProtocolError, RoundOpened, SessionLost)
)
"""Refusals of a site that works: they are about this attempt, not about its disk, data or operator."""


@dataclass(frozen=True)
class Timing:
    """Performance flags of the transport; none of them changes what is computed."""

    trip_timeout_s: float = 3600.0
    join_timeout_s: float = 600.0
    """For how long to wait for enough sites, at the start and before each attempt."""
    grace_s: float = 0.0
    """How much longer for a whole cohort, once there are enough."""
    ask_again_s: float | None = None
    """When a node that did not join is asked once more (its operator may have approved the plan); None: never."""
    rest_s: float = 0.0
    """Pause after an attempt at a round that came to nothing; it doubles with each."""


class Presence(Protocol):
    """What is known of sites beside the messages of a run. A simulation knows nothing: `Unwatched`."""

    def name_of(self, node: int) -> str | None:
        """The site that a node was admitted as; None where nodes are not registered."""

    def boot(self, site: str) -> str:
        """Which process of the site is alive; empty if unknown."""

    def is_there(self, site: str) -> bool:
        """Whether it was heard of lately."""

    def heard(self, site: str) -> float | None:
        """When it was heard of last (monotonic); None where sites say nothing beside their answers."""

    def wait(self, seconds: float) -> bool:
        """Until something of the sites changes, at most so long; whether it did."""


class Unwatched:
    """Everybody is there, and nobody is registered."""

    def heard(self, site: str) -> float | None:
        """They say nothing."""
        del site
        return None

    def wait(self, seconds: float) -> bool:
        """Nothing changes."""
        time.sleep(seconds)
        return False

    def name_of(self, node: int) -> str | None:
        """Unknown."""
        del node
        return None

    def boot(self, site: str) -> str:
        """Unknown."""
        del site
        return ""

    def is_there(self, site: str) -> bool:
        """So it is held."""
        del site
        return True


@dataclass(frozen=True)
class _Asked:
    """A message on its way: to which node, when, and which process was there."""

    node: int
    at: float
    boot: str = ""


class FlowerExchange:
    """Trips over a Flower `Grid`, polling fast; a late or failed reply is a `Failure` of its site."""

    def __init__(
        self,
        grid: Grid,
        timing: Timing,
        stopping: Callable[[], bool],
        enquiry: Enquiry,
        presence: Presence | None = None,
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._grid = grid
        self._timing = timing
        self._stopping = stopping
        self._draining = draining
        """Whether to stop where only sites are waited for; a trip is still taken to its end."""
        self._presence = presence or Unwatched()
        self.enquiry = enquiry
        self.joined: dict[str, Joined] = {}
        self.refusals: dict[int, str] = {}
        """Why nodes did not join."""
        self.refused: dict[str, str] = {}
        """Sites that did not join, and the kinds of their refusals; empty for an answer of no use."""
        self._nodes: dict[str, int] = {}
        self._boots: dict[str, str] = {}
        self._greeted: dict[int, float] = {}
        self._greetings: dict[str, _Asked] = {}
        self._refused_at: dict[int, float] = {}
        """When nodes that did not join yet were first asked."""
        self._doubts: dict[str, float] = {}
        """Sites that failed, and when: they count again once they were heard of since, and joined anew."""
        self._changed_at = time.monotonic()

    def sites(self) -> Sequence[str]:
        """Names of the sites that joined."""
        return tuple(self._nodes)

    def present(self) -> Sequence[str]:
        """Those of them that were heard of lately, did not say goodbye to Flower since, and did not fail since."""
        online = self._online()
        return tuple(
            site
            for site, node in self._nodes.items()
            if node in online and site not in self._doubts and self._presence.is_there(site)
        )

    def doubted(self) -> Sequence[str]:
        """Sites that joined, failed, and did not show since that they work."""
        return tuple(self._doubts)

    def restarted(self) -> frozenset[str]:
        """Sites whose process is another than the one that joined: it has none of its secrets."""
        return frozenset(site for site, boot in self._boots.items() if self._presence.boot(site) != boot)

    def join(self, minimum: int, whole: int = 0) -> None:
        """Show every node the plan and learn its name, until `minimum` sites (in time `whole`) are there.

        Raises:
            ProtocolError: two nodes claim one name.
            RoundAborted: fewer than `minimum` sites joined.
        """
        deadline, enough_since = time.monotonic() + self._timing.join_timeout_s, None
        while True:
            start = time.monotonic()
            self._greet()
            self._hear()
            present, now = len(self.present()), time.monotonic()
            if present >= minimum and enough_since is None:
                enough_since = now
            heard = not self._greetings and len(self._greeted) >= minimum
            if enough_since is not None and present >= minimum:
                waited = now - enough_since
                silent = waited >= self._timing.trip_timeout_s  # who says nothing keeps no run from its start
                if (heard or silent) and (present >= whole or waited >= self._timing.grace_s):
                    return
            lost = heard and self._timing.ask_again_s is None and present < minimum
            if lost or now >= deadline:
                raise self._too_few(present, minimum)
            self._wait(start)

    def _too_few(self, present: int, minimum: int) -> RoundAborted:
        why = f": {next(iter(self.refusals.values()))}" if self.refusals else ""
        return RoundAborted(f"{present} of {len(self._greeted)} sites joined, cohort.minimum is {minimum}{why}")

    def _wait(self, since: float) -> None:
        """Between two looks for sites, of which the last began at `since`.

        Raises:
            Interrupted: the run was asked to stop, or the coordinator is.
        """
        now = time.monotonic()
        least = POLL_S if self._greetings else JOIN_POLL_S
        self._idle(min(max(least, 4 * (now - since), IDLE_SHARE * (now - self._changed_at)), IDLE_POLL_S))

    def _idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._stopping() or self._draining():
                raise Interrupted("asked to stop")
            if self._presence.wait(min(left, LOOK_S)):
                self._changed_at = time.monotonic()
                self._refused_at.clear()  # whatever changed may be what a refusal waited for
                return

    def ready(self, minimum: int, among: Collection[str] | None = None) -> bool:
        """Wait until so many of the sites that joined (of `among` alone) are there.

        Those that come meanwhile are asked to join. False: enough are there, but too few of `among` come back.

        Raises:
            RoundAborted: they do not come in time.
            Interrupted: the run was asked to stop, or the coordinator is.
        """
        began = time.monotonic()
        while True:
            start = time.monotonic()
            present = self.present()
            if len(present if among is None else set(present) & set(among)) >= minimum:
                return True
            if among is not None and len(present) >= minimum and start - began >= COME_BACK_S:
                return False
            if start - began >= self._timing.join_timeout_s or (self._timing.ask_again_s is None and among is not None):
                raise self._too_few(len(present), minimum)
            if among is None:
                self.join(minimum)
                continue
            self._greet()
            self._hear()
            self._wait(start)

    def rest(self, in_vain: int) -> None:
        """Pause after so many attempts in vain, longer after each, and never in step with another coordinator.

        Raises:
            Interrupted: the run was asked to stop, or the coordinator is.
        """
        if in_vain > 0 and self._timing.rest_s:
            whole = min(self._timing.rest_s * 2.0 ** min(in_vain - 1, 16), MOST_REST_S)
            deadline = time.monotonic() + whole * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
            while (left := deadline - time.monotonic()) > 0:
                self._idle(left)

    def _enter(self, node: int, reply: Reply) -> None:
        """Take a node's answer to the enquiry.

        Raises:
            ProtocolError: two nodes claim one name.
        """
        if not isinstance(reply, Joined):
            reason = reply.reason if isinstance(reply, Failure) else type(reply).__name__
            self._refused_at.setdefault(node, time.monotonic())
            if self.refusals.get(node) != reason:
                log.warning("%s did not join: %s", self._presence.name_of(node) or f"node {node}", reason)
            self.refusals[node] = reason
            self.refused[self._name(node)] = reply.kind if isinstance(reply, Failure) else ""
            return
        admitted = self._presence.name_of(node)
        if admitted is not None and reply.site != admitted:
            self.refusals[node] = f"{admitted!r} joined under another name"
            log.warning("%s", self.refusals[node])
            return
        if admitted is None and self._nodes.get(reply.site, node) != node:
            raise ProtocolError(f"two nodes joined as site {reply.site!r}")
        self.refusals.pop(node, None)
        self._refused_at.pop(node, None)
        self._doubts.pop(reply.site, None)
        self._changed_at = time.monotonic()
        self.refused.pop(reply.site, None)
        self._nodes[reply.site] = node
        self._boots[reply.site] = self._presence.boot(reply.site)
        self.joined[reply.site] = reply

    def send(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Reply]]:
        """One trip to the named sites. Nodes that came since are asked to join beside it, and not waited for."""
        self._greet()
        there = self._online()
        absent = [site for site in requests if not (self._nodes[site] in there and self._presence.is_there(site))]
        for site in absent:
            yield site, self._failed(site, Failure("the site is not connected"))
        by_node = {self._nodes[site]: request for site, request in requests.items() if site not in absent}
        names = {self._nodes[site]: site for site in requests}
        for node, reply in self._trip(by_node, names):
            if isinstance(reply, Joined):
                self._enter(node, reply)
            yield names[node], self._failed(names[node], reply) if isinstance(reply, Failure) else reply
        self._hear()

    def _online(self) -> set[int]:
        """Nodes that did not say goodbye to Flower."""
        return set(self._grid.get_node_ids())

    def _failed(self, site: str, failure: Failure) -> Failure:
        """A site that fails, not for the attempt's sake, counts again once it shows that it works."""
        if failure.kind not in _IN_STEP and self._presence.heard(site) is not None:
            restarted = self._presence.boot(site) != self._boots.get(site)
            self._doubts[site] = float("-inf") if restarted else time.monotonic()
        return failure

    def _greet(self) -> None:
        """Ask nodes that came, after a time those that did not join, and anew those that failed and are back."""
        now, again = time.monotonic(), self._timing.ask_again_s
        asked = {item.node for item in self._greetings.values()}
        for node in self.refusals:
            pause = min(max(again or 0.0, (now - self._refused_at.get(node, now)) / 10), MOST_ASK_AGAIN_S)
            if again is not None and node not in asked and now - self._greeted.get(node, now) >= max(pause, again):
                del self._greeted[node]
        for site, failed in self._doubts.items():
            if (self._presence.heard(site) or 0.0) > failed and self._nodes[site] not in asked:
                self._greeted.pop(self._nodes[site], None)
                self._doubts[site] = float("inf")
        there = (node for node in sorted(self._online()) if self._presence.is_there(self._name(node)))
        fresh = [node for node in there if node not in self._greeted]
        self._greeted |= dict.fromkeys(fresh, now)
        for identity, node in self._push(dict.fromkeys(fresh, self.enquiry), "query", self._timing.join_timeout_s):
            self._greetings[identity] = _Asked(node, now, self._boot(node))
            self._changed_at = now

    def _name(self, node: int) -> str:
        return self._presence.name_of(node) or ""

    def _boot(self, node: int) -> str:
        return self._presence.boot(self._name(node))

    def _hear(self) -> None:
        if not self._greetings:
            return
        for answer in self._grid.pull_messages(list(self._greetings)):
            asked = self._greetings.pop(answer.metadata.reply_to_message_id)
            self._enter(asked.node, _reply(answer))
        for identity, asked in list(self._greetings.items()):
            if self._boot(asked.node) != asked.boot:  # its process is another by now and will not answer
                del self._greetings[identity]
                self._greeted.pop(asked.node, None)

    def _pause(self, at_least_s: float) -> None:
        if self._stopping():
            raise Interrupted("asked to stop")
        time.sleep(at_least_s)

    def _push(self, requests: Mapping[int, Message], kind: str, timeout_s: float) -> list[tuple[str, int]]:
        """Send; each message's id and node. Requests that are one object are encoded once."""
        contents = {id(request): request for request in requests.values()}
        encoded = {key: encode(request) for key, request in contents.items()}
        messages = [
            FlowerMessage(encoded[id(request)], dst_node_id=node, message_type=kind, ttl=timeout_s)
            for node, request in requests.items()
        ]
        return list(zip(self._grid.push_messages(messages), requests, strict=True)) if messages else []

    def _trip(self, requests: Mapping[int, Message], names: Mapping[int, str]) -> Iterator[tuple[int, Reply]]:
        timeout_s, began = self._timing.trip_timeout_s, time.monotonic()
        boots = {node: self._presence.boot(names[node]) for node in requests}
        seen_at: dict[int, float] = {}
        watched = any(self._presence.heard(site) is not None for site in names.values())
        waiting = dict(self._push(requests, "train", timeout_s))
        started = looked_at = time.monotonic()
        deadline = started + timeout_s
        while waiting and (start := time.monotonic()) < deadline:
            answers = list(self._grid.pull_messages(list(waiting)))
            looked_s = time.monotonic() - start
            for answer in answers:
                yield waiting.pop(answer.metadata.reply_to_message_id), _reply(answer)
            if start - looked_at >= PRESENCE_S:
                looked_at = start
                there = self._online() if watched else set(requests)
                seen_at |= dict.fromkeys(there, start)
                for identity, node in list(waiting.items()):
                    online = start - seen_at.get(node, started) <= GOODBYE_S
                    if gone := self._gone(node, names[node], boots[node], online=online):
                        del waiting[identity]
                        yield node, Failure(gone)
            if waiting:  # a look at a thousand sites must not take a whole core, nor a long wait a part of one
                self._pause(min(max(POLL_S, 4 * looked_s, (start - started) / 100), LONGEST_POLL_S))
        log.debug("trip", extra={"seconds": round(time.monotonic() - began, 4), "sites": len(requests)})
        for node in waiting.values():
            yield node, Failure(f"no reply within {timeout_s:g} s")

    def _gone(self, node: int, site: str, boot: str, *, online: bool) -> str:
        """Why no answer will come, if so."""
        if self._presence.name_of(node) not in (None, site):
            return "the site's key is not admitted any more"
        if self._presence.boot(site) != boot:
            return "the site restarted"
        if not online:
            return "the site said goodbye"
        return "" if self._presence.is_there(site) else "the site is not connected any more"


def _reply(answer: FlowerMessage) -> Reply:
    if answer.has_error():
        return Failure(printable(f"the client failed: {answer.error.reason or answer.error.code}")[:300])
    try:
        message = decode(answer.content)
    except AccordError as error:
        return Failure(printable(f"{type(error).__name__}: {error}"))
    return Failure.of(message) if isinstance(message, Refusal) else message


def server_app(
    plan: Plan,
    coordinator: Coordinator,
    *,
    roster_hash: str = "",
    timing: Timing | None = None,
    stopping: Callable[[], bool] = lambda: False,
    on_joined: Callable[[Sequence[str]], None] = lambda _: None,
    on_finished: Callable[[Vector], None] = lambda _: None,
) -> ServerApp:
    """A ServerApp that runs `coordinator` to its end over the grid that Flower hands it."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        del context  # Flower may persist it: nothing of ours goes in
        enquiry = Enquiry(PROTOCOL_VERSION, coordinator.run_id, plan.to_json(), plan.hash, roster_hash)
        exchange = FlowerExchange(grid, timing or Timing(), stopping, enquiry)
        exchange.join(plan.cohort.minimum, plan.cohort.size)
        on_joined(exchange.sites())
        on_finished(coordinator.run(exchange))

    return app
