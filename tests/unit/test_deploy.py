"""deploy/: build files and units are hardened, the chart renders, the front passes TLS 1.3 alone, alerts fire.

What needs a tool that is not installed is skipped, and says which.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from accord_client.fleet import tls_version
from accord_client.policy import Policy
from accord_client.settings import SiteFolder, SiteSettings
from accord_server.authority import Authority
from accord_server.metrics import Metrics
from accord_server.settings import CoordinatorFolder, CoordinatorSettings
from accord_shared.errors import Unreachable
from accord_shared.service.egress import Proxy
from accord_shared.service.keyfile import new_tls_key, plain_pem
from accord_shared.service.rpc import KeyPair, peer_certificate, private_folder, secure_channel, secure_server
from coordinator_parts import csr
from networks import ConnectProxy, listening, tls_server

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "accord"
Object = dict[str, Any]


def tool(name: str) -> str:
    """A program's path, beside this interpreter or on the PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}:/usr/sbin")
    return found or pytest.skip(f"{name} is not installed")


def done(*command: str | Path) -> str:
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


# --- containers


def containerfile(name: str) -> str:
    return re.sub(r"\\\n", " ", (DEPLOY / name).read_text())


CONTAINERFILES = ["Containerfile.server", "Containerfile.client"]


@pytest.mark.parametrize("name", CONTAINERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    done(tool("hadolint"), "--no-color", DEPLOY / name)


@pytest.mark.parametrize("name", CONTAINERFILES)
def test_every_installation_is_pinned(name: str) -> None:
    installs = re.findall(r"pip install[^&\n]*", containerfile(name))
    assert len(installs) >= 2
    assert all("--constraint constraints.txt" in one for one in installs)


@pytest.mark.parametrize("name", CONTAINERFILES)
def test_the_last_stage_runs_as_nobody_and_knows_its_health(name: str) -> None:
    last = containerfile(name).rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*accord", last, re.MULTILINE)
    assert "pip" not in last.replace("pip_", "")
    assert re.search(r"^COPY --from=", last, re.MULTILINE)


def test_the_servers_image_is_checked_to_have_no_torch() -> None:
    text = containerfile("Containerfile.server")
    assert "! /opt/accord/bin/python -c 'import torch'" in text
    assert "[server,postgresql]" in text


@pytest.mark.slow
def test_the_servers_build_steps_run_in_a_clean_environment(tmp_path: Path) -> None:
    """Every RUN of the build stage, with the image's folders below a temporary one; needs a package index."""
    source = tmp_path / "src"
    ignored = shutil.ignore_patterns("__pycache__")
    build = containerfile("Containerfile.server").split("\nFROM ")[1]
    for names in re.findall(r"^COPY (.*) \S+$", build, re.MULTILINE):
        for name in names.split():
            path, target = DEPLOY.parent / name, source / name
            target.parent.mkdir(exist_ok=True)
            shutil.copytree(path, target, ignore=ignored) if path.is_dir() else shutil.copy(path, target)
    for step in re.findall(r"^RUN (.*)$", build, re.MULTILINE):
        command = step.replace("/opt/", f"{tmp_path}/opt/")
        finished = subprocess.run(["sh", "-c", command], cwd=source, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "opt/accord/bin/accord").is_file()
    assert not list((tmp_path / "opt/accord").glob("lib/*/site-packages/torch"))


# --- compose


def compose() -> Object:
    text = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", (DEPLOY / "compose.yaml").read_text())
    loaded: Object = yaml.safe_load(text)
    return loaded


def test_every_service_is_hardened() -> None:
    services = compose()["services"]
    assert set(services) == {"front", "coordinator", "site-a", "site-b", "site-c"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "noexec,nosuid,nodev" in service["tmpfs"][0]
        assert not {"privileged", "cap_add", "ports", "user", "devices", "pid"} & set(service)


def test_sites_reach_the_front_alone_and_share_nothing() -> None:
    whole = compose()
    services = whole["services"]
    assert services["coordinator"]["network_mode"] == "service:front"
    assert whole["networks"] == {"federation": {"internal": True}}
    sites = [services[f"site-{letter}"] for letter in "abc"]
    assert all(site["networks"] == ["federation"] for site in sites)
    states = [volume.split(":")[0] for site in sites for volume in site["volumes"] if volume.endswith("/accord")]
    assert sorted(states) == ["site-a", "site-b", "site-c"]
    assert all(site["volumes"][1].endswith(":ro") for site in sites)
    assert len({service["secrets"][0]["source"] for service in (*sites, services["coordinator"])}) == 4


def test_the_built_files_exist() -> None:
    for service in compose()["services"].values():
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_yaml_is_clean(path: Path) -> None:
    done(tool("yamllint"), "--strict", "--config-file", DEPLOY / ".yamllint.yaml", path)


# --- the chart. Helm's own engine, in a process of its own: it is Go, and this process forks.

RENDER = """
import json, sys
import helm_python
path, values = sys.argv[1], json.load(sys.stdin)
lint = helm_python.lint(path, values, strict=True)
with helm_python.Chart.load(path) as chart:
    shown = {} if lint["errors"] else chart.render(values, name="demo", namespace="banks")
json.dump({"lint": lint, "shown": shown}, sys.stdout)
"""


def rendered(values: Object) -> tuple[list[str], dict[str, Object]]:
    """Errors of the linter; objects by kind and name."""
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed")
    command = [sys.executable, "-c", RENDER, str(CHART)]
    finished = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        return [finished.stderr], {}
    answer = json.loads(finished.stdout)
    texts = [text for name, text in answer["shown"].items() if name.endswith(".yaml")]
    objects = [one for text in texts for one in yaml.safe_load_all(text) if one]
    return answer["lint"]["errors"], {f"{one['kind']}/{one['metadata']['name']}": one for one in objects}


@pytest.fixture(scope="module")
def coordinator() -> dict[str, Object]:
    errors, objects = rendered({"coordinator": {"settings": "[rounds]\ntrip_timeout_s = 30.0\n"}})
    assert errors == []
    return objects


@pytest.fixture(scope="module")
def site() -> dict[str, Object]:
    errors, objects = rendered(yaml.safe_load((CHART / "values-site.yaml").read_text()))
    assert errors == []
    return objects


def test_a_coordinator_is_all_there(coordinator: dict[str, Object]) -> None:
    kinds = {"ConfigMap", "Service", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy"}
    assert set(coordinator) == {f"{kind}/demo-coordinator" for kind in kinds}
    state = coordinator["StatefulSet/demo-coordinator"]["spec"]
    assert state["replicas"] == 1
    assert state["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOnce"]
    named = {container["name"]: container for container in state["template"]["spec"]["containers"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert named["coordinator"][probe]["exec"]["command"] == ["accord", "server", "status"]
    ports = {port["name"] for port in named["front"]["ports"]}
    assert {port["targetPort"] for port in coordinator["Service/demo-coordinator"]["spec"]["ports"]} == ports - {"tls"}


def test_the_charts_settings_are_the_coordinators(coordinator: dict[str, Object], tmp_path: Path) -> None:
    data = coordinator["ConfigMap/demo-coordinator"]["data"]
    (tmp_path / "coordinator.toml").write_text(data["coordinator.toml"])
    settings = CoordinatorSettings.read(tmp_path)
    assert settings.api_address == "coordinator.example.org:8401"
    assert settings.listen.host == "127.0.0.1"
    assert settings.rounds.trip_timeout_s == 30.0
    assert data["nginx.conf"].strip() == (DEPLOY / "front/nginx.conf").read_text().strip()


def test_the_chart_on_one_port(tmp_path: Path) -> None:
    """A partner opens 443 alone; so may a site's own policy."""
    errors, objects = rendered({"coordinator": {"onePort": True, "host": "bank.example"}})
    assert errors == []
    (tmp_path / "coordinator.toml").write_text(objects["ConfigMap/demo-coordinator"]["data"]["coordinator.toml"])
    settings = CoordinatorSettings.read(tmp_path)
    assert (settings.fleet_address, settings.api_address) == ("fleet.bank.example:443", "api.bank.example:443")
    assert settings.enrolment_address == "enrolment.bank.example:443"
    (port,) = objects["Service/demo-coordinator"]["spec"]["ports"]
    assert port["port"] == 443
    containers = objects["StatefulSet/demo-coordinator"]["spec"]["template"]["spec"]["containers"]
    (front,) = [one for one in containers if one["name"] == "front"]
    assert {"name": port["targetPort"], "containerPort": 8443} in front["ports"]
    assert objects["NetworkPolicy/demo-coordinator"]["spec"]["ingress"][0]["ports"] == [{"port": port["targetPort"]}]
    values = yaml.safe_load((CHART / "values-site.yaml").read_text())
    values["site"].setdefault("network", {})["ports"] = [443]
    errors, objects = rendered(values)
    assert errors == []
    assert {"port": 443} in [
        one for rule in objects["NetworkPolicy/demo-site"]["spec"]["egress"] for one in rule["ports"]
    ]


def test_a_site_is_called_by_nobody(site: dict[str, Object]) -> None:
    assert set(site) == {f"{kind}/demo-site" for kind in ("ConfigMap", "StatefulSet", "NetworkPolicy")}
    policy = site["NetworkPolicy/demo-site"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == []
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 8400, 8401, 8402}
    assert policy["egress"][1]["to"] == [{"ipBlock": {"cidr": "203.0.113.10/32"}}]


def test_the_charts_site_reads_its_settings_and_policy(site: dict[str, Object], tmp_path: Path) -> None:
    for name, text in site["ConfigMap/demo-site"]["data"].items():
        (tmp_path / name).write_text(text)
    settings, policy = SiteSettings.read(SiteFolder(tmp_path)), Policy.read(tmp_path / "policy.toml")
    assert policy.dataset in settings.data
    mounted = site["StatefulSet/demo-site"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "data", "mountPath": "/srv/accord-data", "readOnly": True} in mounted


def test_every_container_of_the_chart_is_hardened(coordinator: dict[str, Object], site: dict[str, Object]) -> None:
    for objects, name in ((coordinator, "demo-coordinator"), (site, "demo-site")):
        pod = objects[f"StatefulSet/{name}"]["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod["initContainers"], *pod["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "privileged": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"].get("limits", container["resources"]["requests"])


def test_rendered_objects_are_those_of_kubernetes(coordinator: dict[str, Object], site: dict[str, Object]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for one in (*coordinator.values(), *site.values()):
        kubernetes.validate(one, "1.31", strict=True)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"coordinator": {"federatoin": "x"}}, "federatoin"),
        ({"coordinator": {"database": "postgresql+psycopg://accord:secret@db/accord"}}, "database"),
        ({"coordinator": {"enabled": False}, "site": {"enabled": True}}, "site.settings"),
        ({"site": {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}}, "readOnly"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(values: Object, word: str) -> None:
    errors, objects = rendered(values)
    assert word in " ".join(errors)
    assert objects == {}


# --- systemd

MOST_EXPOSURE = {"accord-server.service": 10, "accord-site.service": 13, "accord-front.service": 12}
"""Tenths, as systemd 252 reckons; 0 is safe, 100 is not."""


@pytest.mark.parametrize("unit", MOST_EXPOSURE)
def test_units_are_exposed_to_little(unit: str) -> None:
    analyze, path = tool("systemd-analyze"), DEPLOY / "systemd" / unit
    if "--offline" not in done(analyze, "--help"):
        pytest.skip("systemd-analyze is too old to look at files")
    done(analyze, "security", "--no-pager", "--offline=true", f"--threshold={MOST_EXPOSURE[unit]}", path)


@pytest.mark.parametrize("unit", MOST_EXPOSURE)
def test_units_have_no_mistakes(unit: str, tmp_path: Path) -> None:
    """With a program that exists in place of ours: `verify` looks for it."""
    text = re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", (DEPLOY / "systemd" / unit).read_text())
    (tmp_path / unit).write_text(text)
    command = [tool("systemd-analyze"), "verify", "--man=no", str(tmp_path / unit)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    problems = [line for line in finished.stderr.splitlines() if unit in line]
    assert problems == []


@pytest.mark.parametrize("part", ["server", "site"])
def test_daemons_tell_systemd_and_keep_their_folder_closed(part: str) -> None:
    text = (DEPLOY / "systemd" / f"accord-{part}.service").read_text()
    for line in (
        "Type=notify",
        f"ExecStart=/opt/accord/bin/accord {part} up",
        "KillMode=mixed",
        "StateDirectoryMode=0700",
        "ProtectSystem=strict",
        "CapabilityBoundingSet=",
    ):
        assert f"\n{line}\n" in text
    assert f"ACCORD_{part.upper()}_FOLDER=/var/lib/accord-{part}" in text


# --- the front


def name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate(subject: str, key: EllipticCurvePrivateKey, issuer: EllipticCurvePrivateKey | None) -> bytes:
    """PEM; without an issuer an authority."""
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name_of(subject))
        .issuer_name(name_of(subject if issuer is None else "authority"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
        .sign(issuer or key, SHA256())
    )
    return made.public_bytes(Encoding.PEM)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(port: int) -> None:
    for _ in range(100):
        with closing(socket.socket()) as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nobody listens on {port}")


@contextmanager
def running_front(folder: Path, ports: dict[int, int]) -> Iterator[None]:
    """nginx with the configuration of deploy/, its ports replaced, on loopback."""
    text = (DEPLOY / "front/nginx.conf").read_text()
    for old, new in ports.items():
        text = re.sub(rf"\b{old}\b", str(new), text)
    text = text.replace("listen ", "listen 127.0.0.1:").replace("/tmp/accord-front.pid", str(folder / "front.pid"))  # noqa: S108
    (folder / "nginx.conf").write_text(text)
    command = [tool("nginx"), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    if "stream" not in subprocess.run([command[0], "-V"], capture_output=True, text=True, check=False).stderr:
        pytest.skip("nginx has no stream module")
    tried = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    if 'unknown directive "stream"' in tried.stderr:
        pytest.skip("nginx's stream module is not installed")
    assert tried.returncode == 0, tried.stderr
    with (folder / "front.log").open("wb") as log:
        process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=log)
    try:
        wait_for(ports[8401])
        yield
    finally:
        process.terminate()
        process.wait(10)


def echo_name(server: grpc.Server) -> None:
    """A method that answers with the name in the client's certificate."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        return peer_certificate(context).subject.rfc4514_string().encode()

    handlers = {"Who": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Name", handlers),))


def handshake(port: int, authority: bytes, change: Callable[[ssl.SSLContext], None]) -> str | None:
    context = ssl.create_default_context(cadata=authority.decode())
    change(context)
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return secure.version()


def test_the_front_passes_tls_1_3_alone_and_client_certificates_through(tmp_path: Path) -> None:
    ca, server_key, site_key = new_tls_key(), new_tls_key(), new_tls_key()
    authority = certificate("authority", ca, None)
    server_pair = KeyPair(plain_pem(server_key), certificate("localhost", server_key, ca))
    site_pair = KeyPair(plain_pem(site_key), certificate("bank-a", site_key, ca))
    outer, inner, other_outer, other_inner, third_outer, third_inner, named = free_ports(7)
    server = secure_server(f"127.0.0.1:{inner}", lambda: server_pair, echo_name, clients_of=lambda: authority)
    ports = {8401: outer, 9401: inner, 8400: other_outer, 9400: other_inner, 8402: third_outer, 9402: third_inner}
    ports[8443] = named

    def old(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(tmp_path / "site.pem")

    def new(context: ssl.SSLContext) -> None:
        context.load_cert_chain(tmp_path / "site.pem")

    (tmp_path / "site.pem").write_bytes(site_pair.key + site_pair.chain)
    server.start()
    try:
        with running_front(tmp_path, ports):
            with secure_channel(f"localhost:{outer}", authority, site_pair) as channel:
                assert channel.unary_unary("/test.Name/Who")(b"", timeout=10) == b"CN=bank-a"
            assert handshake(inner, authority, old) == "TLSv1.2"  # what grpcio cannot refuse
            assert handshake(outer, authority, new) == "TLSv1.3"
            with pytest.raises((ssl.SSLError, ConnectionError)):
                handshake(outer, authority, old)
            with socket.create_connection(("127.0.0.1", outer), 5) as plain:
                plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert plain.recv(100) == b""
            with (
                secure_channel(f"localhost:{outer}", authority) as bare,
                pytest.raises(grpc.RpcError, match=r"UNAVAILABLE|UNKNOWN"),
            ):
                bare.unary_unary("/test.Name/Who")(b"", timeout=5)
    finally:
        server.stop(None).wait()
    log = (tmp_path / "front.log").read_text()
    assert log.count("no host in upstream") == 2


def test_one_port_serves_all_three_by_name(tmp_path: Path) -> None:
    """443 alone is open: the real services of a coordinator, whose certificate names what sites dial, behind nginx."""
    outer, api, enrolment, *others = free_ports(6)
    names = {name: f"{name}.bank.example:{outer}" for name in ("fleet", "api", "enrolment")}
    settings = CoordinatorSettings.made(
        {"federation": "f", "public": {"host": "bank.example", **names}},
    )
    authority = Authority.create(private_folder(tmp_path / "c"), settings)
    paths = CoordinatorFolder(tmp_path / "c")
    (tmp_path / "fleet.pem").write_bytes(authority.server_pair().key + authority.server_pair().chain)
    site_key = new_tls_key()
    site_pair = KeyPair(plain_pem(site_key), authority.issue_site(csr(site_key, "bank-a"), "bank-a", 90))
    servers = [
        secure_server(f"127.0.0.1:{api}", authority.server_pair, echo_name, clients_of=authority.authorities),
        secure_server(f"127.0.0.1:{enrolment}", authority.server_pair, lambda server: None),
    ]
    trusted = paths.authorities.read_bytes()
    with ExitStack() as stack:
        # Names that nobody resolves here: the proxy of the test leads all of them to the front's one port.
        proxy = ConnectProxy(routes=dict.fromkeys([*names.values(), f"other.bank.example:{outer}"], outer))
        way = Proxy(f"127.0.0.1:{stack.enter_context(listening(proxy))}")
        fleet = stack.enter_context(listening(tls_server(tmp_path / "fleet.pem")))
        for one in servers:
            one.start()
            stack.callback(lambda one=one: one.stop(None).wait())
        ports = {8443: outer, 9400: fleet, 9401: api, 9402: enrolment}
        stack.enter_context(running_front(tmp_path, ports | dict(zip((8400, 8401, 8402), others, strict=True))))
        assert tls_version(settings.fleet_address, trusted, way) == "TLSv1.3"
        with secure_channel(settings.api_address, trusted, site_pair, way) as channel:
            assert channel.unary_unary("/test.Name/Who")(b"", timeout=10) == b"CN=bank-a,O=f"
        with secure_channel(settings.enrolment_address, trusted, proxy=way) as channel:  # without a certificate
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary("/test.Name/Who")(b"", timeout=10)
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(Unreachable, match="closes the connection"):
            tls_version(f"other.bank.example:{outer}", trusted, way)
    assert {target.rpartition(":")[2] for target in proxy.targets} == {str(outer)}


# --- monitoring


def shown_metrics() -> set[str]:
    """Names of series that a coordinator shows."""
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
    return {family.name + end for family in Metrics().registry.collect() for end in suffixes[family.type]}


def asked_metrics(text: str) -> set[str]:
    return set(re.findall(r"\baccord_[a-z_]+", text))


def test_alerts_ask_for_metrics_that_exist() -> None:
    (group,) = yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text())["groups"]
    asked = {name for rule in group["rules"] for name in asked_metrics(rule["expr"])}
    assert asked <= shown_metrics()
    runbook = (DEPLOY / "RUNBOOK.md").read_text()
    for rule in group["rules"]:
        title = re.search(r'"(.*)"', rule["annotations"]["runbook"])
        assert title is not None
        assert re.search(rf"^#+ {title[1]}$", runbook, re.MULTILINE), title[1]


def test_the_dashboard_shows_every_metric() -> None:
    dashboard = json.loads((DEPLOY / "grafana/accord.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for one in expressions for name in asked_metrics(one)}
    assert asked <= shown_metrics()
    families = {family.name for family in Metrics().registry.collect()}
    assert all(any(name.startswith(family) for name in asked) for family in families)


def test_alerts_fire_when_they_should() -> None:
    promtool = tool("promtool")
    done(promtool, "check", "rules", DEPLOY / "prometheus/rules.yaml")
    done(promtool, "test", "rules", DEPLOY / "prometheus/rules.test.yaml")


# --- the runbook

GROUPS = {"sites", "roster", "audit", "authority", "plan", "policy", "model", "ledger"}


def test_the_runbook_names_commands_that_exist(accord_help: Callable[..., str]) -> None:
    text = (DEPLOY / "RUNBOOK.md").read_text()
    used = set(re.findall(r"accord (server|site|roster|plan) ([a-z-]+)(?: ([a-z-]+))?", text))
    assert len(used) > 30
    for part, command, further in sorted(used):
        assert f"\n  {command} " in accord_help(part), f"accord {part} {command}"
        if command in GROUPS and further:
            assert f"\n  {further} " in accord_help(part, command), f"accord {part} {command} {further}"


@pytest.fixture(scope="module")
def accord_help() -> Callable[..., str]:
    texts: dict[tuple[str, ...], str] = {}

    def of(*words: str) -> str:
        if words not in texts:
            texts[words] = done(sys.executable, "-c", "from accord_shared.cli import main; main()", *words, "--help")
        return texts[words]

    return of
