"""Every attack of a hostile coordinator on the real `Member`: refused by its rule, and the oracle loses.

Each attack goes on after a refusal with all it has. Where `removed` names checks, the same attack without them lets
the oracle win: that shows that the oracle is no straw man and that these very checks stop the attack. Where nothing is
named in `removed`, the attack's docstring says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from accord_shared.errors import AccordError, PlanError, ProtocolError
from accord_shared.receipts import Head
from accord_shared.secagg import keys, member, thresholds
from accord_shared.secagg.keys import Attempt, Bundle
from accord_shared.secagg.member import Member
from adversarial.hostile import NAMES, Removal, Run, Setting, World, identity_of, impostor

ALL, WITHOUT_D = tuple(range(7)), (0, 1, 2, 4, 5, 6)
SEVEN = Setting()
STRICT = Setting(minimum=7)
"""All seven must be in any sum; five signatures certify it."""
QUORUMS = Setting(names=tuple("abcdefghij"), corrupt=("c", "d", "e"), minimum=9, colluders=3)
"""Ten sites of which three are corrupt: 7 sign, 6 shares open, so two halves could open two sets."""

# Checks

SIGNED_SET = Removal(
    Member,
    "check_opening",
    "if current.survivors is None or request.survivors != current.survivors:",
    "if False:",
)
SIGN_ONCE = Removal(Member, "sign", "if current.survivors is not None:", "if False:")
FORGET = Removal(Member, "open", "self._current = None", "pass")
SIGN_COUNT = Removal(Member, "_check_certificate", "if len(signers) < current.thresholds.sign:", "if False:")
SIGNERS = Removal(Member, "_check_certificate", "or list(signers) != sorted(set(signers))", "")
SIGNATURES = Removal(
    Member,
    "_check_certificate",
    "verify(self._roster.member(current.attempt.cohort[index]), signed, signature)",
    "pass",
)
SURVIVOR_CONTEXT = Removal(Attempt, "survivors_bytes", "self.context", "b''")
DISTINCT = Removal(Member, "_check_survivors", "list(survivors) != sorted(set(survivors)) or", "")
ENOUGH = Removal(Member, "_check_survivors", "if len(survivors) < least:", "if False:")
OWN_INDEX = Removal(Member, "_check_survivors", "if current.own not in survivors:", "if False:")
PAST = Removal(Member, "_check_run_names", "if (request.round, request.attempt) <= self._last:", "if False:")
OPENED = Removal(Member, "_check_run_names", "if request.round <= self._opened_round:", "if False:")
PAIR_OF_TWO = Removal(keys, "thresholds", "if small and not own_noise:", "if False:")
COHORT_SIZE = Removal(Member, "_check_cohort", "if count > self._terms.size:", "if False:")
BUNDLE_SIGNED = Removal(
    Bundle, "read", "verify(member, bundle.signed_bytes(terms, member.name), data[-ED25519_SIGNATURE:])", "pass"
)
CREDENTIAL_SIGNED = Removal(
    keys.Credential,
    "read",
    "verify_both(roster.members[place], credential.signed_bytes(terms, name), data[-BOTH_SIGNATURES:])",
    "pass",
)
INTRODUCTION_SIGNED = Removal(
    keys,
    "verify_introduction",
    "verify_both(member, _introduction_bytes(terms, sender, receiver, ciphertext), data[CIPHERTEXT_BYTES:])",
    "pass",
)
PAIR_CONTEXT = Removal(member, "pair_keys", "attempt.context", "b''")
SHARES_CONTEXT = Removal(Attempt, "shares_data", "self.context", "b''")
SELF_MASK = Removal(Member, "mask", "plus = [self_mask, *(", "plus = [*(")
ONE_KIND = Removal(
    member,
    "opened_part",
    "open_ = [0, *(position for position, index in enumerate(partners.tolist(), start=1) if index not in alive)]",
    "open_ = list(range(1 + len(partners)))",
)
ANY_COHORT = Removal(thresholds, "require_cohort", "if n < 2 or not 1 <= minimum <= n:", "if False:")
TWO_LEFT = Removal(thresholds, "_require_two", "if survivors < known + 2:", "if False:")
ANY_SHARE = Removal(keys, "thresholds", "if share > minimum:", "if False:")

Play = Callable[[Run], None]


@dataclass(frozen=True)
class Attack:
    play: Play
    kind: type[AccordError] | None = ProtocolError
    says: str = ""
    """What the typed refusal says; without a kind nothing is refused, and nothing is learned."""
    removed: tuple[Removal, ...] = ()
    setting: Setting = SEVEN

    @property
    def name(self) -> str:
        return self.play.__name__


def halves(run: Run, attempt: int = 1) -> None:
    """Three honest sites sign and open the sum of all; three others are told that d died."""
    for name in "abd":
        run.sign(name, ALL, attempt)
    for name in "efg":
        run.sign(name, WITHOUT_D, attempt)
    for survivors in (ALL, WITHOUT_D):
        run.sign("c", survivors, attempt)
    for name in "abd":
        run.open(name, ALL, attempt)
    for name in "efg":
        run.open(name, WITHOUT_D, attempt)


def alive_and_dead(run: Run) -> None:
    """d is alive to one half of the sites and dead to the other: both kinds of its secrets would be opened."""
    run.uploads()
    halves(run)


def padded_with_repeats(run: Run) -> None:
    """As above; each certificate repeats the corrupt signature until there are enough."""
    run.uploads()
    for group, survivors in (("abd", ALL), ("efg", WITHOUT_D)):
        for name in (*group, "c"):
            run.sign(name, survivors)
        for name in group:
            request = run.open_request(name, survivors)
            signers, signatures = (
                (*request.signers, 2),
                (*request.signatures, request.signatures[request.signers.index(2)]),
            )
            note_opening(run, name, replace(request, signers=signers, signatures=signatures))


def note_opening(run: Run, name: str, request: object) -> None:
    """Send a request that the harness does not make by itself, and keep the answer."""
    original = run.open_request
    run.open_request = lambda *_, **__: request  # type: ignore[assignment,method-assign]
    run.open(name, request.survivors, request.attempt)  # type: ignore[attr-defined]
    run.open_request = original  # type: ignore[method-assign]


def forged_certificate(run: Run) -> None:
    """As above; missing signatures are made by the corrupt site in the others' names."""
    run.uploads()
    view = run.attempts["a", 1, 1]
    for group, survivors in (("abd", ALL), ("efg", WITHOUT_D)):
        for name in group:
            run.sign(name, survivors)
        forged = identity_of("c").sign(view.survivors_bytes(survivors))
        for index in ALL:
            run.signatures[view.context, survivors].setdefault(index, forged)
        for name in group:
            run.open(name, survivors)


