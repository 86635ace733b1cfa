"""`accord roster`: from identities to a pinned hash; refusals of one line, keys that are never shown or lost."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from accord_shared.identity import Identity, Member
from accord_shared.roster import SignedRoster
from command_line import Done, Run, accord_command, ok, refused

__all__ = ["accord_command"]

(ENTRY,) = entry_points(group="accord.commands", name="roster")


@pytest.fixture
def run(accord_command: Callable[..., Run]) -> Run:
    """`accord roster …` in an empty folder, in this process."""
    return accord_command(ENTRY, "roster")


def members(run: Run, *numbers: int) -> list[str]:
    for number in numbers:
        out, public = f"bank{number}.pem", f"bank{number}.json"
        ok(run("identity", f"Bank {number:02d} (Nordkap)", "--out", out, "--public", public))
    return [f"bank{number}.json" for number in numbers]


def init(run: Run, **changes: str) -> Done:
    options = {"federation": "Nord", "minimum": "2", "colluders": "1", "key": "key.pem", "out": "roster.json"}
    return run("init", *(word for key, value in (options | changes).items() for word in (f"--{key}", value)))


@pytest.fixture
def signed(run: Run) -> Path:
    """A signed roster of three members."""
    ok(init(run))
    ok(run("add", "roster.json", *members(run, 2, 1, 3)))
    ok(run("sign", "roster.json", "--key", "key.pem"))
    return Path("roster.json")


def test_the_whole_way(run: Run) -> None:
    assert "no members yet" in ok(init(run))
    files = members(run, 2, 1, 3)
    assert "3 members, serial 1; not signed yet" in ok(run("add", "roster.json", *files))
    told = ok(run("sign", "roster.json", "--key", "key.pem")).splitlines()[-1]
    roster = SignedRoster.from_json(Path("roster.json").read_bytes()).verify(told)
    assert [member.name for member in roster.members] == [f"Bank {n:02d} (Nordkap)" for n in (1, 2, 3)]
    shown = ok(run("show", "roster.json"))
    for word in (told, "Nord", "valid", *(member.fingerprint for member in roster.members)):
        assert word in shown


def test_every_command_speaks_json(run: Run) -> None:
    def facts(*words: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(ok(run(*words, "--json")).splitlines()[-1])
        return found

    made = facts("identity", "Bank 01", "--out", "b1.pem", "--public", "b1.json")
    assert made["member"] == json.loads(Path("b1.json").read_text())
    bare = facts("identity", "Bank 02", "--out", "b2.pem")
    Path("b2.json").write_text(json.dumps(bare["member"]))
    assert (bare["public"], Member.from_json(Path("b2.json").read_bytes()).fingerprint) == (None, bare["fingerprint"])
    keys = facts(
        "init", "--federation", "Nord", "--minimum", "2", "--colluders", "0", "--key", "k.pem", "--out", "r.json"
    )
    assert keys["members"] == 0
    assert facts("add", "r.json", "b1.json", "b2.json")["members"] == ["Bank 01", "Bank 02"]
    refused(run("show", "r.json", "--hash"), "r.json")
    signed = facts("sign", "r.json", "--key", "k.pem")
    assert ok(run("show", "r.json", "--hash")) == f"{signed['roster_hash']}\n"
    gone = facts("remove", "r.json", "Bank 02")
    assert (gone["members"], gone["signed"], gone["serial"]) == (["Bank 01"], False, signed["serial"] + 1)
    refused(run("show", "r.json", "--hash"), "r.json")


def test_show_as_json(run: Run, signed: Path) -> None:
    facts = json.loads(ok(run("show", str(signed), "--json")).splitlines()[-1])
    file = SignedRoster.from_json(signed.read_bytes())
    fields = ("federation", "serial", "minimum", "colluders", "signature", "roster_hash", "roster_key")
    expected = ["Nord", 1, 2, 1, "valid", file.roster.hash, file.key.fingerprint]
    assert [facts[field] for field in fields] == expected
    assert facts["members"] == [{"name": m.name, "fingerprint": m.fingerprint} for m in file.roster.members]
    assert facts["thresholds"].startswith("a cohort of all members is refused")


def test_show_tells_the_thresholds_of_all(run: Run) -> None:
    ok(init(run, minimum="3"))
    ok(run("add", "roster.json", *members(run, 1, 2, 3)))
    facts = json.loads(ok(run("show", "roster.json", "--json")))
    assert (facts["t_sign"], facts["t_share"], facts["signature"]) == (3, 3, "none")


def test_a_change_removes_the_signature_and_says_so(run: Run, signed: Path) -> None:
    for words in (("add", str(signed), *members(run, 4)), ("remove", str(signed), "Bank 04 (Nordkap)")):
        done = ok(run(*words))
        assert "the signature was removed: sign it again" in done
        assert '"signature"' not in signed.read_text()
        assert "none" in ok(run("show", str(signed)))
        ok(run("sign", str(signed), "--key", "key.pem"))
    assert SignedRoster.from_json(signed.read_bytes()).verify().serial == 3


def test_a_tampered_roster_is_shown_as_invalid(run: Run, signed: Path) -> None:
    signed.write_text(signed.read_text().replace('"colluders": 1', '"colluders": 0'))
    done = run("show", str(signed))
    refused(done, "roster.json", "does not verify")
    assert "invalid" in done.out
    done = run("show", str(signed), "--json")
    refused(done)
    assert json.loads(done.out)["signature"] == "invalid"


def test_the_public_entry_goes_to_standard_output(run: Run) -> None:
    member = Member.from_json(ok(run("identity", "Bank 01 (Nordkap)", "--out", "bank.pem")))
    assert member == Identity.from_pem(Path("bank.pem").read_bytes(), None).public("Bank 01 (Nordkap)")


# --- refusals


def test_sybils_are_refused(run: Run) -> None:
    ok(init(run))
    (entry,) = members(run, 1)
    twin = json.loads(Path(entry).read_text()) | {"name": "Bank 02 (Südkap)"}
    Path("twin.json").write_text(json.dumps(twin))
    before = Path("roster.json").read_bytes()
    refused(run("add", "roster.json", entry, "twin.json"), "same ed25519 key", "Bank 01", "Bank 02")
    assert Path("roster.json").read_bytes() == before
    ok(run("add", "roster.json", entry))
    refused(run("add", "roster.json", "twin.json"), "same ed25519 key")
    refused(run("add", "roster.json", entry), "distinct")


def test_bad_input_is_one_line(run: Run, signed: Path) -> None:
    refused(run("add", str(signed), "missing.json"), "missing.json", "No such file")
    refused(run("add", str(signed), "bank1.pem"), "bank1.pem", "JSON")
    refused(run("add", str(signed), str(signed)), "roster.json")
    refused(run("show", "missing.json"), "missing.json")
    refused(run("show", "key.pem"), "key.pem")
    refused(run("remove", str(signed), "nobody"), "nobody")
    refused(run("sign", str(signed), "--key", "bank1.pem"), "bank1.pem is not the key of roster.json")
    refused(run("sign", str(signed), "--key", str(signed)), "not an identity")
    refused(run("identity", "two\nlines", "--out", "new.pem"), "name")
    assert not Path("new.pem").exists()


def test_bad_options_make_no_files(run: Run) -> None:
    refused(init(run, minimum="1"), "minimum")
    refused(init(run, colluders="2"), "colluders")
    refused(init(run, federation=" x"), "name")
    refused(init(run, out="no/such/roster.json"), "cannot write")
    refused(init(run, key="no/such/key.pem"), "no/such/key.pem")
    refused(init(run, key="same", out="same"), "not overwritten")
    assert list(Path.cwd().iterdir()) == []


def test_too_few_members_are_not_signed(run: Run) -> None:
    ok(init(run))
    ok(run("add", "roster.json", *members(run, 1)))
    refused(run("sign", "roster.json", "--key", "key.pem"), "minimum = 2, but the roster has 1 members")


# --- keys


def test_key_files_are_private_and_never_overwritten(run: Run, signed: Path) -> None:
    for name in ("key.pem", "bank1.pem"):
        before = Path(name).read_bytes()
        assert stat.S_IMODE(Path(name).stat().st_mode) == 0o600
        refused(init(run, key=name, out="other.json"), name, "never overwritten")
        refused(run("identity", "x", "--out", name), name, "never overwritten")
        assert Path(name).read_bytes() == before
    refused(init(run, key="new.pem"), "roster.json exists")
    refused(run("identity", "x", "--out", "new.pem", "--public", "bank1.json"), "bank1.json exists")
    assert not Path("new.pem").exists()
    Path("link.pem").symlink_to("elsewhere.pem")
    refused(run("identity", "x", "--out", "link.pem"), "never overwritten")
    assert not Path("elsewhere.pem").exists()


def test_a_failed_write_leaves_no_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr("accord_shared.service.keyfile.write_atomic", full)
    refused(run("identity", "x", "--out", "x.pem"), "No space left")
    assert list(Path.cwd().iterdir()) == []


def test_a_passphrase_encrypts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCORD_PASSPHRASE", "correct horse")
    ok(init(run))
    ok(run("add", "roster.json", *members(run, 1, 2)))
    assert Path("key.pem").read_bytes().count(b"BEGIN ENCRYPTED PRIVATE KEY") == 2
    ok(run("sign", "roster.json", "--key", "key.pem"))
    monkeypatch.setenv("ACCORD_PASSPHRASE", "battery staple")
    done = run("sign", "roster.json", "--key", "key.pem")
    refused(done, "key.pem", "passphrase is wrong")
    assert "battery" not in done.err + done.out
    monkeypatch.setenv("ACCORD_PASSPHRASE", "")
    refused(run("sign", "roster.json", "--key", "key.pem"), "no passphrase is given")


def test_no_output_holds_a_secret(run: Run) -> None:
    (entry,) = members(run, 1)
    ok(init(run))
    words = [
        line
        for name in ("bank1.pem", "key.pem")
        for line in Path(name).read_text().splitlines()
        if not line.startswith("-----")
    ]
    runs = (
        run("add", "roster.json", entry),
        run("add", "roster.json", "bank1.pem"),
        run("sign", "roster.json", "--key", "bank1.pem"),
        run("sign", "roster.json", "--key", "key.pem"),
        run("show", "key.pem"),
        run("show", "roster.json"),
        run("identity", "x", "--out", "bank1.pem"),
    )
    texts = "".join(done.out + done.err for done in runs) + Path("roster.json").read_text()
    assert not [word for word in words if word in texts]


def test_help_warns_of_the_coordinator(run: Run) -> None:
    for words in (("--help",), ("init", "--help"), ("sign", "--help")):
        assert "away from the coordinator" in " ".join(ok(run(*words)).split())
