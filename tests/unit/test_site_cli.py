"""`accord site …` against a real coordinator's API and a real agent's socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import save

from accord_client import check as checks
from accord_client.enrolment import Enrolment
from accord_client.keystore import Keys
from accord_client.ledger.entries import DataSet, Limits
from accord_client.plans import PlanBook
from accord_client.settings import SiteFolder
from accord_client.store import SiteStore
from accord_shared.dp.accounting import epsilon
from accord_shared.dp.events import SampledGaussian
from accord_shared.errors import NotAdmitted, PolicyRefused, Unreachable
from accord_shared.identity import Identity
from accord_shared.roster import Roster, SignedRoster, sign_roster
from accord_shared.service import rpc
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc
from command_line import Done, Run, accord_command, ok, refused
from conftest import plan_of
from coordinator_lab import FEDERATION, SITE, Coordinator
from networks import listening, tls_server

__all__ = ["accord_command"]

(ENTRY,) = entry_points(group="accord.commands", name="site")
KEY = Identity.from_seeds(b"\x07" * 32, b"\x08" * 32)
OTHERS = [Identity.from_seeds(bytes([n]) * 32, bytes([40 + n]) * 32).public(f"Bank {n:02d}") for n in (2, 3, 4)]
PLAN = plan_of({"model.digest": f"sha256:{'1' * 64}"})
FOLDER = Path("accord-site")


@pytest.fixture
def run(accord_command: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`accord site …` in an empty folder, in this process."""
    monkeypatch.delenv("ACCORD_SITE_FOLDER", raising=False)
    return accord_command(ENTRY, "site")


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    lab = Coordinator().start()
    yield lab
    lab.stop()


@pytest.fixture
def site(run: Run, coordinator: Coordinator) -> SiteFolder:
    """Enrolled."""
    ok(run("enrol", coordinator.token()))
    return SiteFolder(FOLDER)


def facts(done: Done) -> Any:
    return json.loads(ok(done).splitlines()[-1])


def roster_of(site: SiteFolder, serial: int = 0, others: int = 2) -> SignedRoster:
    mine = Keys.load(site).member(SITE)
    fields = {"federation": FEDERATION, "serial": serial, "minimum": 2, "colluders": 0}
    members = tuple(sorted((mine, *OTHERS[:others]), key=lambda member: member.name))
    return sign_roster(Roster.made({**fields, "members": members}), KEY)


# --- enrolment and rosters


def test_enrol(run: Run, coordinator: Coordinator) -> None:
    told = facts(run("enrol", coordinator.token(), "--name", SITE, "--folder", "bank", "--json"))
    assert (told["name"], told["federation"], told["folder"]) == (SITE, FEDERATION, "bank")
    assert told["fingerprint"] == Keys.load(SiteFolder(Path("bank"))).member(SITE).fingerprint
    assert told["coordinator"] == coordinator.identity.keys.fingerprint
    refused(run("enrol", coordinator.token(), "--folder", "bank"), "is enrolled already")