def certificates_of_other_attempts(run: Run) -> None:
    """Attempts 1 and 2 are certified and never opened; in attempt 3 their certificates serve two sets at once."""
    for attempt, survivors in ((1, ALL), (2, WITHOUT_D), (3, ())):
        run.uploads(attempt)
        for name in NAMES if survivors else "":
            run.sign(name, survivors, attempt)
    old = {survivors: certificate for (_, survivors), certificate in run.signatures.items()}
    context = run.attempts["a", 1, 3].context
    for group, survivors in (("abd", ALL), ("efg", WITHOUT_D)):
        for name in group:
            run.sign(name, survivors, 3)
        run.signatures[context, survivors] = dict(old[survivors])
        for name in group:
            run.open(name, survivors, 3)


def one_set_signed_another_opened(run: Run) -> None:
    """Everybody signs the whole set; half of them are then shown a forged certificate of another."""
    run.uploads()
    for name in NAMES:
        run.sign(name, ALL)
    view = run.attempts["a", 1, 1]
    forged = identity_of("c").sign(view.survivors_bytes(WITHOUT_D))
    run.signatures[view.context, WITHOUT_D] = dict.fromkeys(WITHOUT_D, forged)
    for name in "abd":
        run.open(name, ALL)
    for name in "efg":
        run.open(name, WITHOUT_D)


