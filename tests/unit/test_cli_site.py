"""`accord site ledger`: what was spent, whether the file is sound, and the way back from an old copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from accord_client.ledger import chain
from accord_client.ledger.entries import DataSet, Limits
from accord_client.store import SiteStore
from accord_shared import cli_roster
from accord_shared.dp.accounting import epsilon
from accord_shared.dp.events import SampledGaussian
from accord_shared.identity import Identity
from command_line import Done, Run, accord_command, ok, refused

__all__ = ["accord_command"]

(ENTRY,) = entry_points(group="accord.commands", name="site")
PLAN = "a" * 64
EVENT = SampledGaussian(5.0, 1.0, 1)
ME = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32)


@pytest.fixture
def run(accord_command: Callable[..., Run]) -> Run:
    """`accord site ledger …` in an empty folder, in this process."""
    return accord_command(ENTRY, "site", "ledger")


def facts(done: Done) -> Any:
    return json.loads(ok(done).splitlines()[-1])


def private(name: str, data: bytes) -> None:
    Path(name).write_bytes(data)
    Path(name).chmod(0o600)


def release(store: SiteStore, *numbers: int, plan: str = PLAN, dataset: str = "loans") -> None:
    for number in numbers:
        store.release(plan, number, "m", None, EVENT, dataset=dataset)


@pytest.fixture
def store(run: Run) -> SiteStore:
    """Two data sets of one lineage, three releases under two plans."""
    loans = DataSet(name="loans", limits=Limits(epsilon=4.0, epsilon_all_collude=9.0, run_epsilon=3.0, delta=1e-6))
    made = SiteStore(Path("site"), datasets=[loans, DataSet(name="loans 2026", derived_from="loans")])
    release(made, 1, 2)
    release(made, 1, plan="b" * 64, dataset="loans 2026")
    return made


def test_show(run: Run, store: SiteStore) -> None:
    shown = facts(run("show", "--folder", "site", "--json"))
    head = store.ledger.head()
    assert (shown["seq"], shown["entries"], shown["head"]) == (head.seq, head.seq, head.hash.hex())
    loans, later = shown["datasets"]
    spent = epsilon([EVENT] * 3, 1e-6)
    assert (loans["name"], loans["derived_from"], loans["shares_budget_with"]) == ("loans", None, ["loans 2026"])
    assert loans["epsilon"] == loans["epsilon_all_collude"] == pytest.approx(spent)
    assert (loans["limits"], loans["delta"]) == ({"epsilon": 4.0, "epsilon_all_collude": 9.0, "run_epsilon": 3.0}, 1e-6)
    assert loans["plans"] == [{"plan": PLAN, "unit": None, "releases": 2, "last_round": 2}]
    assert (later["derived_from"], later["delta"], later["limits"]) == ("loans", 1e-5, {})
    assert later["epsilon"] == pytest.approx(epsilon([EVENT] * 3, 1e-5))


def test_show_in_words(run: Run, store: SiteStore) -> None:
    text = ok(run("show", "--folder", "site", "--delta", "1e-4"))
    for word in ("data set loans\n", "of at most 4", "of at most 9", "run epsilon at most 3", "derived from loans"):
        assert word in text
    assert f"plan {PLAN}: 2 releases" in text
    assert "delta                0.0001" in text


def test_what_left_without_noise_has_no_bound(run: Run) -> None:
    SiteStore(Path("site")).release(PLAN, 1, "m", None, None)
    (dataset,) = facts(run("show", "--folder", "site", "--json"))["datasets"]
    assert (dataset["epsilon"], dataset["epsilon_all_collude"], dataset["releases_without_noise"]) == (None, None, 1)
    assert "no bound" in ok(run("show", "--folder", "site"))


def test_verify(run: Run, store: SiteStore) -> None:
    assert facts(run("verify", "--folder", "site", "--json"))["sound"] is True
    assert f"number {store.ledger.head().seq}, {store.ledger.head().hash.hex()}" in ok(
        run("verify", "--folder", "site")
    )
    chain.close_all()
    path = Path("site/ledger.db")
    data = path.read_bytes()
    at = data.index(b'"noise_multiplier":5.0')
    path.write_bytes(data[: at + 19] + b"9" + data[at + 20 :])
    for verb in ("verify", "show", "export"):
        done = run(verb, "--folder", "site", "--json")
        refused(done, "is not what was written")
        assert done.out == ""


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_a_folder_without_a_ledger_is_refused_and_not_made(command: str, run: Run) -> None:
    refused(run(command, "--folder", "absent"), "absent has no ledger")
    assert not Path("absent").exists()


def test_a_delta_that_is_none_is_refused(run: Run, store: SiteStore) -> None:
    refused(run("show", "--folder", "site", "--delta", "0"), "--delta")


def test_export(run: Run, store: SiteStore) -> None:
    lines = [json.loads(line) for line in ok(run("export", "--folder", "site")).splitlines()]
    assert [line["kind"] for line in lines] == ["made", "dataset", "dataset", "release", "release", "release"]
    assert lines[-1]["hash"] == store.ledger.head().hash.hex()
    told = facts(run("export", "--folder", "site", "--out", "entries.jsonl", "--json"))
    assert told == {"out": "entries.jsonl", "entries": 6}
    assert [json.loads(line) for line in Path("entries.jsonl").read_text().splitlines()] == lines


def test_recover(run: Run, store: SiteStore) -> None:
    chain.close_all()
    shutil.copytree("site", "old")
    release(store, 3)
    private("me.pem", ME.to_pem(None))
    Path("receipt.json").write_text(store.ledger.receipt("site", ME).to_json())
    words = ("--receipt", "receipt.json", "--identity", "me.pem")
    for folder, imported in (("old", True), ("old", False), ("site", False), ("new disk", True)):
        told = facts(run("recover", "--folder", folder, *words, "--json"))
        assert told["imported"] is imported
        spent = SiteStore(Path(folder)).ledger.epsilon("loans", 1e-5)
        assert spent == pytest.approx(store.ledger.epsilon("loans", 1e-5))
    assert "nothing was missing" in ok(run("recover", "--folder", "old", *words))


def test_recover_takes_no_stranger_s_receipt(run: Run, store: SiteStore) -> None:
    stranger = Identity.generate()
    private("me.pem", ME.to_pem(None))
    Path("receipt.json").write_text(store.ledger.receipt("site", stranger).to_json())
    words = ("--receipt", "receipt.json", "--identity", "me.pem")
    refused(run("recover", "--folder", "new", *words), "does not verify")
    Path("receipt.json").write_text("{}")
    refused(run("recover", "--folder", "new", *words), "not a receipt")
    refused(run("recover", "--folder", "new", "--receipt", "absent", "--identity", "me.pem"), "absent")
    Path("receipt.json").write_text(store.ledger.receipt("site", ME).to_json())
    private("me.pem", ME.to_pem(b"secret"))
    refused(run("recover", "--folder", "new", *words), "me.pem", cli_roster.PASSPHRASE)
    assert not Path("new").exists()