def test_enrol_reads_the_token_from_standard_input(
    run: Run, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(f"{coordinator.token()}\n")
    with (tmp_path / "token").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        text = ok(run("enrol", "-"))
    assert "Tell this fingerprint" in text


def test_enrol_refusals_show_no_secret(run: Run, coordinator: Coordinator) -> None:
    for token in ("nonsense", coordinator.token()[:-7], coordinator.token(name="Bank 02")):
        done = run("enrol", token, "--name", SITE)
        refused(done)
        assert token not in done.err
        assert not FOLDER.exists()


def test_the_folder_comes_from_the_environment(
    run: Run, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCORD_SITE_FOLDER", "elsewhere")
    ok(run("enrol", coordinator.token()))
    assert Path("elsewhere/enrolment.json").exists()
    assert facts(run("status", "--json"))["name"] == SITE


def test_a_roster_from_first_to_next(run: Run, site: SiteFolder, coordinator: Coordinator) -> None:
    shown = facts(run("roster", "show", "--json"))
    assert (shown["accepted"], shown["offered"]) == (None, None)
    refused(run("roster", "accept", "0" * 64), "offers no roster yet")
    first = roster_of(site)
    coordinator.roster = first.to_json()
    refused(run("roster", "accept", "0" * 64), f"offers roster {first.roster.hash}")
    assert not coordinator.endorsements
    assert facts(run("roster", "accept", first.roster.hash, "--json"))["adopted"] is True
    later = roster_of(site, 1, 3)
    coordinator.roster, coordinator.endorsements = later.to_json(), []
    shown = facts(run("roster", "show", "--json"))
    assert (shown["accepted"]["serial"], shown["offered"]["serial"], shown["needed"]) == (0, 1, 2)
    told = ok(run("roster", "accept", later.roster.hash))
    assert "endorsed by 1 of 2 members" in told
    assert "serial               0" in ok(run("roster", "show"))
    coordinator.stop()
    shown = facts(run("roster", "show", "--json"))
    assert (shown["accepted"]["hash"], shown["offered"]) == (first.roster.hash, None)
    assert "cannot be reached" in shown["problem"]


def test_a_revoked_site_still_shows_what_it_trusts(run: Run, site: SiteFolder, coordinator: Coordinator) -> None:
    coordinator.refuse["GetRoster"] = NotAdmitted("this site was revoked")
    shown = facts(run("roster", "show", "--json"))
    assert (shown["accepted"], shown["problem"]) == (None, "this site was revoked")
    refused(run("roster", "accept", "0" * 64), "this site was revoked")


def test_a_roster_that_cannot_follow_is_said(run: Run, site: SiteFolder, coordinator: Coordinator) -> None:
    others = [Identity.from_seeds(bytes([n]) * 32, bytes([40 + n]) * 32).public(f"Bank {n:02d}") for n in (2, 3)]
    fields = {"federation": FEDERATION, "serial": 0, "minimum": 2, "colluders": 0, "members": tuple(others)}
    offered = sign_roster(Roster.made(fields), KEY)
    coordinator.roster = offered.to_json()
    assert "not on the roster" in facts(run("roster", "show", "--json"))["problem"]
    refused(run("roster", "accept", offered.roster.hash), "not on the roster")


# --- plans


class Agent(accord_pb2_grpc.AgentServicer):
    """An agent's local API over the same book."""

    def __init__(self, site: SiteFolder) -> None:
        self.book = PlanBook(site.plans)
        self.state = "ready"

    def Status(self, request: Any, context: Any) -> Any:  # noqa: N802
        run = pb.SiteRun(run="r1", plan_hash=PLAN.hash, last_round=2, releases=2)
        preparation = pb.PlanPreparation(plan_hash=PLAN.hash, state="embedding", done=1200, total=20000, left_s=150.0)
        refusal = pb.PlanRefusal(plan_hash="f" * 64, reason="DataError: cases.csv: 7 of 17 rows fail", time_us=10**15)
        return pb.AgentStatus(
            name=SITE,
            state=self.state,
            skew_s=0.5,
            certificate_expires_us=10**15,
            runs=[run],
            warnings=["w"],
            preparations=[preparation],
            refusals=[refusal],
        )

    def Pause(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.state = "paused"
        return self.Status(request, context)

    def Resume(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.state = "ready"
        return self.Status(request, context)

    def ListPlans(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.PlanList(plans=[record.info() for record in self.book.records()])

    def ShowPlan(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self.book.find(request.hash).info()

    def ApprovePlan(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self.book.approve(request.hash).info()


@pytest.fixture
def agent(site: SiteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    made = Agent(site)
    server = rpc.local_server(
        site.control, "agent", lambda server: accord_pb2_grpc.add_AgentServicer_to_server(made, server)
    )
    server.start()
    yield made
    server.stop(0).wait()


def plans_by_hand(run: Run, site: SiteFolder) -> None:
    write_data(site)
    write_policy(site, most_rounds=8)
    assert "no plan was offered yet" in ok(run("plan", "list"))
    book, signer = PlanBook(site.plans), Enrolment.read(site).coordinator.fingerprint
    book.offer(PLAN, signer, None)
    outside = PLAN.revised({"run.rounds": 9})
    book.offer(outside, signer, "run.rounds wants 8 at most, not 9")
    states = {one["hash"]: one["state"] for one in facts(run("plan", "list", "--json"))["plans"]}
    assert states == {PLAN.hash: "waiting", outside.hash: "refused"}
    shown = facts(run("plan", "show", PLAN.hash[:8], "--json"))
    assert (shown["plan"]["run"]["rounds"], shown["state"]) == (4, "waiting")
    assert shown["cost"]["epsilon"]["most"] == 8.0
    assert "rounds = 4" in ok(run("plan", "show", PLAN.hash))
    approved = facts(run("plan", "approve", PLAN.hash, "--json"))
    assert (approved["state"], approved["cost"]["dataset"], approved["cost"]["epsilon"]["spent"]) == (
        "approved",
        "cases",
        0.0,
    )
    assert " → 8 of 8" in ok(run("plan", "approve", PLAN.hash))
    book.require(PLAN.hash)
    refused(run("plan", "approve", outside.hash), "run.rounds")
    refused(run("plan", "approve", "f" * 64), "no plans of hash")
    refused(run("plan", "approve", "../../etc/passwd"), "no plan hash")
    with pytest.raises(PolicyRefused):
        book.require(outside.hash)


def test_a_plan_is_judged_by_the_policy_of_now(run: Run, site: SiteFolder) -> None:
    """What an earlier policy refused may be approved at once; what this one refuses may not, whatever was said."""
    plans_by_hand(run, site)
    outside = PLAN.revised({"run.rounds": 9})
    write_policy(site, most_rounds=9)
    states = {one["hash"]: one["state"] for one in facts(run("plan", "list", "--json"))["plans"]}
    assert states == {PLAN.hash: "approved", outside.hash: "waiting"}
    assert facts(run("plan", "approve", outside.hash, "--json"))["state"] == "approved"
    write_policy(site, most_rounds=3)
    refused(run("plan", "approve", PLAN.hash), "run.rounds", "3 at most, not 4")
    assert facts(run("plan", "show", PLAN.hash, "--json"))["state"] == "refused"
    site.policy.write_text("version = 9")
    assert "refused" in ok(run("plan", "list"))  # a policy that cannot be read hides nothing


def test_plans_without_an_agent(run: Run, site: SiteFolder) -> None:
    plans_by_hand(run, site)


def test_plans_through_the_agent(run: Run, site: SiteFolder, agent: Agent) -> None:
    plans_by_hand(run, site)


# --- the agent


def test_status_pause_and_resume(run: Run, agent: Agent) -> None:
    told = facts(run("status", "--json"))
    assert (told["state"], told["runs"][0]["last_round"], told["warnings"]) == ("ready", 2, ["w"])
    assert told["certificate_expires"].startswith("2001-09-09")
    text = ok(run("status"))
    assert "round 2, 2 releases" in text
    assert f"{PLAN.hash[:12]}: embedding 1,200 of 20,000 records, 2 min left" in text
    assert "ffffffffffff: DataError: cases.csv: 7 of 17 rows fail (since 2001-09-09" in text
    assert told["preparations"][0]["left_s"] == 150.0
    ok(run("status", "--wait", "--timeout", "5"))
    late = run("plan", "list", "--wait", "--timeout", "0.2")
    assert (late.code, late.err) == (3, "accord: not ready within 0.2 s: no plan waits for this site's operator\n")
    assert facts(run("pause", "--json"))["state"] == "paused"
    assert facts(run("status", "--json"))["state"] == "paused"
    waited = run("status", "--wait", "--timeout", "0.2")
    assert (waited.code, waited.err.startswith("accord: not ready within 0.2 s: paused")) == (3, True)
    assert "ready" in ok(run("resume"))


def test_status_without_an_agent(run: Run, site: SiteFolder) -> None:
    PlanBook(site.plans).offer(PLAN, "a" * 64, None)
    told = facts(run("status", "--json"))
    assert (told["state"], told["plans_waiting"]) == ("stopped", [PLAN.hash])
    assert told["roster"] == ""
    assert "accord site up" in ok(run("status"))
    for verb in ("pause", "resume"):
        refused(run(verb), "the agent is not running in accord-site")


def test_an_agent_that_was_killed_is_not_running(run: Run, site: SiteFolder, tmp_path: Path) -> None:
    """Its socket and token are still there."""
    code = (
        "import os, signal; from pathlib import Path; from accord_shared.service import rpc\n"
        "rpc.local_server(Path('accord-site/control'), 'agent', lambda _: None).start()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (site.control / "agent.sock").exists()
    assert facts(run("status", "--json"))["state"] == "stopped"
    refused(run("pause"), "the agent is not running")
    assert "no plan was offered yet" in ok(run("plan", "list"))


def test_prepare_ahead(run: Run, site: SiteFolder, model_folder: Path) -> None:
    from accord_client.models import digest

    plan = plan_of({"model.digest": digest(model_folder)})
    write_policy(site, models=[plan.model.digest])
    write_data(site)
    assert "no plan is approved" in ok(run("prepare"))
    Path("plan.toml").write_text(plan.to_toml())
    told = run("prepare", "plan.toml", "--json")
    assert json.loads(told.out.splitlines()[-1])["plans"] == [{"plan_hash": plan.hash, "records": 20}]
    assert "records embedded" in told.err
    cached = sorted(path.name for path in site.cache.glob("*.npy"))
    assert len(cached) == 2  # records, and names of labels
    book = PlanBook(site.plans)
    book.offer(plan, "a" * 64, None)
    book.approve(plan.hash)
    done = run("prepare")
    assert "20 records are prepared" in done.out
    assert sorted(path.name for path in site.cache.glob("*.npy")) == cached
    write_data(site, 20, bad=9)
    refused(run("prepare", plan.hash[:8]), "9 of 20 rows fail")


def test_a_short_disk_refuses_before_it_begins(
    run: Run, site: SiteFolder, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from accord_client import features
    from accord_client.models import digest

    plan = plan_of({"model.digest": digest(model_folder)})
    write_policy(site, models=[plan.model.digest])
    write_data(site)
    Path("plan.toml").write_text(plan.to_toml())
    usage = shutil.disk_usage("/")._replace(free=2**20)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage)
    done = run("prepare", "plan.toml")
    assert done.code == 2
    assert "embeddings need 1.0 MiB of disk, and 1.0 MiB are free" in done.err
    assert not list(site.cache.glob("*.npy"))


def test_help_names_every_command(run: Run) -> None:
    text = ok(run("--help"))
    for command in [
        "down",
        "prepare",
        "enrol",
        "roster",
        "plan",
        "policy",
        "model",
        "ledger",
        "up",
        "status",
        "pause",
        "resume",
        "check",
    ]:
        assert f"\n  {command} " in text


def test_another_user_of_the_socket_is_refused(run: Run, site: SiteFolder, agent: Agent) -> None:
    (site.control / "agent.token").write_text("0" * 64)
    refused(run("status"), "token of this start is missing or wrong")


@pytest.mark.parametrize("words", [("status",), ("plan", "list"), ("policy", "show"), ("check",), ("model", "list")])
def test_a_folder_of_nothing_is_refused(words: tuple[str, ...], run: Run) -> None:
    refused(run(*words), "accord-site is not the folder of a site")
    assert not FOLDER.exists()


# --- policy


def write_policy(site: SiteFolder, **changes: Any) -> None:
    limits = {"epsilon": 8.0, "epsilon_all_collude": 9.0, "delta": 1e-5}
    table = {
        "tasks": ["classification"],
        "models": [PLAN.model.digest],
        "dataset": "cases",
        "noise": "site",
        "secure_aggregation": "off",
        "minimum": 2,
        "datasets": {"cases": limits},
    }
    site.policy.write_text(tomli_w.dumps(table | changes))


def write_data(site: SiteFolder, rows: int = 20, bad: int = 0) -> None:
    spec = {"kind": "csv", "path": "cases.csv", "text": "text", "label": "label"}
    site.settings.write_text(tomli_w.dumps({"name": SITE, "data": {"cases": spec}}))
    lines = ["text,label", *(f"text {i},top up" for i in range(rows - bad)), *([",top up"] * bad)]
    (site.path / "cases.csv").write_text("\n".join(lines) + "\n")


def test_policy(run: Run, site: SiteFolder) -> None:
    refused_template = run("policy", "check")
    assert refused_template.code == 2
    assert "tasks is empty" in refused_template.err
    write_policy(site)
    write_data(site)
    assert "the policy is sound" in ok(run("policy", "check"))
    shown = facts(run("policy", "show", "--json"))
    assert (shown["noise"], shown["datasets"]["cases"]["epsilon"]) == ("site", 8.0)
    assert "epsilon = 8.0" in ok(run("policy", "show"))
    Path("plan.toml").write_text(PLAN.to_toml())
    assert facts(run("policy", "check", "plan.toml", "--json"))["allowed"] is True
    PlanBook(site.plans).offer(PLAN, "a" * 64, None)
    assert "privacy.epsilon" in ok(run("policy", "check", PLAN.hash))
    done = run("policy", "check", "plan.toml", "--signer", "b" * 64, "--json")
    assert done.code == 2
    assert json.loads(done.out.splitlines()[-1])["allowed"] is False
    assert "signer wants" in done.err
    write_policy(site, most_rounds=3)
    done = run("policy", "check", "plan.toml")
    assert (done.code, done.err) == (2, "accord: run.rounds wants 3 at most, not 4\n")
    assert "refused  run.rounds" in done.out


def test_policy_and_settings_must_agree(run: Run, site: SiteFolder) -> None:
    write_policy(site)
    done = run("policy", "check")
    assert "is not a [data.cases] of site.toml" in done.err
    write_policy(site, nosie="site")
    refused(run("policy", "show"), "unknown key: nosie")


# --- check


def checked(done: Done) -> dict[str, str]:
    found = json.loads(done.out.splitlines()[-1])
    order = {"ok": 0, "warn": 1, "fail": 2}
    worst: dict[str, str] = {}
    for one in found["checks"]:
        assert "\n" not in one["line"]
        worst[one["name"]] = max(worst.get(one["name"], "ok"), one["state"], key=order.__getitem__)
    assert found["ok"] == ("fail" not in worst.values())
    return worst


@pytest.fixture
def whole(
    run: Run, site: SiteFolder, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[SiteFolder]:
    """A site that lacks nothing but a GPU."""
    monkeypatch.setattr(checks, "LITTLE_DISK", 0)
    monkeypatch.setattr(checks, "LEAST_DISK", 0)
    write_policy(site)
    write_data(site)
    coordinator.roster = roster_of(site).to_json()
    ok(run("roster", "accept", roster_of(site).roster.hash))
    (tmp_path / "fleet.pem").write_bytes(coordinator.pair.key + coordinator.pair.chain)
    with listening(tls_server(tmp_path / "fleet.pem")) as port:
        enrolment = json.loads(site.enrolment.read_text()) | {"fleet_address": f"127.0.0.1:{port}"}
        site.enrolment.write_text(json.dumps(enrolment))
        yield site


def test_check(run: Run, whole: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("check", "--json")
    assert done.code == 0, done.out
    found = checked(done)
    warned = {name for name, state in found.items() if state == "warn"}
    assert warned == {"keys", "model"}  # not encrypted; the policy's digest is of no model here
    assert set(found) == {
        "folder", "keys", "certificate", "settings", "policy", "data", "model", "device", "disk", "ledger", "roster",
        "coordinator", "clock", "fleet",
    }  # fmt: skip
    text = ok(run("check"))
    assert "ok    clock" in text
    assert "TLSv1.3" in text


def test_check_names_what_fails(
    run: Run, whole: SiteFolder, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(**given: Any) -> set[str]:
        done = run("check", "--json")
        states = checked(done)
        failed = {name for name, state in states.items() if state == "fail"}
        assert (done.code == 2) == bool(failed)
        assert all(name in done.err for name in failed)
        return failed

    assert failing() == set()
    coordinator.clock = lambda: time.time() - 600
    done = run("check", "--json")
    assert "this site's clock is 600 s ahead of the coordinator's" in done.out
    assert failing() == {"clock"}
    coordinator.clock = time.time
    write_data(whole, 20, bad=2)
    assert failing() == {"data"}
    write_data(whole)
    whole.policy.chmod(0o622)
    assert failing() == {"folder"}
    whole.policy.chmod(0o600)
    whole.policy.write_text("version = 9")
    assert failing() == {"policy", "model"}
    write_policy(whole)
    (whole.keys / "node.pem").chmod(0o644)
    assert failing() == {"keys", "certificate", "roster", "coordinator"}
    (whole.keys / "node.pem").chmod(0o600)
    monkeypatch.setattr(checks, "LEAST_DISK", 2**60)
    assert failing() == {"disk"}
    monkeypatch.setattr(checks, "LEAST_DISK", 0)
    SiteStore(whole.path).release(PLAN.hash, 1, "m", None, None)
    assert failing() == set()
    keys = Keys.load(whole)
    keys.keep_certificate(coordinator.authority.of_key(keys.node.public_key(), SITE, 29))
    assert "the certificate expires on" in ok(run("check"))
    keys.keep_certificate(coordinator.authority.of_key(keys.node.public_key(), SITE, -1))
    assert failing() == {"certificate", "coordinator"}


def test_check_without_a_coordinator(run: Run, whole: SiteFolder, coordinator: Coordinator) -> None:
    coordinator.stop()
    gone = json.loads(whole.enrolment.read_text()) | {"fleet_address": coordinator.fleet_address}
    whole.enrolment.write_text(json.dumps(gone))
    done = run("check", "--json")
    assert {name for name, state in checked(done).items() if state == "fail"} == {"coordinator", "fleet"}
    assert "cannot be reached" in done.out
    offline = checked(run("check", "--offline", "--json"))
    assert "fail" not in offline.values()
    assert "coordinator" not in offline


def test_check_does_not_take_over_from_a_running_agent(
    run: Run, whole: SiteFolder, agent: Agent, coordinator: Coordinator
) -> None:
    before = len(coordinator.asked)
    assert "fail" not in checked(run("check", "--json")).values()
    assert not [asked for asked in coordinator.asked[before:] if isinstance(asked, pb.HelloRequest)]


def test_check_of_a_pending_site_warns(run: Run, whole: SiteFolder, coordinator: Coordinator) -> None:
    coordinator.state = "pending"
    assert "this site is pending" in ok(run("check"))


# --- models


def newest_first(reply: Any) -> Any:
    """r1 is the newest, whatever the order."""
    for model in reply.models:
        model.finished_us = 1000 if model.run == "r1" else 10
    return pb.ModelList(models=sorted(reply.models, key=lambda model: -model.finished_us))


def test_models(run: Run, site: SiteFolder, coordinator: Coordinator, model_folder: Path) -> None:
    from accord_client.models import digest

    plan = plan_of({"model.digest": digest(model_folder), "privacy.delta": 1e-6})
    weights = np.arange(3 * 384, dtype=np.float32)
    assert "no finished model yet" in ok(run("model", "list"))
    coordinator.finish("r1", plan, save({"weights": weights}), {"metrics": {"accuracy": 0.9}})
    (listed,) = facts(run("model", "list", "--json"))["models"]
    assert (listed["run"], listed["fetched"]) == ("r1", False)
    refused(run("model", "get", "r1"), "never joined")
    event = SampledGaussian(5.0, 1.0, 1)
    store = SiteStore(site.path, datasets=[DataSet(name="cases", limits=Limits(epsilon=8.0))])
    store.keep_plan(plan.hash, plan.to_json())
    for number in (1, 2):
        store.release(plan.hash, number, "m", None, event, dataset="cases")
    told = facts(run("model", "get", "r1", "--out", "mine", "--json"))
    spent = epsilon([event] * 2, 1e-6)
    assert told["epsilon"] == told["epsilon_all_collude"] == pytest.approx(spent)
    info = json.loads(Path("mine/accord.json").read_text())
    assert (info["plan_hash"], info["metrics"], info["run"]) == (plan.hash, {"accuracy": 0.9}, "r1")
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(load_file("mine/head.safetensors")["weight"].ravel(), weights)
    refused(run("model", "get", "r1", "--out", "mine"), "mine exists already")
    refused(run("model", "get", "../up"), "not the name of a run")
    assert "(fetched)" in ok(run("model", "list"))
    coordinator.finish("r0", plan, save({"weights": weights}), {"metrics": {}})
    coordinator.bend["ListModels"] = newest_first
    told = facts(run("model", "get", "--last", "--out", "newest", "--json"))
    assert told["run"] == "r1"
    for words in ((), ("r1", "--last")):
        refused(run("model", "get", *words), "name a run, or use --last")
    coordinator.refuse["GetModel"] = Unreachable("gone")
    ok(run("model", "get", "r1"))
    assert Path("model-r1/plan.toml").exists()


# --- speed


@pytest.mark.parametrize("words", ["status", "plan list", "policy show", "ledger verify"])
def test_commands_start_without_torch(words: str, site: SiteFolder, tmp_path: Path) -> None:
    SiteStore(site.path).release(PLAN.hash, 1, "m", None, None)
    code = (
        "import sys, typer; from accord_client.cli_site import site_app\n"
        f"try: site_app({words.split()!r}, standalone_mode=False)\n"
        "finally: heavy = {'torch', 'transformers', 'pyarrow', 'scipy', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCORD")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