def two_sets_signed(run: Run) -> None:
    """Everybody is asked to sign both sets; each half opens its own."""
    run.uploads()
    for survivors in (ALL, WITHOUT_D):
        for name in NAMES:
            if name != "d" or survivors == ALL:
                run.sign(name, survivors)
    for name in "abd":
        run.sign(name, ALL)
        run.open(name, ALL)
    for name in "efg":
        run.open(name, WITHOUT_D)


def both_shares_over_two_requests(run: Run) -> None:
    """After the sum of all was opened, the same attempt is signed and opened once more with d dead."""
    run.uploads()
    run.finish(ALL)
    run.finish(WITHOUT_D)


def repeated_survivors(run: Run) -> None:
    """Five sites counted as seven."""
    run.uploads()
    run.finish((0, 1, 2, 4, 5, 5, 5))


def too_few_survivors(run: Run) -> None:
    """Five sites where all seven are due."""
    run.uploads()
    run.finish((0, 1, 2, 4, 5))


def told_that_it_is_dead(run: Run) -> None:
    """d is asked to sign and open a set without itself. Nothing follows from an answer: one set is one set."""
    run.uploads()
    run.finish(WITHOUT_D, who=[*"abcefgd"])


def survivors_outside_the_cohort(run: Run) -> None:
    """An index that is nobody's; the sum of the others would open anyway, so nothing is gained."""
    run.uploads()
    run.finish((*ALL, 7))


def honest_round(run: Run) -> None:
    """The protocol as it should be, with d dead; a holder that opened both kinds of secrets would tell all."""
    run.uploads(who="abcefg")
    run.finish(WITHOUT_D)


def late_upload_of_the_dead(run: Run) -> None:
    """d is declared dead, all its mask seeds are opened, and then its upload comes: its own mask is left."""
    run.uploads(who="abcefg", keep_bundles=True)
    run.finish(WITHOUT_D)
    run.upload("d")


def replayed_attempt(run: Run) -> None:
    """The very same request thrice: one context, one set signed in each pass, the last pass opens two."""
    first = dict(run.bundles)
    for number, survivors in enumerate((ALL, WITHOUT_D, ())):
        for name in NAMES:
            run.upload(name, bundles=first)
            if number == 0:
                run.waiting[name] = {}
        for name in NAMES if survivors else "":
            run.sign(name, survivors)
    halves(run)


def rerun_without_one(run: Run) -> None:
    """After the sum of all, a further attempt of the round without d: the difference is d's update."""
    run.uploads()
    run.finish(ALL)
    cohort = tuple("abcefg")
    run.uploads(2, cohort=cohort)
    run.finish(tuple(range(6)), 2)


def seeds_of_an_earlier_attempt(run: Run) -> None:
    """d was dead in round 1 and its mask seeds are known; round 2 uses the same X25519 keys. Nothing is refused."""
    run.uploads(who="abcefg", keep_bundles=True)
    run.finish(WITHOUT_D)
    run.uploads(1, round_number=2, keep_bundles=True, seed=0)
    run.finish(ALL, round_number=2)


def ciphertexts_moved(run: Run) -> None:
    """Blobs reordered, of the round before, of another holder, or withheld, until shares of d's pairs would open."""
    run.uploads()
    run.finish(ALL)
    run.uploads(round_number=2)
    old, new = run.attempts["a", 1, 1].context, run.attempts["a", 2, 1].context
    for name in NAMES:
        run.sign(name, ALL, round_number=2)
    for name in "abdefg":
        own = NAMES.index(name)
        request = run.open_request(name, ALL, round_number=2)
        moved = list(request.sealed)
        moved[(own + 1) % 7], moved[(own + 2) % 7] = moved[(own + 2) % 7], moved[(own + 1) % 7]
        moved[(own + 3) % 7] = run.sealed[old, NAMES[(own + 3) % 7]][own]
        moved[(own + 4) % 7] = run.sealed[new, NAMES[(own + 4) % 7]][(own + 5) % 7]
        moved[(own + 5) % 7] = b""
        note_opening(run, name, replace(request, sealed=tuple(moved)))


