"""Why a connection failed, in words that its operator can act on, from what gRPC, OpenSSL, BoringSSL and httpx say.

They tell it in text alone. What is not known here is "no answer", never a guess.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from accord_shared.errors import Unreachable, UntrustedPeer


class Cause(NamedTuple):
    """One cause: the words for it, and whether it is of the first hop, which is the proxy where there is one."""

    words: str
    first_hop: bool = False


UNTRUSTED = Cause("its certificate is of an authority that is not trusted here")
UNKNOWN = Cause("no answer")
_ALERTS = "certificate.(required|unknown|expired|revoked)|unknown.ca|bad.certificate|access.denied"
_CAUSES: tuple[tuple[str, Cause], ...] = (
    # gRPC hides the alert behind the second: a server that refuses a certificate says so within TLS 1.3
    (rf"alert.({_ALERTS})|tsi_data_corrupted", Cause("it refuses the certificate that was shown to it")),
    (r"alert.protocol.version|unsupported.protocol", Cause("it has no TLS version in common with this side")),
    (
        r"alert.(handshake.failure|insufficient)|no.shared.cipher",
        Cause("it has no TLS cipher in common with this side"),
    ),
    (r"unrecognized.name", Cause("nobody there has this name")),
    (r"certificate has expired", Cause("its certificate has expired")),
    (r"certificate is not yet valid", Cause("its certificate is not valid yet: a clock is wrong, here or there")),
    (
        r"(hostname|ip address) mismatch|hostname verification check|is not in peer certificate",
        Cause("its certificate is for another name"),
    ),
    (r"certificate.(verify.failed|signature.failure)", UNTRUSTED),
    (r"missing selected alpn", Cause("what answers there does not speak gRPC")),
    (r"wrong.version.number|record.layer|http.request\b", Cause("what answers there does not speak TLS")),
    (r"\b407\b", Cause("the proxy wants other credentials (407)")),
    (r"(?:proxy returned response code |proxyerror: )(\d{3})", Cause("the proxy does not let it through ({})")),
    (r"expected 'h'", Cause("the proxy does not speak HTTP")),
    (r"connection refused", Cause("the connection is refused", first_hop=True)),
    (
        r"name or service not known|domain name not found|lookup failed|name resolution|nodename nor servname"
        r"|no address associated|dns resolution",
        Cause("its name is not known", first_hop=True),
    ),
    (r"(no route|unreachable)", Cause("there is no way to it in this network", first_hop=True)),
    (r"reset by peer|socket closed|\beof\b|broken pipe|disconnected|goaway", Cause("it closes the connection")),
    (r"timed out|timeout|deadline exceeded", Cause("no answer in time")),
)


def cause_of(text: str) -> Cause:
    """The cause that a library's text tells of."""
    for pattern, cause in _CAUSES:
        found = re.search(pattern, text, re.IGNORECASE)
        if found is not None:
            return cause._replace(words=cause.words.format(*found.groups()))
    return UNKNOWN


def unreachable(peer: str, text: str, proxy: str | None = None) -> Unreachable:
    """The error for a call of `peer` (its name in words), through `proxy` (host:port), that failed with this text."""
    cause = cause_of(text)
    through = "" if proxy is None else f" through the proxy {proxy}"
    of_proxy = "of the proxy: " if proxy is not None and cause.first_hop else ""
    kind = UntrustedPeer if cause == UNTRUSTED else Unreachable
    return kind(f"{peer} cannot be reached{through}: {of_proxy}{cause.words}")
