"""Who acts, for the audit log: a site, by its certificate; an operator, by what the caller of a local socket says.

A local socket tells no user. Whoever can read its token is the daemon's own user or root, so the name is the caller's
word among those who may command anyway; ACCORD_OPERATOR names the person behind an account that several use.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from accord_shared.errors import printable

OPERATOR = "ACCORD_OPERATOR"
_MOST = 128
_ACTOR: ContextVar[str] = ContextVar("actor", default="")


def act_as(name: str) -> None:
    """From now on this thread acts for somebody."""
    _ACTOR.set(printable(name)[:_MOST])


@contextmanager
def acting(name: str) -> Iterator[None]:
    """`act_as` for a while."""
    token = _ACTOR.set(printable(name)[:_MOST])
    try:
        yield
    finally:
        _ACTOR.reset(token)


def actor() -> str:
    """For whom this thread acts; empty: for nobody but its own process."""
    return _ACTOR.get()


def os_user() -> str:
    """The user of this process, and whom it says that it works for."""
    user = f"uid {os.geteuid()}"
    with suppress(KeyError):
        user = pwd.getpwuid(os.geteuid()).pw_name
    person = os.environ.get(OPERATOR) or os.environ.get("SUDO_USER") or user
    return user if person == user else f"{person} as {user}"