def different_models(run: Run) -> None:
    """Two groups get two models: two contexts, so nothing cancels. Without the model's hash in the context the sum of
    all would open as always, and tell no less and no more: that the hash is there is seen in
    `test_the_context_binds_everything`."""
    for name in NAMES:
        run.upload(name, seed="abd".count(name))
    for name in NAMES:
        run.sign(name, ALL)
    view = run.attempts["e", 1, 1]
    run.attempts["c", 1, 1] = view
    for name in NAMES:
        run.open(name, ALL)


def foreign_keys(run: Run) -> None:
    """To d all other honest sites are the coordinator, under the corrupt site's signatures."""
    run.send_mask("d", impostor(run, "d", "c"))


def unsigned_keys(run: Run) -> None:
    """The same with signatures of zeros."""
    run.send_mask("d", impostor(run, "d", None))


def foreign_bundles(run: Run) -> None:
    """Only the X25519 keys are the coordinator's. Even unchecked it learns nothing: the ML-KEM secret is missing."""
    waiting = dict(run.waiting["d"])
    request = impostor(run, "d", "c")
    run.waiting["d"] = waiting
    sessions = {name: run.bundles[name][:16] for name in NAMES}
    bundles = tuple(
        Bundle(sessions[name], 0, Bundle.parse(data).public).issue(run.terms, name, identity_of("c"))
        if name not in "cd"
        else data
        for name, data in zip(request.cohort, request.bundles, strict=True)
    )
    run.send_mask("d", run.mask_request("d", bundles=dict(zip(request.cohort, bundles, strict=True))))


def own_key_altered(run: Run) -> None:
    """d's own bundle is another's. Unchecked it would find no private key, or use one that nobody else derives with."""
    run.upload("d", bundles={"d": run.bundles["a"]})
    run.upload("d", 2, bundles={"d": run.bundles["d"][:-1] + b"\0"})
    run.upload("d", 3, bundles={"d": b""})


def own_key_forgotten(run: Run) -> None:
    """d's bundle of two uploads ago: its private key is gone."""
    old = run.bundles["d"]
    run.uploads()
    run.uploads(2)
    run.upload("d", 3, bundles={"d": old})


def own_key_long_replaced(run: Run) -> None:
    """d's ledger went on three times since its first bundle, which the coordinator uses: an old head, an old key."""
    member = run.world.stations["d"].members[run.terms.run_id]
    for number in (1, 2, 3):
        member.tell_ledger(Head(number, bytes(32)))
    run.upload("d")


def another_session(run: Run) -> None:
    """a restarted; d was introduced to its first session. Unchecked, a mask that a cannot take away."""
    run.uploads()
    run.enter("a")
    run.upload("d", 2)


def never_introduced(run: Run) -> None:
    """Introductions are withheld. Unchecked, d would be masked with fewer: see `alone_among_the_corrupt`."""
    run.waiting["d"] = {}
    run.upload("d")


def alone_in_the_cohort(run: Run) -> None:
    """A cohort of one: its sum is its update."""
    run.uploads(cohort=("d",))
    run.finish((0,))


def alone_among_the_corrupt(run: Run) -> None:
    """A cohort of d and the corrupt site."""
    run.uploads(cohort=("c", "d"))
    run.finish((0, 1))


def below_the_minimum(run: Run) -> None:
    """Three sites where five are due."""
    run.uploads(cohort=("b", "c", "d"))
    run.finish((0, 1, 2))


def above_the_size(run: Run) -> None:
    """Seven sites where the plan says six: sums could wrap. Secrecy does not hang on it."""
    run.uploads()


def sybil_in_the_cohort(run: Run) -> None:
    """A name that is on nobody's roster. No key of it would verify either."""
    run.upload("d", cohort=(*NAMES, "mallory"), bundles={"mallory": run.bundles["c"]})


def cohort_with_repeats(run: Run) -> None:
    """The corrupt site fills the cohort. Its one bundle and session would give it several indices."""
    run.upload("d", cohort=("c", "c", "c", "c", "d"))


