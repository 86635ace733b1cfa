"""Tells systemd how a daemon fares: sd_notify(3) without a dependency. Elsewhere it does nothing."""

from __future__ import annotations

import os
import socket


def ready(status: str = "") -> None:
    """The daemon serves."""
    _send("READY=1", *_status(status))


def stopping(status: str = "") -> None:
    """The daemon drains."""
    _send("STOPPING=1", *_status(status))


def status(text: str) -> None:
    """One line for `systemctl status`."""
    _send(*_status(text))


def alive() -> None:
    """The watchdog's sign of life."""
    _send("WATCHDOG=1")


def watchdog_s() -> float | None:
    """How often systemd wants `alive`, in seconds, with half the time to spare; None: it does not watch."""
    period, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not period.isdigit() or int(period) == 0 or (process and process != str(os.getpid())):
        return None
    return int(period) / 2e6


def _status(text: str) -> tuple[str, ...]:
    return (f"STATUS={' '.join(text.split())}",) if text else ()


def _send(*lines: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")) or not lines:
        return
    target = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto("\n".join(lines).encode(), target)
    except OSError:  # a manager that is gone is no reason to stop
        return
