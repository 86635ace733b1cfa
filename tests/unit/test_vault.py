"""Where simulated participants keep their secrets: the deployed members, in processes of their own."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest

from accord_shared.errors import PlanError, ProtocolError, RosterError, SessionLost
from accord_shared.messages import MaskRequest, Refusal
from accord_shared.roster import SignedRoster
from accord_shared.secagg.keys import RunTerms
from accord_simulations.vault import SimulatedRoster, Vault, VaultAddress, VaultMembers, make_address, vaults
from conformance.federation import RUN, names_of, secure_plan

PLAN = secure_plan(5, {"cohort.colluders": 1, "cohort.minimum": 5})
COORDINATOR = b"\x09" + bytes(31)
NAMES = tuple(reversed(names_of(5)))  # the participants' order is not the roster's


@pytest.fixture(scope="module")
def roster() -> SimulatedRoster:
    return SimulatedRoster.make(PLAN, NAMES)


def terms(roster: SimulatedRoster) -> RunTerms:
    return RunTerms.of(PLAN, RUN, roster.signed.roster.hash, len(NAMES), 4, 0.0)


def vault(roster: SimulatedRoster) -> Vault:
    seeds = enumerate(zip(NAMES, roster.seeds, strict=True))
    return Vault(file_of(roster.signed), {index: (name, *pair) for index, (name, pair) in seeds})


def file_of(signed: SignedRoster) -> Path:
    path = Path(tempfile.mkdtemp()) / "roster.json"
    path.write_text(signed.to_json())
    return path


def test_the_roster_is_as_strict_as_the_plan_and_signed(roster: SimulatedRoster) -> None:
    verified = roster.signed.verify()
    assert (verified.minimum, verified.colluders) == (5, 1)
    assert [member.name for member in verified.members] == sorted(NAMES)
    assert len({seed for pair in roster.seeds for seed in pair}) == 2 * len(NAMES)


def test_seeds_are_not_printed(roster: SimulatedRoster) -> None:
    for seed in (seed for pair in roster.seeds for seed in pair):
        assert repr(seed) not in repr(roster)
        assert seed.hex() not in repr(roster)


def test_each_participant_has_the_identity_of_its_name(roster: SimulatedRoster) -> None:
    from accord_shared.secagg.keys import Credential

    held = vault(roster)
    for index, name in enumerate(NAMES):
        credential, _, _ = held.call(index, "join", terms(roster))
        Credential.read(credential, terms(roster), roster.signed.roster, name)
        for other in NAMES[:index]:
            with pytest.raises(ProtocolError):
                Credential.read(credential, terms(roster), roster.signed.roster, other)


def test_a_refusal_crosses_as_it_is(roster: SimulatedRoster) -> None:
    refusal = vault(roster).call(0, "mask", RUN, np.zeros(4, dtype=np.uint32))
    assert isinstance(refusal, Refusal)
    assert type(pickle.loads(pickle.dumps(refusal)).error()) is SessionLost  # noqa: S301


def test_a_forged_roster_is_not_taken(roster: SimulatedRoster) -> None:
    other = SimulatedRoster.make(PLAN, NAMES)
    forged = roster.signed.model_copy(update={"signature": other.signed.signature})
    with pytest.raises(RosterError, match="signature of the roster does not verify"):
        Vault(file_of(forged), {})


def test_what_travels_to_a_vault_can_travel(roster: SimulatedRoster) -> None:
    bundles = tuple(bytes([index]) * 116 for index in range(5))
    weights = np.zeros(4, dtype=np.float32)
    request = MaskRequest(1, RUN, "p", "r", 1, 1, tuple(sorted(NAMES)), bundles, COORDINATOR, (), (), (), weights)
    for thing in (terms(roster), make_address(Path("folder"))):
        assert pickle.loads(pickle.dumps(thing)) == thing  # noqa: S301
    assert pickle.loads(pickle.dumps(request)).cohort == request.cohort  # noqa: S301


def test_a_vault_masks_a_copy(roster: SimulatedRoster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out of Ray's object store is read-only, and members mask in place."""
    from accord_client.members import LocalMembers

    seen: list[bool] = []

    def masks(members: LocalMembers, run_id: str, words: np.ndarray) -> None:  # type: ignore[type-arg]
        seen.append(words.flags.writeable)
        words += 1

    monkeypatch.setattr(LocalMembers, "mask", masks)
    words = np.zeros(4, dtype=np.uint32)
    words.setflags(write=False)
    vault(roster).call(1, "mask", RUN, words)
    assert seen == [True]
    assert not words.any()


def test_addresses_do_not_meet(tmp_path: Path) -> None:
    one, two = make_address(tmp_path), make_address(tmp_path)
    assert one.prefix != two.prefix
    assert one.shards >= 1
    assert one.roster_file == tmp_path / "roster.json"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_vault_that_dies_loses_its_sessions_and_no_more(roster: SimulatedRoster, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        address = VaultAddress(tmp_path / "vault", make_address(tmp_path).prefix, 2)
        with vaults(address, roster, NAMES):
            members = [VaultMembers(address, index) for index in range(5)]
            assert members[0].roster == roster.signed.roster
            joined = [each.join(terms(roster)) for each in members]
            assert [each.join(terms(roster)) for each in members] == joined  # the session stays
            with pytest.raises(ProtocolError, match="R1"):
                members[1].join(RunTerms(**{**vars(terms(roster)), "roster_hash": "0" * 64, "run_id": "other"}))
            ray.kill(ray.get_actor(f"{address.prefix}-1", namespace=address.prefix), no_restart=False)
            again = [each.join(terms(roster)) for each in members]
            assert [new == old for new, old in zip(again, joined, strict=True)] == [True, False, True, False, True]
    finally:
        ray.shutdown()


def test_a_plan_without_secure_aggregation_has_no_terms(roster: SimulatedRoster) -> None:
    off = PLAN.revised({"secure_aggregation.mode": "off"})
    with pytest.raises(PlanError):
        RunTerms.of(off, RUN, roster.signed.roster.hash, len(NAMES), 4, 0.0)