def cohort_out_of_order(run: Run) -> None:
    """Indices would differ between sites; contexts too, so nothing is learned."""
    run.upload("d", cohort=tuple(reversed(NAMES)))


def cohort_without_it(run: Run) -> None:
    """d is asked to upload for a cohort that it is not in."""
    run.upload("d", cohort=tuple("abcefg"))


def lowered_terms(run: Run) -> None:
    """The names of a plan or roster with weaker numbers. The site computes with its own anyway: see R1's wording."""
    run.send_mask("d", run.mask_request("d", plan_hash="6" * 64))


def another_roster(run: Run) -> None:
    """Another roster's hash; the site looks names up in its own."""
    run.send_mask("d", run.mask_request("d", roster_hash="7" * 64))


def another_protocol(run: Run) -> None:
    """A version that this site does not speak, so no check would be known to mean anything."""
    run.send_mask("d", run.mask_request("d", protocol=2))


def missing_bundles(run: Run) -> None:
    """Fewer bundles than names."""
    request = run.mask_request("d")
    run.send_mask("d", replace(request, bundles=request.bundles[:-1]))


def low_order_points(run: Run) -> None:
    """The corrupt site's key is a point of order 2: what d derives with it would be known, which it is anyway."""
    run.uploads()
    session = run.bundles["c"][:16]
    run.bundles["c"] = Bundle(session, 1, bytes(32)).issue(run.terms, "c", identity_of("c"))
    run.upload("d", 2)


def out_of_order(run: Run) -> None:
    """Trips 2 and 3 before trip 1, of another attempt, of another run; trip 1 answered twice."""
    run.uploads()
    run.attempts["d", 1, 2] = run.attempts["d", 1, 1]
    run.sign("d", ALL, 2)
    run.open("d", ALL, 2)


def wrong_number_of_ciphertexts(run: Run) -> None:
    """Fewer blobs than survivors."""
    run.uploads()
    for name in NAMES:
        run.sign(name, ALL)
    note_opening(run, "d", run.open_request("d", ALL, sealed=()))


def signer_outside_the_cohort(run: Run) -> None:
    """A signature of nobody. Unchecked, an `IndexError` in place of a typed refusal."""
    run.uploads()
    for name in NAMES:
        run.sign(name, ALL)
    request = run.open_request("d", ALL)
    note_opening(
        run, "d", replace(request, signers=(*request.signers, 99), signatures=(*request.signatures, bytes(64)))
    )


