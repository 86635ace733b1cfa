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
LONGEST_POLL_S = 0.1
"""Where a look is itself expensive."""


@dataclass(frozen=True)
class Timing:
    """Performance flags of the transport; none of them changes what is computed."""

    trip_timeout_s: float = 3600.0
    join_timeout_s: float = 600.0


class FlowerExchange:
    """Trips over a Flower `Grid`, polling fast; a late or failed reply is a `Failure` of its site."""

    def __init__(self, grid: Grid, timing: Timing, stopping: Callable[[], bool]) -> None:
        self._grid = grid
        self._timing = timing
        self._stopping = stopping
        self._nodes: dict[str, int] = {}

    def sites(self) -> Sequence[str]:
        """Names of the sites that joined."""
        return tuple(self._nodes)

    def join(self, plan: Plan, run_id: str) -> None:
        """Show every node the plan and learn its name.

        Raises:
            ProtocolError: two nodes claim one name.
            RoundAborted: fewer sites joined than a round must finish with.
        """
        enquiry = Enquiry(PROTOCOL_VERSION, run_id, plan.to_json(), plan.hash)
        nodes = self._await_nodes(plan.cohort.minimum)
        refusals: list[str] = []
        for node, reply in self._trip(dict.fromkeys(nodes, enquiry), "query", self._timing.join_timeout_s):
            if not isinstance(reply, Joined):
                refusals.append(reply.reason if isinstance(reply, Failure) else type(reply).__name__)
                log.warning("node %d did not join: %s", node, refusals[-1])
            elif reply.site in self._nodes:
                raise ProtocolError(f"two nodes joined as site {reply.site!r}")
            else:
                self._nodes[reply.site] = node
        if len(self._nodes) < plan.cohort.minimum:
            why = f": {refusals[0]}" if refusals else ""
            raise RoundAborted(
                f"{len(self._nodes)} of {len(nodes)} sites joined, cohort.minimum is {plan.cohort.minimum}{why}"
            )

    def send(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Reply]]:
        """One trip to the named sites."""
        names = {self._nodes[site]: site for site in requests}
        by_node = {self._nodes[site]: request for site, request in requests.items()}
        for node, reply in self._trip(by_node, "train", self._timing.trip_timeout_s):
            yield names[node], reply

    def _await_nodes(self, minimum: int) -> list[int]:
        deadline = time.monotonic() + self._timing.join_timeout_s
        while len(nodes := sorted(self._grid.get_node_ids())) < minimum and time.monotonic() < deadline:
            self._pause()
        return nodes

    def _pause(self, at_least_s: float = POLL_S) -> None:
        if self._stopping():
            raise Interrupted("asked to stop")
        time.sleep(at_least_s)

    def _trip(self, requests: Mapping[int, Message], kind: str, timeout_s: float) -> Iterator[tuple[int, Reply]]:
        contents = {id(request): encode(request) for request in requests.values()}
        messages = [
            FlowerMessage(contents[id(request)], dst_node_id=node, message_type=kind, ttl=timeout_s)
            for node, request in requests.items()
        ]
        waiting = dict(zip(self._grid.push_messages(messages), requests, strict=True))
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
    return Failure(f"{message.kind}: {message.reason}") if isinstance(message, Refusal) else message


def server_app(
    plan: Plan,
    coordinator: Coordinator,
    *,
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
        exchange = FlowerExchange(grid, timing or Timing(), stopping)
        exchange.join(plan, coordinator.run_id)
        on_joined(exchange.sites())
        on_finished(coordinator.run(exchange))

    return app
