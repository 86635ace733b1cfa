"""How messages reach sites: one trip out and back. The round does not care what carries it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from accord_shared.errors import AccordError
from accord_shared.messages import Message, Refusal


@dataclass(frozen=True)
class Failure:
    """A site gave no usable reply: it refused, failed, or did not answer in time."""

    reason: str


Reply = Message | Failure


class Exchange(Protocol):
    """A transport to the sites of one run."""

    def sites(self) -> Sequence[str]:
        """Names of the sites that joined the plan."""

    def send(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Reply]]:
        """One trip: yields each site's reply as it arrives, once per requested site.

        Raises:
            Interrupted: the run was asked to stop.
        """


class LocalExchange:
    """Sites in this process, asked one after another: for comparisons and tests."""

    def __init__(self, handlers: Mapping[str, Callable[[Message], Message]]) -> None:
        self._handlers = dict(handlers)

    def sites(self) -> Sequence[str]:
        """Names of the sites."""
        return tuple(self._handlers)

    def send(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Reply]]:
        """Ask each site in turn."""
        for site, request in requests.items():
            try:
                reply = self._handlers[site](request)
            except AccordError as error:
                reply = Refusal.of(error)
            yield site, Failure(f"{reply.kind}: {reply.reason}") if isinstance(reply, Refusal) else reply