FOREIGN = (BUNDLE_SIGNED, CREDENTIAL_SIGNED, INTRODUCTION_SIGNED)
VERIFY = "does not verify"
ATTACKS = [
    Attack(alive_and_dead, says="R8: 4 signatures", removed=(SIGN_COUNT,)),
    Attack(padded_with_repeats, says="R8: signers", removed=(SIGNERS,)),
    Attack(forged_certificate, says=VERIFY, removed=(SIGNATURES,)),
    Attack(certificates_of_other_attempts, says=VERIFY, removed=(SURVIVOR_CONTEXT,)),
    Attack(one_set_signed_another_opened, says="R8: this is not", removed=(SIGNED_SET, SIGNATURES)),
    Attack(two_sets_signed, says="R9: a survivor set was signed", removed=(SIGN_ONCE,)),
    Attack(both_shares_over_two_requests, says="R9: a message out of order", removed=(FORGET, SIGN_ONCE)),
    Attack(repeated_survivors, says="R7: survivors are not ascending", removed=(DISTINCT,), setting=STRICT),
    Attack(too_few_survivors, says="R7: 5 survivors", removed=(ENOUGH,), setting=STRICT),
    Attack(told_that_it_is_dead, says="R7: this site is said"),
    Attack(survivors_outside_the_cohort, says="R7: survivors are not"),
    Attack(late_upload_of_the_dead, kind=None, removed=(SELF_MASK,)),
    Attack(honest_round, kind=None, removed=(ONE_KIND,)),
    Attack(replayed_attempt, says="R2: attempt 1 of round 1 is past", removed=(PAST,)),
    Attack(rerun_without_one, says="R2: round 1 was opened", removed=(OPENED,)),
    Attack(seeds_of_an_earlier_attempt, kind=None, removed=(PAIR_CONTEXT, SHARES_CONTEXT)),
    Attack(ciphertexts_moved, kind=None),
    Attack(different_models, says="R8: 3 signatures"),
    Attack(foreign_keys, says=VERIFY, removed=FOREIGN),
    Attack(unsigned_keys, says=VERIFY, removed=FOREIGN),
    Attack(foreign_bundles, says=VERIFY),
    Attack(own_key_altered, says="R4: this is not a bundle"),
    Attack(own_key_forgotten, says="R4: this is not a bundle"),
    Attack(own_key_long_replaced, says="R4: this is not a bundle"),
    Attack(another_session, says="R4: 'a' has another session"),
    Attack(never_introduced, says="R5: 'e' was never introduced"),
    Attack(
        alone_in_the_cohort,
        kind=PlanError,
        says="1 sites",
        removed=(ANY_COHORT, ANY_SHARE, TWO_LEFT),
        setting=Setting(colluders=0),
    ),
    Attack(
        alone_among_the_corrupt,
        kind=PlanError,
        says="a sum of 2 sites",
        removed=(PAIR_OF_TWO,),
        setting=Setting(minimum=2, colluders=0),
    ),
    Attack(below_the_minimum, kind=PlanError, says="cohort.minimum = 5", removed=(ANY_COHORT, ANY_SHARE)),
    Attack(above_the_size, says="R3: a cohort of 7", setting=Setting(size=6)),
    Attack(sybil_in_the_cohort, says="is not on the roster", setting=Setting(size=9)),
    Attack(cohort_with_repeats, says="R3: names are not ascending"),
    Attack(cohort_out_of_order, says="R3: names are not ascending"),
    Attack(cohort_without_it, says="R3: this site is not in the cohort"),
    Attack(lowered_terms, says="R1: the plan or roster"),
    Attack(another_roster, says="R1: the plan or roster"),
    Attack(another_protocol, says="R1: the coordinator speaks protocol 2"),
    Attack(missing_bundles, says="R4: 6 bundles for 7"),
    Attack(low_order_points, says="low order"),
    Attack(out_of_order, says="R9: a message of another attempt"),
    Attack(wrong_number_of_ciphertexts, says="R8: 0 sealed"),
    Attack(signer_outside_the_cohort, says="R8: a signer outside"),
]


def played(attack: Attack) -> World:
    world = World(attack.setting)
    run = world.run().join()
    attack.play(run)
    return world


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_refused_and_nothing_learned(attack: Attack) -> None:
    world = played(attack)
    if attack.kind is None:
        assert not world.refusals
    else:
        assert world.refused(attack.kind, attack.says), [str(error) for error in world.refusals]
    assert not world.oracle.wins, world.oracle.sums()


CONTROLS = [attack for attack in ATTACKS if attack.removed]


@pytest.mark.parametrize("attack", CONTROLS, ids=lambda attack: attack.name)
def test_the_oracle_wins_without_the_check(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    for removal in attack.removed:
        removal.apply(monkeypatch)
    world = played(attack)
    assert world.oracle.wins, ([str(error) for error in world.refusals], world.oracle.sums())


def test_the_oracle_knows_an_honest_sum() -> None:
    world = World()
    run = world.run().join()
    run.uploads()
    run.finish(ALL)
    assert not world.refusals
    assert [each.names for each in world.oracle.sums()] == [frozenset("abdefg")]


def test_foreign_bundles_need_the_post_quantum_secret_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the bundles' signatures ML-KEM still holds; without that secret in the derivation the oracle wins."""
    BUNDLE_SIGNED.apply(monkeypatch)
    attack = Attack(foreign_bundles)
    assert not played(attack).oracle.wins
    Removal(member, "pair_keys", "shared + kem_secret", "shared").apply(monkeypatch)
    assert played(attack).oracle.wins
