"""A real agent in this process, asked by a coordinator: records are prepared before it joins, refusals come and go."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from accord_client import features, preparation, workspace
from accord_client.agent import Agent
from accord_client.app import answered
from accord_client.enrolment import enrol
from accord_client.keystore import Keys
from accord_client.ledger.ledger import Ledger
from accord_client.models import digest
from accord_client.settings import SiteFolder
from accord_client.store import SiteStore
from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.accounting import noise_multiplier, round_event
from accord_shared.errors import AccordError, DataError
from accord_shared.messages import Enquiry, Joined, Message, Refusal, TrainReply, TrainRequest
from accord_shared.plan import Plan
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.signatures import PlanSignature
from accord_shared.wire import decode, encode
from conftest import plan_of
from coordinator_lab import COORDINATOR, SITE, Coordinator


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> SiteFolder:
    """Enrolled, with ten records and a policy that allows the plan."""
    lab = Coordinator().start()
    enrol(lab.token(), tmp_path / "s")
    lab.stop()
    made = SiteFolder(tmp_path / "s")
    spec = {"kind": "csv", "path": "cases.csv", "text": "text", "label": "label"}
    made.settings.write_text(tomli_w.dumps({"name": SITE, "data": {"cases": spec}, "device": {"device": "cpu"}}))
    write_records(made)
    write_policy(made, models=[digest(model_folder)])
    return made


def write_records(folder: SiteFolder, good: int = 10, bad: int = 0) -> None:
    rows = [*(f"text {i},top up" for i in range(good)), *(f"bad {i},no such label" for i in range(bad))]
    (folder.path / "cases.csv").write_text("text,label\n" + "\n".join(rows) + "\n")


def write_policy(folder: SiteFolder, **changes: Any) -> None:
    limits = {"epsilon": 8.0, "epsilon_all_collude": 9.0, "delta": 1e-5}
    table = {
        "approval": "policy",
        "tasks": ["classification"],
        "dataset": "cases",
        "noise": "site",
        "secure_aggregation": "off",
        "minimum": 2,
        "datasets": {"cases": limits},
    }
    folder.policy.write_text(tomli_w.dumps(table | changes))


@pytest.fixture
def plan(model_folder: Path) -> Plan:
    return plan_of({"model.digest": digest(model_folder)})


@pytest.fixture
def agent(folder: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    monkeypatch.setattr(preparation, "RETRY_S", 0.05)
    made = Agent(folder.path)
    made._workplace.check()
    yield made
    made.stopping.set()


def enquiry(plan: Plan, run: str = "run") -> Enquiry:
    signature = PlanSignature.of(plan.hash, COORDINATOR).to_json()
    return Enquiry(PROTOCOL_VERSION, run, plan.to_json(), plan.hash, "", plan_signature=signature)


def asked(agent: Agent, message: Message) -> Message:
    """What a message gets, as it goes over the wire."""
    return decode(answered(agent._handle, encode(message)))


def joined(agent: Agent, plan: Plan, within_s: float = 60.0) -> Joined:
    deadline = time.monotonic() + within_s
    while True:
        reply = asked(agent, enquiry(plan))
        if isinstance(reply, Joined):
            return reply
        assert isinstance(reply, Refusal)
        assert reply.kind in ("SitePreparing", "Withheld"), reply
        assert time.monotonic() < deadline, reply
        time.sleep(0.05)


def settled(agent: Agent, plan: Plan) -> Message:
    """The answer once nothing is prepared any more."""
    while isinstance(reply := asked(agent, enquiry(plan)), Refusal) and reply.kind == "SitePreparing":
        time.sleep(0.05)
    return reply


def first_round(agent: Agent, plan: Plan) -> Message:
    weights = np.zeros(3 * 384, dtype=np.float32)
    return asked(agent, TrainRequest(PROTOCOL_VERSION, "run", plan.hash, 1, 1, weights))


class Slow:
    """Embedding that waits for a word, batch by batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.go = threading.Event()
        real: Callable[..., Any] = features.pooled

        def pooled(encoder: Any, texts: Any, runtime: Any, on_progress: Any = lambda _: None) -> Any:
            self.calls += 1
            if len(texts) == 10:
                on_progress(4)
                assert self.go.wait(60)
            return real(encoder, texts, runtime)

        monkeypatch.setattr(workspace, "pooled", pooled)


