"""coordinator.toml: strict, closed by default, and nothing but what it says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from accord_server.settings import CoordinatorFolder, CoordinatorSettings, template
from accord_shared.errors import SettingsError


def read(tmp_path: Path, text: str) -> CoordinatorSettings:
    (tmp_path / "coordinator.toml").write_text(text)
    return CoordinatorSettings.read(tmp_path)


def test_the_template_says_the_defaults(tmp_path: Path) -> None:
    made = read(tmp_path, template("Nord"))
    assert made == CoordinatorSettings.made(
        {"federation": "Nord", "public": {"host": "127.0.0.1"}, "listen": {"host": "127.0.0.1"}}
    )
    lines = (
        line.removeprefix("# ") for line in template("Nord").splitlines() if line.startswith("# ") and " = " in line
    )
    for line in lines:  # what stands behind # is the default
        ((key, value),) = tomllib.loads(line).items()
        tables = (made, made.listen, made.certificates, made.rounds, made.flower, made.clock)
        assert [table for table in tables if getattr(table, key, None) == value], line


def test_nothing_listens_beyond_loopback_by_default() -> None:
    made = CoordinatorSettings(federation="Nord")
    assert (made.listen.host, made.listen.metrics_host) == ("127.0.0.1", "127.0.0.1")
    assert (made.fleet_address, made.api_address, made.enrolment_address) == (
        "127.0.0.1:9400",
        "127.0.0.1:9401",
        "127.0.0.1:9402",
    )


def test_what_sites_dial(tmp_path: Path) -> None:
    made = read(tmp_path, template("Nord", "::", ("coordinator.example.org", "10.0.0.1")))
    assert made.listen.host == "::"
    assert made.names == ("coordinator.example.org", "10.0.0.1")
    assert made.api_address == "coordinator.example.org:9401"
    front = CoordinatorSettings.made(
        {"federation": "N", "public": {"host": "::1", "names": ["::1", "a.b"], "api": 443}}
    )
    assert (front.api_address, front.names) == ("[::1]:443", ("::1", "a.b"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("colour = 1", "unknown key: colour"),
        ("[listen]\nprot = 1", "unknown key: listen.prot"),
        ("[listen]\nfleet = 0", "listen.fleet"),
        ("[listen]\nfleet = '9400'", "listen.fleet"),
        ("[listen]\nhost = 'a b'", "neither a host name nor an address"),
        ("[public]\nnames = ['a/b']", "neither a host name nor an address"),
        ("[rounds]\ntrip_timeout_s = nan", "rounds.trip_timeout_s"),
        ("[certificates]\nsite_days = 0", "certificates.site_days"),
        ("database = 'mysql://x/y'", "not supported"),
        ("database = 'state.db'", "not a URL"),
        ("version = 2", "version"),
        ("[listen]\nhost = '0.0.0.0'", "public.host must be what sites dial"),
        ("[public]\nhost = '::'", "public.host must be what sites dial"),
        ("[public]\nfleet = 443\napi = 443", "are dialled at one address"),
        ("[public]\nfleet = 'a.b:443'\napi = 'a.b:443'", "are dialled at one address"),
        ("[public]\nfleet = 'a.b'", "neither a port nor HOST:PORT"),
        ("[public]\nfleet = 'a b:443'", "neither a host name nor an address"),
        ("[public]\nfleet = '::1:443'", "neither a port nor HOST:PORT"),
        ("[public]\nfleet = 'a.b:70000'", "neither a port nor HOST:PORT"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said.replace(".", r"\.")) as refusal:
        read(tmp_path, f'federation = "Nord"\n{change}\n')
    assert "coordinator.toml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_services_on_one_port_have_names() -> None:
    public = {"host": "bank.example", **{name: f"{name}.bank.example:443" for name in ("fleet", "api", "enrolment")}}
    made = CoordinatorSettings.made({"federation": "N", "public": public})
    assert (made.fleet_address, made.enrolment_address) == ("fleet.bank.example:443", "enrolment.bank.example:443")
    assert made.names == ("bank.example", "fleet.bank.example", "api.bank.example", "enrolment.bank.example")
    mixed = CoordinatorSettings.made({"federation": "N", "public": {"host": "a.b", "fleet": "[::1]:443", "api": 8401}})
    assert (mixed.fleet_address, mixed.api_address, mixed.names) == ("[::1]:443", "a.b:8401", ("a.b", "::1"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://accord:s3cret@db/accord",
        "postgresql+psycopg://accord:@db/accord",
        "postgresql+psycopg://db/accord?user=a&password=s3cret",
        "postgresql+psycopg://db/accord?sslpassword=s3cret",
    ],
)
def test_a_password_in_the_database_s_url_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ACCORD_DATABASE_PASSWORD") as refusal:
        read(tmp_path, f'federation = "Nord"\ndatabase = "{url}"\n')
    assert "s3cret" not in str(refusal.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="accord server init"):
        CoordinatorSettings.read(tmp_path)
    with pytest.raises(SettingsError, match="not TOML"):
        read(tmp_path, "federation = ")
    with pytest.raises(SettingsError, match="missing key: federation"):
        read(tmp_path, "")
    for name in ("../x", "a\nb"):
        with pytest.raises(SettingsError, match="name"):
            CoordinatorSettings.made({"federation": name})


def test_a_relative_database_is_in_the_folder(tmp_path: Path) -> None:
    folder = CoordinatorFolder(tmp_path)
    of = {
        "sqlite:///state.db": f"sqlite:///{tmp_path}/state.db",
        "sqlite:////var/lib/x.db": "sqlite:////var/lib/x.db",
        "postgresql+psycopg://a@b/c": "postgresql+psycopg://a@b/c",
    }
    for given, expected in of.items():
        assert folder.database_url(CoordinatorSettings(federation="N", database=given)) == expected
    with pytest.raises(SettingsError, match="SQLite needs a file"):
        folder.database_url(CoordinatorSettings(federation="N", database="sqlite://"))
