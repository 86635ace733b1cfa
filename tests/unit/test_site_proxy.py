"""A site behind an HTTP proxy: enrolment, API and fleet all take the one way that `site.toml` names, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from accord_client.settings import CoordinatorSpec, SiteFolder, SiteSettings
from accord_client.store import SiteStore
from accord_shared.errors import IdentityError, SettingsError
from accord_shared.service.egress import Proxy
from command_line import Done, Run, accord_command, ok, refused
from coordinator_lab import Coordinator, free_port
from networks import ConnectProxy, listening, tls_server

__all__ = ["accord_command"]

(ENTRY,) = entry_points(group="accord.commands", name="site")
CREDENTIALS = "bank-01:s3cret"
FOLDER = SiteFolder(Path("accord-site"))
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


@pytest.fixture
def run(accord_command: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("ACCORD_SITE_FOLDER", "ACCORD_PROXY_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    return accord_command(ENTRY, "site")


class Town:
    """A coordinator with all three services. Where it says that it is, nobody listens: only the proxy knows the way."""

    def __init__(self, lab: Coordinator, fleet: int) -> None:
        self.lab = lab
        real = [int(address.rpartition(":")[2]) for address in (lab.enrolment_address, lab.api_address)]
        self.names = [f"127.0.0.1:{free_port()}" for _ in range(3)]
        self.routes = dict(zip(self.names, [*real, fleet], strict=True))
        self.straight = dict(
            zip(self.names, [lab.enrolment_address, lab.api_address, f"127.0.0.1:{fleet}"], strict=True)
        )

    def hide(self) -> None:
        """From now on it names addresses that only the proxy reaches."""
        self.lab.enrolment_address, self.lab.api_address, self.lab.fleet_address = self.names


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    lab = Coordinator().start()
    (tmp_path / "fleet.pem").write_bytes(lab.pair.key + lab.pair.chain)
    with listening(tls_server(tmp_path / "fleet.pem")) as fleet:
        made = Town(lab, fleet)
        lab.fleet_address = f"127.0.0.1:{fleet}"
        yield made
    lab.stop()


def remote(done: Done) -> dict[str, tuple[str, str]]:
    """What `site check` says of the coordinator."""
    found = json.loads(done.out.splitlines()[-1])["checks"]
    return {one["name"]: (one["state"], one["line"]) for one in found if one["name"] in ("coordinator", "fleet")}


def credentials(text: str = CREDENTIALS, mode: int = 0o600) -> str:
    path = Path("proxy-credentials").absolute()
    path.write_text(f"{text}\n")
    path.chmod(mode)
    return str(path)


def test_all_three_services_are_reached_by_the_proxy_alone(
    run: Run, town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    town.hide()
    monkeypatch.setenv("no_proxy", "127.0.0.1,*")  # which libraries would put above a setting
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1,*")
    proxy = ConnectProxy(CREDENTIALS, town.routes)
    with listening(proxy) as port:
        url = f"http://127.0.0.1:{port}"
        enrolled = run("enrol", town.lab.token(), "--proxy", url, "--proxy-credentials", credentials())
        assert "Tell this fingerprint" in ok(enrolled)
        assert SiteSettings.read(FOLDER).coordinator.proxy == url
        checked = run("check", "--json")
        told = remote(checked)
        assert {name: state for name, (state, _) in told.items()} == {"coordinator": "ok", "fleet": "ok"}
        assert all(line.endswith(f"through the proxy 127.0.0.1:{port}") for _, line in told.values())
        assert set(proxy.targets) == set(town.names)
        assert proxy.refused == 0
        assert "s3cret" not in enrolled.out + checked.out + checked.err
        FOLDER.settings.write_text('version = 1\nname = "x"\n')
        assert [state for state, _ in remote(run("check", "--json")).values()] == ["fail", "fail"]


def test_other_credentials_are_said_and_never_shown(run: Run, town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    town.hide()
    with listening(ConnectProxy(CREDENTIALS, town.routes)) as port:
        url = f"http://127.0.0.1:{port}"
        done = run("enrol", town.lab.token(), "--proxy", url, "--proxy-credentials", credentials("bank-01:wr0ng"))
        assert done.code == 3
        assert done.err.endswith("the proxy wants other credentials (407)\n")
        assert "wr0ng" not in done.err
        monkeypatch.setenv("ACCORD_PROXY_CREDENTIALS", CREDENTIALS)
        FOLDER.settings.unlink()
        ok(run("enrol", town.lab.token(), "--proxy", url))
        assert "fail" not in {state for state, _ in remote(run("check", "--json")).values()}
        monkeypatch.setenv("ACCORD_PROXY_CREDENTIALS", "bank-01:wr0ng")
        done = run("check", "--json")
        assert all(line.endswith("other credentials (407)") for _, line in remote(done).values())
        assert "wr0ng" not in done.out + done.err


def test_the_environment_s_proxies_apply_to_no_service(run: Run, town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(ConnectProxy(status=403)) as trap:
        for name in VARIABLES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{trap}")
        ok(run("enrol", town.lab.token()))
        assert [state for state, _ in remote(run("check", "--json")).values()] == ["ok", "ok"]


def test_one_setting_for_all(run: Run, town: Town) -> None:
    """The command line cannot give enrolment another way than the agent will take."""
    ok(run("enrol", town.lab.token()))
    refused(run("enrol", town.lab.token(), "--again", "--proxy", "http://127.0.0.1:3128"), "set proxy in it")
    FOLDER.settings.write_text(
        FOLDER.settings.read_text().replace("[coordinator]", '[coordinator]\nproxy = "http://p:1"')
    )
    done = run("enrol", town.lab.token(), "--again", "--proxy", "http://p:1/")
    assert (done.code, "of the proxy: its name is not known" in done.err) == (3, True)


@pytest.mark.parametrize(
    "url", ["http://bank:s3cret@p:3128", "https://p:3128", "socks5://p:1080", "p:3128", "http://p", ""]
)
def test_what_is_no_proxy_is_refused_without_repeating_it(url: str, run: Run, town: Town) -> None:
    done = run("enrol", town.lab.token(), "--proxy", url)
    refused(done, "proxy is not http://HOST:PORT")
    assert "s3cret" not in done.err
    assert not FOLDER.path.exists()
    FOLDER.make()
    FOLDER.settings.write_text(f'version = 1\nname = "x"\n[coordinator]\nproxy = {json.dumps(url)}\n')
    with pytest.raises(SettingsError, match="HOST:PORT") as error:
        SiteSettings.read(FOLDER)
    assert "s3cret" not in str(error.value)


def test_credentials_are_private(run: Run, town: Town) -> None:
    spec = CoordinatorSpec(proxy="http://p:3128", proxy_credentials=credentials(mode=0o640))
    with pytest.raises(IdentityError, match="read by others"):
        spec.way_out(Path())
    spec = CoordinatorSpec(proxy="http://p:3128", proxy_credentials=credentials("nobody"))
    with pytest.raises(SettingsError, match="USER:PASSWORD") as error:
        spec.way_out(Path())
    assert "nobody" not in str(error.value)
    refused(run("enrol", town.lab.token(), "--proxy-credentials", "x"), "without a proxy")
    proxy = CoordinatorSpec(proxy="http://p:3128", proxy_credentials=credentials()).way_out(Path())
    assert isinstance(proxy, Proxy)
    assert "s3cret" not in repr(proxy)


def test_the_ledger_needs_no_way_out(run: Run, town: Town) -> None:
    """What stays on this machine does not ask for credentials."""
    ok(run("enrol", town.lab.token()))
    SiteStore(FOLDER.path).release("0" * 64, 1, "m", None, None)
    FOLDER.settings.write_text(
        'version = 1\nname = "x"\n[coordinator]\nproxy = "http://p:1"\nproxy_credentials = "gone"\n'
    )
    assert "sound" in ok(run("ledger", "verify"))
    refused(run("roster", "show"), "gone cannot be read")
