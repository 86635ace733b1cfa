"""What Prometheus reads of a coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from accord_shared.service.pb import accord_pb2 as pb

SITE_STATES = ("pending", "approved", "revoked")
RUN_STATES = ("waiting", "running", "stopped", "aborted", "finished", "given-up")
_ROUND_S = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600)


class Metrics:
    """One registry per coordinator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        self.sites = Gauge("accord_sites", "Sites by state.", ["state"], **kept)
        self.sites_online = Gauge("accord_sites_online", "Sites that were heard of lately.", **kept)
        self.skew = Gauge("accord_site_skew_seconds", "A site's clock minus the coordinator's.", ["site"], **kept)
        self.expiry = Gauge(
            "accord_certificate_expiry_seconds", "Unix time at which a certificate ends.", ["subject"], **kept
        )
        self.runs = Gauge("accord_runs", "Runs by state.", ["state"], **kept)
        self.round_s = Histogram("accord_round_seconds", "Time of a finished round.", buckets=_ROUND_S, **kept)
        self.rounds = Counter("accord_rounds", "Finished rounds.", **kept)
        self.aborted = Counter("accord_attempts_aborted", "Attempts at a round that came to nothing.", **kept)
        self.upload = Counter("accord_upload_bytes", "Bytes that sites sent in rounds.", **kept)
        self.download = Counter("accord_download_bytes", "Bytes that sites were sent in rounds.", **kept)
        self.superlink = Gauge("accord_superlink_up", "Whether the SuperLink answers.", **kept)
        self.database = Gauge("accord_database_up", "Whether the coordinator's database answers.", **kept)
        self._audit_entries = 0
        self._skewed: set[str] = set()
        self._expiring: set[str] = set()
        self.registry.register(_AuditEntries(lambda: self._audit_entries))

    def show_sites(self, sites: Iterable[pb.SiteInfo]) -> None:
        """Show these sites and no others."""
        shown = list(sites)
        for state in SITE_STATES:
            self.sites.labels(state).set(sum(site.state == state for site in shown))
        self.sites_online.set(sum(site.online for site in shown))
        _show(self.skew, {site.name: site.skew_s for site in shown if site.online}, self._skewed)
        ends = {f"site:{site.name}": site.certificate_expires_us / 1e6 for site in shown if site.certificate_expires_us}
        _show(self.expiry, ends, self._expiring)

    def show_certificates(self, server_us: int, authority_us: int) -> None:
        """Show when the server's and the authority's certificate end, in microseconds."""
        self.expiry.labels("server").set(server_us / 1e6)
        self.expiry.labels("authority").set(authority_us / 1e6)

    def show_runs(self, states: Iterable[str]) -> None:
        """Show how many runs are in each state."""
        shown = list(states)
        for state in RUN_STATES:
            self.runs.labels(state).set(shown.count(state))

    def show_audit(self, entries: int) -> None:
        """Show how many entries the audit log has."""
        self._audit_entries = entries


def _show(gauge: Gauge, values: dict[str, float], known: set[str]) -> None:
    """Set these values and drop what else is `known`: whoever reads meanwhile sees too much, never too little."""
    for label, value in values.items():
        gauge.labels(label).set(value)
    for label in known - values.keys():
        gauge.remove(label)
    known.clear()
    known.update(values)


class _AuditEntries(Collector):
    """A counter that the database keeps."""

    def __init__(self, value: Callable[[], int]) -> None:
        self._value = value

    def collect(self) -> Iterator[Metric]:
        """The one counter."""
        yield CounterMetricFamily("accord_audit_entries", "Entries of the audit log.", value=self._value())