def test_no_trip_contains_the_embedding(agent: Agent, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    monkeypatch.setattr(preparation, "PATIENCE_S", 0.1)
    reply = asked(agent, enquiry(plan))
    assert reply == Refusal("SitePreparing", "this site still prepares its records for the plan")  # and no number
    while not (shown := agent.status().preparations) or not shown[0].done:
        time.sleep(0.02)
    assert (shown[0].state, shown[0].done, shown[0].total) == ("embedding", 4, 10)
    assert shown[0].left_s >= 0
    agent.standing.greeted = agent.standing.approved = True
    assert agent.status().state == "preparing"
    assert agent._says() == "preparing"
    assert not agent.status().refusals  # it is none
    slow.go.set()
    joined(agent, plan)
    assert agent.status().preparations[0].state == "ready"
    before = slow.calls
    assert isinstance(first_round(agent, plan), TrainReply)
    assert slow.calls == before  # all was there
    assert agent._says() == "ready"


def test_a_question_that_is_refused_is_no_reason_to_look_often(agent: Agent, folder: SiteFolder, plan: Plan) -> None:
    write_policy(folder, approval="operator", models=[plan.model.digest])
    before = agent.standing.heard
    assert isinstance(asked(agent, enquiry(plan)), Refusal)
    assert agent.standing.heard == before
    write_policy(folder, models=[plan.model.digest])
    joined(agent, plan)
    assert agent.standing.heard > before


def test_approval_begins_the_preparation(
    agent: Agent, folder: SiteFolder, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_policy(folder, approval="operator", models=[plan.model.digest])
    reply = asked(agent, enquiry(plan))
    assert isinstance(reply, Refusal)
    assert reply.kind == "PlanNotApproved"
    assert agent._says() == "waiting"
    assert not agent.status().preparations
    info = agent.approve(plan.hash)
    assert info.state == "approved"
    assert json.loads(info.cost)["epsilon"] == {
        "spent": 0.0,
        "after": pytest.approx(8.0, rel=0.01),
        "most": 8.0,
        "fits": True,
    }
    assert agent.plan(plan.hash[:8]) == info
    (shown,) = agent.status().preparations
    assert shown.plan_hash == plan.hash
    assert not agent.status().refusals  # the word was given: nothing stale is shown
    joined(agent, plan)


def test_a_refusal_is_told_in_full_at_the_site_alone_and_goes_with_its_cause(
    agent: Agent, folder: SiteFolder, plan: Plan
) -> None:
    write_records(folder, 10, bad=7)
    reply = settled(agent, plan)
    assert isinstance(reply, Refusal)
    assert "7" not in reply.reason
    (refusal,) = agent.status().refusals
    assert refusal.plan_hash == plan.hash
    assert "7 of 17 rows fail" in refusal.reason
    assert "quarantine" in refusal.reason
    assert agent._says() == "refusing"
    write_records(folder, 10)
    assert not agent.status().refusals
    joined(agent, plan)  # without a restart
    assert agent._says() == "ready"


def test_after_ledger_recover_it_takes_part_again(agent: Agent, folder: SiteFolder, plan: Plan) -> None:
    joined(agent, plan)
    assert isinstance(first_round(agent, plan), TrainReply)
    ledger, identity = Ledger(folder.path), Keys.load(folder).identity
    receipt = ledger.receipt(SITE, identity)
    entries = ledger.head().seq
    # An older state of this very ledger under the running agent: everything but its first entries is gone.
    _set_back(folder.path / "ledger.db", entries - 1)
    reply = asked(agent, enquiry(plan, "other"))
    assert isinstance(reply, Refusal)
    assert reply.kind == "LedgerRolledBack"
    (refusal,) = agent._refusals.standing()
    assert "recover" in refusal.reason
    assert Ledger(folder.path).recover(receipt, identity)
    assert agent._refusals.standing() == []
    assert isinstance(asked(agent, enquiry(plan, "other")), Joined)
    assert agent.status().runs[0].releases == 1  # and what was spent stays spent


def _set_back(path: Path, entries: int) -> None:
    """Keep the first entries alone, as an old copy has them."""
    import sqlite3

    copy = path.with_name("copy.db")
    with sqlite3.connect(path) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    target = sqlite3.connect(copy, isolation_level=None)
    triggers = [row[0] for row in target.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger'")]
    names = [row[0] for row in target.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]
    for name in names:
        target.execute(f"DROP TRIGGER {name}")
    target.execute("DELETE FROM entries WHERE seq > ?", (entries,))
    for trigger in triggers:
        target.execute(trigger)
    target.execute("PRAGMA journal_mode = WAL")
    target.close()
    copy.chmod(0o600)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    copy.replace(path)


def test_what_fails_is_tried_again_later_and_not_at_every_question(
    agent: Agent, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def make(_: Plan, progress: preparation.Progress) -> None:
        tries.append(time.monotonic())
        raise DataError("no such file")

    monkeypatch.setattr(preparation, "RETRY_S", 0.2)
    preparer = preparation.Preparer(make, lambda _: False)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        with pytest.raises(AccordError):
            preparer.require(plan)
        time.sleep(0.01)
    assert 2 <= len(tries) <= 4  # after 0.2, 0.4, 0.8 s
    assert [one.info().problem for one in preparer.progress()] == ["DataError: no such file"]


def test_a_short_disk_is_said_before_anything_is_computed(
    agent: Agent, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage)
    slow = Slow(monkeypatch)
    reply = settled(agent, plan)
    assert isinstance(reply, Refusal)
    assert reply.kind == "Withheld"  # how much a disk lacks depends on the records
    assert slow.calls == 0
    (refusal,) = agent.status().refusals
    assert "embeddings need" in refusal.reason
    assert "are free" in refusal.reason


def test_a_budget_that_does_not_suffice_is_said_before_anything_is_embedded(
    agent: Agent, folder: SiteFolder, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = plan.revised({"run.name": "earlier"})
    datasets = _policy(folder).datasets()
    SiteStore(folder.path, datasets=datasets).release(
        earlier.hash, 1, "m", None, round_event(earlier, noise_multiplier(earlier)), dataset="cases"
    )
    slow = Slow(monkeypatch)
    slow.go.set()
    reply = settled(agent, plan)
    assert isinstance(reply, Refusal)
    assert reply.kind == "LimitReached"
    assert slow.calls <= 1  # the names of the labels
    assert "would exceed the limit of 8" in agent.status().refusals[0].reason


def test_models_are_loaded_one_at_a_time(model_folder: Path) -> None:
    """In a fresh process: libraries that import their parts when they are needed fail where two threads need them."""
    code = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from accord_client.models import Encoder\n"
        "assert 'transformers' not in sys.modules or 'transformers.models.bert' not in sys.modules\n"
        "failed = []\n"
        "def load():\n"
        "    try: Encoder(Path(sys.argv[1]), 16)\n"
        "    except BaseException as error: failed.append(repr(error))\n"
        "threads = [threading.Thread(target=load) for _ in range(4)]\n"
        "[one.start() for one in threads]; [one.join() for one in threads]\n"
        "assert not failed, failed\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model_folder)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_fault_of_the_program_is_told_too(agent: Agent, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Message) -> Message:
        raise ValueError("a record's text")

    joined(agent, plan)
    monkeypatch.setattr(agent._workplace.site, "answer", broken)
    reply = first_round(agent, plan)
    assert isinstance(reply, Refusal)
    assert reply.kind == "Withheld"
    (refusal,) = agent.status().refusals
    assert "ValueError, an internal error" in refusal.reason
    assert "record" not in refusal.reason


def test_progress_counts_every_record_once(plan: Plan, folder: SiteFolder, cache: Path) -> None:
    """Also where each text is read in several prompts, and some records are held back."""
    from accord_client.settings import SiteSettings
    from accord_client.trainer import Runtime

    asked_plan = plan.revised({"task.prompts": ["a {}", "b {}", "{} c"], "evaluation.released_fraction": 0.3})
    settings = SiteSettings.read(folder)
    progress = preparation.Progress(asked_plan.hash)
    space = preparation.open_workspace(asked_plan, folder, Runtime())
    examples = preparation.read_records(asked_plan, folder, settings, _policy(folder))
    progress.expect(len(examples))
    space.prepare(examples, progress.add)
    assert (progress.done, progress.total) == (10, 10)
    assert progress.info() == pb.PlanPreparation(
        plan_hash=asked_plan.hash, state="embedding", done=10, total=10, left_s=0.0
    )
    again = preparation.Progress(asked_plan.hash)
    again.expect(10)
    preparation.open_workspace(asked_plan, folder, Runtime()).prepare(examples, again.add)
    assert again.done == 0  # all of it is in the cache


def _policy(folder: SiteFolder) -> Any:
    from accord_client.policy import Policy

    return Policy.read(folder.policy)
