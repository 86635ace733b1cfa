"""What Prometheus reads of a coordinator: the names that alerts and the dashboard rely on."""

from __future__ import annotations

import socket
import urllib.request
from contextlib import closing

import pytest
from prometheus_client.parser import text_string_to_metric_families

from accord_server.metrics import Metrics
from accord_shared.errors import Unreachable
from accord_shared.service.exposition import exposed
from accord_shared.service.pb import accord_pb2 as pb


def read(metrics: Metrics) -> dict[str, float]:
    """All samples over HTTP, labels in the name."""
    with exposed(metrics.registry, "127.0.0.1", 0) as port:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {".".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


def test_all_names() -> None:
    metrics = Metrics()
    metrics.show_sites(
        [
            pb.SiteInfo(name="a", state="approved", online=True, skew_s=2.5, certificate_expires_us=5_000_000),
            pb.SiteInfo(name="b", state="pending", certificate_expires_us=6_000_000),
            pb.SiteInfo(name="c", state="revoked"),
        ]
    )
    metrics.show_certificates(7_000_000, 8_000_000)
    metrics.show_runs(["running", "running", "finished"])
    metrics.show_audit(12)
    metrics.superlink.set(1)
    metrics.round_s.observe(3)
    metrics.rounds.inc()
    metrics.aborted.inc(2)
    metrics.upload.inc(100)
    metrics.download.inc(200)
    found = read(metrics)
    expected = {
        "accord_sites.approved": 1,
        "accord_sites.pending": 1,
        "accord_sites.revoked": 1,
        "accord_sites_online": 1,
        "accord_site_skew_seconds.a": 2.5,
        "accord_certificate_expiry_seconds.site:a": 5,
        "accord_certificate_expiry_seconds.site:b": 6,
        "accord_certificate_expiry_seconds.server": 7,
        "accord_certificate_expiry_seconds.authority": 8,
        "accord_runs.waiting": 0,
        "accord_runs.running": 2,
        "accord_runs.finished": 1,
        "accord_round_seconds_count": 1,
        "accord_round_seconds_sum": 3,
        "accord_rounds_total": 1,
        "accord_attempts_aborted_total": 2,
        "accord_upload_bytes_total": 100,
        "accord_download_bytes_total": 200,
        "accord_superlink_up": 1,
        "accord_audit_entries_total": 12,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert not [name for name in found if name.endswith((".b", ".c")) and "skew" in name]


def test_sites_that_are_gone_are_not_shown() -> None:
    metrics = Metrics()
    site = pb.SiteInfo(name="a", state="approved", online=True, skew_s=1, certificate_expires_us=1)
    metrics.show_sites([site])
    site.online = False
    metrics.show_sites([site])
    found = read(metrics)
    assert "accord_site_skew_seconds.a" not in found
    assert found["accord_sites_online"] == 0


def test_a_port_that_is_taken() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port}"), exposed(Metrics().registry, "127.0.0.1", port):
            pass
