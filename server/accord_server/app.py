"""Flower's side of the coordinator: a ServerApp on the Message API around `Coordinator`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid, ServerApp

from accord_server.exchange import Failure, Reply
from accord_server.rounds import Coordinator
from accord_shared import PROTOCOL_VERSION
from accord_shared.errors import AccordError, Interrupted, ProtocolError, RoundAborted
from accord_shared.messages import Enquiry, Joined, Message, Refusal
from accord_shared.plan import Plan
from accord_shared.vectors import Vector
from accord_shared.wire import decode, encode

log = logging.getLogger(__name__)

POLL_S = 0.005
"""Pause between two looks for replies: Flower's own 3 s would be most of a short round."""
LONGEST_POLL_S = 1.0
"""Where a look is itself expensive."""


@dataclass(frozen=True)
class Timing:
    """Performance flags of the transport; none of them changes what is computed."""

    trip_timeout_s: float = 3600.0
    join_timeout_s: float = 600.0


class FlowerExchange:
    """Trips over a Flower `Grid`, polling fast; a late or failed reply is a `Failure` of its site."""

    def __init__(self, grid: Grid, timing: Timing, stopping: Callable[[], bool], enquiry: Enquiry) -> None:
        self._grid = grid
        self._timing = timing
        self._stopping = stopping
        self.enquiry = enquiry
        self.joined: dict[str, Joined] = {}
        self._nodes: dict[str, int] = {}
        self._greeted: set[int] = set()
        self._greetings: dict[str, int] = {}

    def sites(self) -> Sequence[str]:
        """Names of the sites that joined."""
        return tuple(self._nodes)

    def join(self, minimum: int) -> None:
        """Show every node the plan and learn its name.

        Raises:
            ProtocolError: two nodes claim one name.
            RoundAborted: fewer than `minimum` sites joined.
        """
        nodes = self._await_nodes(minimum)
        self._greeted.update(nodes)
        refusals: list[str] = []
        requests: dict[int, Message] = dict.fromkeys(nodes, self.enquiry)
        for node, reply in self._trip(requests, "query", self._timing.join_timeout_s):
            refusal = self._enter(node, reply)
            if refusal:
                refusals.append(refusal)
        if len(self._nodes) < minimum:
            why = f": {refusals[0]}" if refusals else ""
            raise RoundAborted(f"{len(self._nodes)} of {len(nodes)} sites joined, cohort.minimum is {minimum}{why}")

    def _enter(self, node: int, reply: Reply) -> str:
        """Take a node's answer to the enquiry; returns why it did not join, if so.

        Raises:
            ProtocolError: two nodes claim one name.
        """
        if not isinstance(reply, Joined):
            reason = reply.reason if isinstance(reply, Failure) else type(reply).__name__
            log.warning("node %d did not join: %s", node, reason)
            return reason
        if self._nodes.get(reply.site, node) != node:
            raise ProtocolError(f"two nodes joined as site {reply.site!r}")
        self._nodes[reply.site] = node
        self.joined[reply.site] = reply
        return ""

    def send(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Reply]]:
        """One trip to the named sites. Nodes that came since are asked to join beside it, and not waited for."""
        self._greet()
        names = {self._nodes[site]: site for site in requests}
        by_node = {self._nodes[site]: request for site, request in requests.items()}
        for node, reply in self._trip(by_node, "train", self._timing.trip_timeout_s):
            if isinstance(reply, Joined):
                self._enter(node, reply)
            yield names[node], reply
        self._hear()

    def _greet(self) -> None:
        fresh = sorted(set(self._grid.get_node_ids()) - self._greeted)
        self._greeted.update(fresh)
        self._greetings |= self._push(dict.fromkeys(fresh, self.enquiry), "query", self._timing.join_timeout_s)

    def _hear(self) -> None:
        if not self._greetings:
            return
        for answer in self._grid.pull_messages(list(self._greetings)):
            node = self._greetings.pop(answer.metadata.reply_to_message_id)
            try:
                self._enter(node, _reply(answer))
            except ProtocolError as error:
                log.warning("node %d did not join: %s", node, error)

    def _await_nodes(self, minimum: int) -> list[int]:
        deadline = time.monotonic() + self._timing.join_timeout_s
        while len(nodes := sorted(self._grid.get_node_ids())) < minimum and time.monotonic() < deadline:
            self._pause()
        return nodes

    def _pause(self, at_least_s: float = POLL_S) -> None:
        if self._stopping():
            raise Interrupted("asked to stop")
        time.sleep(at_least_s)

    def _push(self, requests: Mapping[int, Message], kind: str, timeout_s: float) -> dict[str, int]:
        """Send; returns the node of each message's id. Requests that are one object are encoded once."""
        contents = {id(request): request for request in requests.values()}
        encoded = {key: encode(request) for key, request in contents.items()}
        messages = [
            FlowerMessage(encoded[id(request)], dst_node_id=node, message_type=kind, ttl=timeout_s)
            for node, request in requests.items()
        ]
        return dict(zip(self._grid.push_messages(messages), requests, strict=True)) if messages else {}

    def _trip(self, requests: Mapping[int, Message], kind: str, timeout_s: float) -> Iterator[tuple[int, Reply]]:
        waiting = self._push(requests, kind, timeout_s)
        deadline = time.monotonic() + timeout_s
        while waiting and (start := time.monotonic()) < deadline:
            answers = list(self._grid.pull_messages(list(waiting)))
            looked_s = time.monotonic() - start
            for answer in answers:
                yield waiting.pop(answer.metadata.reply_to_message_id), _reply(answer)
            if waiting:  # a look at a thousand sites must not take a whole core
                self._pause(min(max(POLL_S, 4 * looked_s), LONGEST_POLL_S))
        for node in waiting.values():
            yield node, Failure(f"no reply within {timeout_s:g} s")


def _reply(answer: FlowerMessage) -> Reply:
    if answer.has_error():
        return Failure(f"the client failed: {answer.error.reason or answer.error.code}"[:300])
    try:
        message = decode(answer.content)
    except AccordError as error:
        return Failure(f"{type(error).__name__}: {error}")
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
        exchange.join(plan.cohort.minimum)
        on_joined(exchange.sites())
        on_finished(coordinator.run(exchange))

    return app
