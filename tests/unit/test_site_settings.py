"""A site's folder, settings and keys: closed to others, strict, whole after a crash."""

from __future__ import annotations

import pickle
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from accord_client.keystore import Keys, check_certificate, expiry_warning, read_authorities
from accord_client.settings import SiteFolder, SiteSettings, settings_template
from accord_shared.errors import IdentityError, ImpostorError, OutputError, SettingsError
from accord_shared.frames import frame
from accord_shared.identity import verify_both
from accord_shared.service import keyfile
from accord_shared.service.keyfile import new_tls_key
from coordinator_lab import SITE, Authority, at_once, key_of

AUTHORITY = Authority()
PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
NAMES = ["Bank", 'Bank "Nord"', "Bänk — 01", "a" * 64, "O'Hara & Søn = #1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteFolder:
    monkeypatch.delenv(keyfile.PASSPHRASE, raising=False)
    made = SiteFolder(tmp_path / "site")
    made.make()
    return made


def write(folder: SiteFolder, text: str) -> None:
    folder.settings.write_text(text)


# --- settings


@pytest.mark.parametrize("name", [name for name in NAMES if '"' not in name])
def test_the_template_is_settings(name: str, folder: SiteFolder) -> None:
    write(folder, settings_template(name))
    settings = SiteSettings.read(folder)
    assert (settings.name, settings.data, settings.device.device) == (name, {}, "auto")
    assert (settings.agent.metrics, settings.agent.metrics_host) == (0, "127.0.0.1")


def test_data_sets_are_read(folder: SiteFolder) -> None:
    table = '\n[data.cases]\nkind = "csv"\npath = "cases.csv"\ntext = "text"\nlabel = "label"\n'
    write(folder, settings_template("Bank") + table)
    (name,) = SiteSettings.read(folder).data
    assert name == "cases"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "name"),
        ('version = 2\nname = "Bank"', "version"),
        ("version = 1", "name"),
        ('version = 1\nname = "Bank"\nnaem = 1', "naem"),
        ('version = 1\nname = "../up"', "name"),
        ('version = 1\nname = "Bank"\n[device]\ndevice = "tpu"', "device.device"),
        ('version = 1\nname = "Bank"\n[agent]\npoll_s = "fast"', "agent.poll_s"),
        ('version = 1\nname = "Bank"\n[agent]\npolls = 1', "agent.polls"),
        ('version = 1\nname = "Bank"\n[agent]\nmost_skew_s = 0', "agent.most_skew_s"),
        ('version = 1\nname = "Bank"\n[data."../x"]\nkind = "csv"\npath = "a"\ntext = "t"\nlabel = "l"', "data"),
        ('version = 1\nname = "Bank"\n[data.cases]\nkind = "csv"', "data.cases"),
        ("version = = 1", "not TOML"),
        ("\x00", "not TOML"),
    ],
)
def test_settings_that_do_not_fit_are_named(text: str, word: str, folder: SiteFolder) -> None:
    write(folder, text)
    with pytest.raises(SettingsError) as refused:
        SiteSettings.read(folder)
    line = str(refused.value)
    assert word in line
    assert str(folder.settings) in line
    assert "\n" not in line


def test_settings_that_are_absent_are_refused(folder: SiteFolder) -> None:
    with pytest.raises(SettingsError, match=r"cannot read .*site\.toml"):
        SiteSettings.read(folder)


