"""What Prometheus reads of an agent: nothing about records, losses or updates."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class AgentMetrics:
    """One registry per agent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._connected = Gauge("accord_site_connected", "Whether the coordinator answers.", registry=self.registry)
        self._skew = Gauge(
            "accord_site_clock_skew_seconds", "This clock minus the coordinator's.", registry=self.registry
        )
        self._expiry = Gauge(
            "accord_site_certificate_expiry_seconds", "Unix time at which the certificate ends.", registry=self.registry
        )
        self._messages = Counter("accord_site_messages", "Answered messages.", registry=self.registry)
        self._busy = Counter("accord_site_busy_seconds", "Time spent on answers.", registry=self.registry)

    def show(self, skew_s: float, expires: float, *, connected: bool) -> None:
        """How the site stands with its coordinator."""
        self._connected.set(connected)
        self._skew.set(skew_s)
        self._expiry.set(expires)

    def answered(self, seconds: float) -> None:
        """A message was answered in so long."""
        self._messages.inc()
        self._busy.inc(seconds)
