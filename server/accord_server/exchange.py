"""How messages reach sites: one trip out and back. The round does not care what carries it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from accord_shared.errors import AccordError, Interrupted, printable
from accord_shared.messages import Enquiry, Joined, Message, Refusal


@dataclass(frozen=True)
class Failure:
    """A site gave no usable reply: it refused, failed, or did not answer in time."""

    reason: str
    kind: str = ""
    """The refusal's type, where it was one."""

    @staticmethod
    def of(refusal: Refusal) -> Failure:
        """The failure that a refusal is."""
        return Failure(reason=printable(f"{refusal.kind}: {refusal.reason}"), kind=refusal.kind)


Reply = Message | Failure


class Exchange(Protocol):
    """A transport to the sites of one run."""

    enquiry: Enquiry
    """What sites are asked to join."""
    joined: dict[str, Joined]
    """The newest answer of each site that joined the plan."""

    def sites(self) -> Sequence[str]:
        """Names of the sites that joined the plan."""

    def present(self) -> Sequence[str]:
        """Those of them that can be asked now."""

    def restarted(self) -> frozenset[str]:
        """Sites whose process is another than the one that joined."""

    def ready(self, minimum: int, among: Collection[str] | None = None) -> bool:
        """Wait until so many, of these sites, can be asked. False: enough can, but too few of these come back.

        Raises:
            RoundAborted: they do not come in time.
            Interrupted: the run was asked to stop.
        """

    def rest(self, in_vain: int) -> None:
        """Pause after so many attempts in a row that came to nothing, longer after each.

        Raises:
            Interrupted: the run was asked to stop.
        """

    def send(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Reply]]:
        """One trip: yields each site's reply as it arrives, once per requested site.

        Raises:
            Interrupted: the run was asked to stop.
        """


class LocalExchange:
    """Sites in this process, asked one after another: for comparisons and tests."""

    def __init__(self, handlers: Mapping[str, Callable[[Message], Message]], enquiry: Enquiry) -> None:
        self._handlers = dict(handlers)
        self.enquiry = enquiry
        self.joined: dict[str, Joined] = {}

    def join(self) -> None:
        """Ask every site to join.

        Raises:
            AccordError: the refusal of the first that does not.
        """
        for site, handler in self._handlers.items():
            reply = handler(self.enquiry)
            if isinstance(reply, Refusal):
                raise reply.error()
            if isinstance(reply, Joined):
                self.joined[site] = reply

    def sites(self) -> Sequence[str]:
        """Names of the sites."""
        return tuple(self._handlers)

    def present(self) -> Sequence[str]:
        """All of them."""
        return self.sites()

    def restarted(self) -> frozenset[str]:
        """None of them."""
        return frozenset()

    def ready(self, minimum: int, among: Collection[str] | None = None) -> bool:
        """They are here."""
        return among is None or len(among) >= minimum

    def rest(self, in_vain: int) -> None:
        """Nothing changes meanwhile."""

    def send(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Reply]]:
        """Ask each site in turn."""
        for site, request in requests.items():
            try:
                reply = self._handlers[site](request)
            except Interrupted:
                raise
            except AccordError as error:
                reply = Refusal.of(error)
            if isinstance(reply, Joined):
                self.joined[site] = reply
            yield site, Failure.of(reply) if isinstance(reply, Refusal) else reply