def test_a_gpu_that_is_not_there_is_said(folder: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write(folder, 'name = "Bank"\n[device]\ndevice = "cuda"\n')
    with pytest.raises(SettingsError, match="no GPU"):
        SiteSettings.read(folder).device.runtime()
    write(folder, 'name = "Bank"\n')
    assert SiteSettings.read(folder).device.runtime().device == "cpu"


# --- folder


def test_a_folder_open_to_others_is_refused(folder: SiteFolder) -> None:
    write(folder, settings_template("Bank"))
    SiteFolder.opened(folder.path)
    folder.path.chmod(0o750)
    with pytest.raises(OutputError, match="closed to others"):
        SiteFolder.opened(folder.path)


def test_a_folder_of_something_else_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not the folder of a site"):
        SiteFolder.opened(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("run", ["", "..", ".", "../up", "a/b", "/etc", ".hidden", "a\x00b", "a\nb", "a" * 129, "a\\b"])
def test_a_run_s_name_leads_nowhere_else(run: str, folder: SiteFolder) -> None:
    with pytest.raises(SettingsError, match="not the name of a run"):
        folder.model(run)
    assert folder.model("bank-demo.2-x").parent == folder.models


# --- keys


def test_keys_are_made_once(folder: SiteFolder) -> None:
    first, second = Keys.create(folder), Keys.create(folder)
    assert first.identity.keys == second.identity.keys == Keys.load(folder).identity.keys
    assert first.node.public_key() == second.node.public_key()
    for path in folder.keys.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_what_an_interrupted_creation_left_is_kept(folder: SiteFolder) -> None:
    first = Keys.create(folder)
    (folder.keys / "node.pem").unlink()
    second = Keys.create(folder)
    assert first.identity.keys == second.identity.keys
    assert first.node.public_key() != second.node.public_key()


@pytest.mark.parametrize("name", ["identity.pem", "node.pem"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_keys_open_to_others_are_refused(name: str, mode: int, folder: SiteFolder) -> None:
    Keys.create(folder)
    (folder.keys / name).chmod(mode)
    with pytest.raises(IdentityError, match=f"{name} can be read by others"):
        Keys.load(folder)
    with pytest.raises(IdentityError, match="can be read by others"):
        Keys.create(folder)


@pytest.mark.parametrize("name", ["identity.pem", "node.pem"])
def test_keys_are_encrypted_where_there_is_a_passphrase(
    name: str, folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(keyfile.PASSPHRASE, "correct horse")
    made = Keys.create(folder)
    assert b"ENCRYPTED" in (folder.keys / name).read_bytes()
    assert Keys.load(folder).node.public_key() == made.node.public_key()
    for wrong in ("another", ""):
        monkeypatch.setenv(keyfile.PASSPHRASE, wrong)
        with pytest.raises(IdentityError, match=keyfile.PASSPHRASE) as refused:
            Keys.load(folder)
        assert "horse" not in str(refused.value)


@pytest.mark.parametrize("name", ["identity.pem", "node.pem"])
@pytest.mark.parametrize("content", [b"", b"garbage", PEM.replace(b"CERTIFICATE", b"PRIVATE KEY")])
def test_damaged_keys_are_refused(name: str, content: bytes, folder: SiteFolder) -> None:
    Keys.create(folder)
    (folder.keys / name).write_bytes(content)
    with pytest.raises(IdentityError, match=name):
        Keys.load(folder)


def test_keys_do_not_print_or_pickle(folder: SiteFolder) -> None:
    keys = Keys.create(folder)
    keys.keep_certificate(AUTHORITY.of_key(keys.node.public_key(), SITE))
    assert repr(keys) == "Keys(...)"
    assert "PRIVATE" not in repr(keys.pair())
    with pytest.raises(TypeError):
        pickle.dumps(keys)


@pytest.mark.parametrize("name", NAMES)
def test_a_certificate_request_is_of_the_node_key_and_vouched_for(name: str, folder: SiteFolder) -> None:
    keys = Keys.create(folder)
    data = keys.csr(name)
    request = x509.load_der_x509_csr(data)
    assert request.is_signature_valid
    assert request.public_key() == keys.node.public_key()
    assert [one.value for one in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [name]
    verify_both(keys.member(name), frame("accord/1/enrol", name, data), keys.vouch(name, data))


def test_a_certificate_of_another_key_is_not_used(folder: SiteFolder) -> None:
    keys = Keys.create(folder)
    with pytest.raises(IdentityError, match=r"certificate\.pem cannot be read"):
        keys.pair()
    keys.keep_certificate(AUTHORITY.of_key(new_tls_key().public_key(), SITE))
    with pytest.raises(IdentityError, match="not of this site's key"):
        keys.pair()
    keys.keep_certificate(b"garbage")
    with pytest.raises(IdentityError, match="not a certificate"):
        keys.pair()


# --- certificates from outside


def test_only_the_certificate_that_was_asked_for_is_taken() -> None:
    key = new_tls_key()
    public, good = key.public_key(), AUTHORITY.of_key(key.public_key(), SITE)
    check_certificate(good, AUTHORITY.pem, public, SITE)
    for pem, authorities, name in (
        (AUTHORITY.of_key(new_tls_key().public_key(), SITE), AUTHORITY.pem, SITE),
        (AUTHORITY.of_key(key.public_key(), "Bank 02"), AUTHORITY.pem, SITE),
        (Authority().of_key(key.public_key(), SITE), AUTHORITY.pem, SITE),  # same names, another key
        (b"", AUTHORITY.pem, SITE),
        (good, b"", SITE),
        (good, good, SITE),  # a site's certificate is no authority
        (good, AUTHORITY.pem * 9, SITE),
        (good, PEM, SITE),
    ):
        with pytest.raises(ImpostorError):
            check_certificate(pem, authorities, public, name)


def test_authorities_are_few_and_whole() -> None:
    other = Authority("other")
    assert len(read_authorities(AUTHORITY.pem + other.pem)) == 2
    with pytest.raises(ImpostorError):
        read_authorities(AUTHORITY.pem + b"#" * 70_000)
    with pytest.raises(ImpostorError):
        read_authorities(AUTHORITY.pem + AUTHORITY.of_key(new_tls_key().public_key(), SITE))


@pytest.mark.parametrize(("days", "word"), [(31, None), (29, "expires on"), (-1, "expired on")])
def test_expiry_is_warned_of_thirty_days_ahead(days: int, word: str | None) -> None:
    line = expiry_warning(datetime.now(UTC) + timedelta(days=days))
    assert line is None if word is None else word in (line or "")


# --- renewal


@pytest.fixture
def enrolled(folder: SiteFolder) -> Keys:
    keys = Keys.create(folder)
    keys.keep_certificate(AUTHORITY.site(keys.csr(SITE), SITE))
    return keys


def test_a_renewal_replaces_key_and_certificate(enrolled: Keys, folder: SiteFolder) -> None:
    old = enrolled.node.public_key()
    request = enrolled.next_request(SITE)
    assert (
        x509.load_der_x509_csr(enrolled.next_request(SITE)).public_key() == x509.load_der_x509_csr(request).public_key()
    ), "a repeated renewal asks for the same key"
    assert Keys.load(folder).node.public_key() == old, "nothing is replaced before the certificate is there"
    enrolled.adopt_next(AUTHORITY.site(request, SITE), AUTHORITY.pem, SITE)
    assert enrolled.node.public_key() != old
    assert Keys.load(folder).pair() == enrolled.pair()
    assert not list(folder.keys.glob("*next*"))


def test_a_renewal_takes_no_other_certificate(enrolled: Keys, folder: SiteFolder) -> None:
    before = enrolled.pair()
    enrolled.next_request(SITE)
    with pytest.raises(ImpostorError):
        enrolled.adopt_next(AUTHORITY.site(enrolled.csr(SITE), SITE), AUTHORITY.pem, SITE)
    assert Keys.load(folder).pair() == enrolled.pair() == before


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_renewal_survives_a_crash_at_each_step(
    steps: int, enrolled: Keys, folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`steps` renames happen after the new certificate was written."""
    issued = AUTHORITY.site(enrolled.next_request(SITE), SITE)
    replace, left = Path.replace, [steps]

    def crashing(self: Path, target: Path) -> Path:
        if "next" in self.name and not self.name.startswith("."):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crashing)
        if steps < 2:
            with pytest.raises(KeyboardInterrupt):
                enrolled.adopt_next(issued, AUTHORITY.pem, SITE)
        else:
            enrolled.adopt_next(issued, AUTHORITY.pem, SITE)
    found = Keys.load(folder)
    assert found.pair().chain == issued
    assert not list(folder.keys.glob("*next*"))


def test_no_thread_sees_half_a_renewal(enrolled: Keys) -> None:
    done = threading.Event()

    def look() -> int:
        seen = set()
        while not done.is_set():
            pair = enrolled.pair()
            assert x509.load_pem_x509_certificate(pair.chain).public_key() == key_of(pair).public_key()
            seen.add(pair.chain)
        return len(seen)

    def renew() -> None:
        try:
            for _ in range(20):
                issued = AUTHORITY.site(enrolled.next_request(SITE), SITE)
                enrolled.adopt_next(issued, AUTHORITY.pem, SITE)
        finally:
            done.set()

    assert max(at_once(look, look, renew)[:2]) > 1
