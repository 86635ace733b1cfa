# ruff: noqa: E501
"""Removes each check in a copy of the tree and says which test notices: `python tests/adversarial/mutants.py [word]`.

The tree itself is never changed. A mutant that survives ends the script with 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECAGG = "shared/accord_shared/secagg/"
MEMBER, KEYS, DEALING, CHOICES = (f"{SECAGG}{name}.py" for name in ("member", "keys", "dealing", "choices"))
SITE = "client/accord_client/site.py"
MUTANTS: list[tuple[str, str, str, str]] = [
    ("R1 run", MEMBER, "if run_id != self._terms.run_id:", "if False:"),
    ("R1 protocol", MEMBER, "if request.protocol != PROTOCOL_VERSION:", "if False:"),
    ("R1 roster", MEMBER, "if (request.roster_hash, request.plan_hash) != (", "if False and () != ("),
    ("R1 own roster", MEMBER, "if roster.hash != terms.roster_hash:", "if False:"),
    ("R2 past", MEMBER, "if (request.round, request.attempt) <= self._last:", "if False:"),
    ("R2 opened", MEMBER, "if request.round <= self._opened_round:", "if False:"),
    ("R3 order", MEMBER, "if list(names) != sorted(set(names)):", "if False:"),
    ("R3 roster", MEMBER, "            self._roster.member(name)\n        if self._name not", "            pass\n        if self._name not"),
    ("R3 own name", MEMBER, "if self._name not in names:", "if False:"),
    ("R3 size", MEMBER, "if count > self._terms.size:", "if False:"),
    ("R3 two", f"{SECAGG}thresholds.py", "if small and not own_noise:", "if False:"),
    ("R3 sparse minimum", MEMBER, "if self._terms.sparse and count < self._terms.minimum:", "if False:"),
    ("R3 minimum", f"{SECAGG}thresholds.py", "if n < 2 or not 1 <= minimum <= n:", "if n < 2:"),
    ("R3 plan's size", KEYS, "self.mode, self.size, own_noise", "self.mode, own_noise"),
    ("R4 number", MEMBER, "if len(request.bundles) != count:", "if False:"),
    ("R4 own", MEMBER, "if own == bundle), None)", "), None)"),
    ("R4 newest two", MEMBER, "for older in [g for g in self._keys if g < generation - 1]:", "for older in []:"),
    ("R4 forget", MEMBER, "for older in [g for g in self._keys if g < generation]:", "for older in []:"),
    ("R4 session", MEMBER, "if bundle.session != peer.session:", "if False:"),
    ("R4 bundle signature", KEYS, "verify(member, bundle.signed_bytes(terms, member.name), data[-ED25519_SIGNATURE:])", "pass"),
    ("R4 low order", KEYS, "    except ValueError:\n        raise ProtocolError(f\"an X25519", "    except ValueError:\n        return bytes(32)\n        raise ProtocolError(f\"an X25519"),
    ("R5 introduced", MEMBER, "partners, holders = Edges(request.choices, places).of(own)\n", "partners, holders = ([i for i in e if request.cohort[i] in {*self._peers, self._name}] for e in Edges(request.choices, places).of(own))\n"),
    ("R5 number", MEMBER, "if not len(request.peers) == len(request.credentials) == len(request.introductions):", "if False:"),
    ("R5 own peer", MEMBER, "if name == self._name:\n            raise ProtocolError(\"R5", "if False:\n            raise ProtocolError(\"R5"),
    ("R5 credential signatures", KEYS, "verify_both(roster.members[place], credential.signed_bytes(terms, name), data[-BOTH_SIGNATURES:])", "pass"),
    ("R5 introduction signatures", KEYS, "verify_both(member, _introduction_bytes(terms, sender, receiver, ciphertext), data[CIPHERTEXT_BYTES:])", "pass"),
    ("R6 length", MEMBER, "if words.shape != (self._terms.dimension,):", "if False:"),
    ("R7 distinct", MEMBER, "list(survivors) != sorted(set(survivors)) or", ""),
    ("R7 range", MEMBER, " or not all(0 <= index < count for index in survivors)", ""),
    ("R7 own index", MEMBER, "if current.own not in survivors:", "if False:"),
    ("R7 enough", MEMBER, "if len(survivors) < least:", "if False:"),
    ("R7 small", MEMBER, "least = count if count <= SMALL_MAX else self._terms.minimum", "least = self._terms.minimum"),
    ("R8 signed set", MEMBER, "if current.survivors is None or request.survivors != current.survivors:", "if False:"),
    ("R8 sealed", MEMBER, "if len(request.sealed) != len(request.survivors):", "if False:"),
    ("R8 signers", MEMBER, "or list(signers) != sorted(set(signers))", ""),
    ("R8 count", MEMBER, "if len(signers) < current.thresholds.sign:", "if False:"),
    ("R8 range", MEMBER, "if not 0 <= index < len(current.attempt.cohort):", "if False:"),
    ("R8 signature", MEMBER, "verify(self._roster.member(current.attempt.cohort[index]), signed, signature)", "pass"),
    ("R9 sign once", MEMBER, "if current.survivors is not None:", "if False:"),
    ("R9 forget", MEMBER, "self._opened_round = current.attempt.round\n        self._current = None", "self._opened_round = current.attempt.round"),
    ("R9 note opened", MEMBER, "self._opened_round = current.attempt.round\n", "\n"),
    ("R9 note attempt", MEMBER, "self._last = (request.round, request.attempt)", "pass"),
    ("R9 other attempt", MEMBER, "if (request.round, request.attempt) != (current.attempt.round, current.attempt.attempt):", "if False:"),
    ("R9 order", MEMBER, "if self._current is None or self._current.masked is not masked:", "if self._current is None:"),
    ("context", KEYS, "okm = _hkdf(shared + kem_secret, attempt.context,", "okm = _hkdf(shared + kem_secret, b\"\","),
    ("context model", KEYS, "shown = (t.dimension, self.model_hash,", "shown = (t.dimension,"),
    ("survivors context", KEYS, '"accord/1/survivors", self.context,', '"accord/1/survivors",'),
    ("self mask", MEMBER, "plus = [self_mask, *(", "plus = [*("),
    ("post-quantum secret", KEYS, "_hkdf(shared + kem_secret, attempt", "_hkdf(shared, attempt"),
    ("one kind of share", DEALING, " if index not in alive)]", ")]"),
    ("share length", DEALING, "if len(shares) != SHARE_BYTES * (1 + len(partners) + components):", "if False:"),
    ("site policy at use", SITE, "        self._check_policy(plan)\n        if not 1", "        if not 1"),
    ("site policy mode", SITE, "if _STRENGTH[mode] < _STRENGTH[least]:", "if False:"),
    ("site policy privacy", SITE, 'if plan.privacy.noise == "none" and not self._accept_without_privacy:', "if False:"),
    ("site roster", SITE, "if enquiry.roster_hash != roster.hash:", "if False:"),
    ("site roster terms", SITE, "if plan.cohort.minimum < roster.minimum or plan.cohort.colluders < roster.colluders:", "if False:"),
    ("site plan hash", SITE, "if plan.hash != enquiry.plan_hash:", "if False:"),
    ("site unmasked", SITE, 'if plan.secure_aggregation.mode != "off":', "if False:"),
    ("R10 opened", SITE, "if request.round <= spent.opened_round:", "if False:"),
    ("R10 note", SITE, "self._store.note_opened(plan_hash, request.round)", "pass"),
    ("R2 site past", SITE, "if (request.round, request.attempt) <= (spent.last_round, spent.last_attempt):", "if False:"),
    ("R2 site note", SITE, "self._store.note_attempt(request.plan_hash, request.attempt)", "pass"),
    ("R2 site present", SITE, "if (request.round, request.attempt) != (spent.last_round, spent.last_attempt):", "if False:"),
    ("R2 site cohort", SITE, "if request.round == spent.last_round and not set(request.cohort) <= set(spent.last_cohort):", "if False:"),
    ("lock", "client/accord_client/members.py", "with self._lock:", "if True:"),
    ("run on other terms", "client/accord_client/members.py", "if known[0] != terms:", "if False:"),
    ("roster sybil", "shared/accord_shared/roster.py", "            if owner != member.name:", "            if False:"),
]  # fmt: skip

CHOICE_MUTANTS: list[tuple[str, str, str, str]] = [
    ("choice drawn anew", MEMBER, "own_choice(identity, *names,", "own_choice(Identity.from_seeds(random(32), random(32)), *names,"),
    ("choice of the run", MEMBER, "names = (terms.roster_hash, terms.plan_hash)", "names = (terms.run_id, terms.plan_hash)"),
    ("choice of the roster", CHOICES, 'frame("accord/1/neighbours", roster_hash, plan_hash)', 'frame("accord/1/neighbours", plan_hash)'),
    ("choice of the plan", CHOICES, 'frame("accord/1/neighbours", roster_hash, plan_hash)', 'frame("accord/1/neighbours", roster_hash)'),
    ("choice of members", MEMBER, "if terms.sparse and terms.members != sites:", "if False:"),
    ("choice of the roster's size", KEYS, "return sparse_thresholds(self.members, self", "return sparse_thresholds(sites, self"),
    ("choice checked by the plan", KEYS, "        plan.check_roster(members)\n", ""),
    ("choice length", CHOICES, "len(choice) != map_bytes(sites) or", ""),
    ("choice degree", CHOICES, "bits.bit_count() != degree or", ""),
    ("choice padding", CHOICES, "or padding or", "or"),
    ("choice own", CHOICES, " or chose(choice, own):", ":"),
    ("choice credential checked", KEYS, "            check_choice(choice, name, place, terms.members, terms.degree)\n", "            pass\n"),
    ("choice signed", KEYS, "choice = (self.choice,) if self.choice else ()\n", "choice = ()\n"),
    ("choice number", MEMBER, "if len(request.choices) != (len(places) if terms.sparse else 0):", "if False:"),
    ("choice shown checked", MEMBER, "            check_choice(choice, name, place, terms.members, terms.degree)\n", "            pass\n"),
    ("choice own shown", MEMBER, "if request.choices and request.choices[own] != self._choice:", "if False:"),
    ("choice as signed", MEMBER, "if request.choices and request.choices[index] != self._peers[name].choice:", "if False:"),
    ("choice context", KEYS, "self.coordinator, self.choices, self.cohort", "self.coordinator, (), self.cohort"),
    ("choosers are partners", CHOICES, "np.flatnonzero(chosen | choosers)", "np.flatnonzero(chosen)"),
    ("chosen are partners", CHOICES, "np.flatnonzero(chosen | choosers)", "np.flatnonzero(choosers)"),
    ("chosen are holders", CHOICES, "holds = chosen.copy()", "holds = chosen | choosers"),
    ("choice noise by signers", KEYS, "return self.noise is not None and self.sparse", "return False and self.sparse"),
]  # fmt: skip
"""Of section 9; `test_hostile_choices` alone has to notice."""

SHARING, DISCRETE, ACCOUNTING, EVENTS = (
    f"shared/accord_shared/dp/{name}.py" for name in ("sharing", "discrete", "accounting", "events")
)
QUANTIZE, LEDGER, CHAIN = (
    "shared/accord_shared/quantize.py",
    "client/accord_client/ledger/ledger.py",
    "client/accord_client/ledger/chain.py",
)
BALANCE, LIMITS, MEMBERS = (
    "client/accord_client/ledger/balance.py",
    "client/accord_client/ledger/limits.py",
    "client/accord_client/members.py",
)
NOISE_MUTANTS: list[tuple[str, str, str, str]] = [
    ("noise R11 partners", SITE, "self._charge(request, event, None, heads)", "self._charge(request, event, None)"),
    ("noise R11 back", CHAIN, "if head.seq < before.seq or (", "if ("),
    ("noise R11 most", CHAIN, "if head.seq > MOST_ENTRIES:", "if False:"),
    ("noise head signed", KEYS, "own = (self.session, self.generation, self.public, self.head.to_bytes())", "own = (self.session, self.generation, self.public)"),
    ("noise head now", MEMBER, "self._head = head\n        attempt, own", "attempt, own"),
    ("noise context", KEYS, "noise = (t.noise.facts,) if t.noise else ()", "noise = ()"),
    ("noise facts steps", SHARING, "return (self.steps, self.bits, *(", "return (self.bits, *("),
    ("noise facts variances", SHARING, "*(int(variance * _SIXTEENTH) for variance in variances))", ")"),
    ("noise removed all", KEYS, "self.noise.removed(signers if self.counts_signers else survivors)", "self.noise.removed(self.size)"),
    ("noise removed rule", SHARING, "sum(level > survivors for level in self._levels)", "sum(level > survivors + 1 for level in self._levels)"),
    ("noise nested", SHARING, "nested=cohort.size > COMPLETE_MAX,", ""),
    ("noise removed binary rule", SHARING, "if missing > 0 and rest < missing:", "if missing > 0 and rest < missing / 2:"),
    ("noise components' place", DEALING, "open_ += [1 + len(partners) + index for index in removed]", "open_ += [len(partners) + index for index in removed]"),
    ("noise seeds fresh", MEMBER, "seeds = [self._random(SEED_BYTES) for _ in noises]", "seeds = [self._session * 2 for _ in noises]"),
    ("noise components added", MEMBER, "            noise.add(words, seed)\n", "            pass\n"),
    ("noise base added", QUANTIZE, "shares.base_noise.add(words, generator.uint64(SEED_BYTES // 8).tobytes())", "pass"),
    ("noise base seed", QUANTIZE, "shares.base_noise.add(words, generator.uint64(SEED_BYTES // 8).tobytes())", "shares.base_noise.add(words, bytes(SEED_BYTES))"),
    ("noise rounding", QUANTIZE, "round_to_integers(values, out, generator)", "np.copyto(out, values >> FRACTION_BITS, casting='unsafe')"),
    ("noise rounding variance", DISCRETE, "rows = [_thresholds(Fraction(f, steps), ROUNDING_VARIANCE,", "rows = [_thresholds(Fraction(f, steps), Fraction(4),"),
    ("noise rounding centres", DISCRETE, "rows = [_thresholds(Fraction(f, steps),", "rows = [_thresholds(Fraction(0, steps),"),
    ("noise table bits", DISCRETE, "(high == bits[open_, 0]) & (low <= bits[open_, 1])", "False"),
    ("noise table side", DISCRETE, "reached = (high < bits[open_, 0])", "reached = (high > bits[open_, 0])"),
    ("noise levels", DISCRETE, "modes.CTR(bytes([level, part]) + bytes(14))", "modes.CTR(bytes([0, part]) + bytes(14))"),
    ("noise further bits", DISCRETE, "further = _Stream(seed, level, 0), _Stream(seed, level, 1)", "further = _Stream(seed, level, 0), _Stream(seed, level, 0)"),
    ("noise coin", QUANTIZE, "        np.right_shift(values, _COIN_BITS, out=values)\n        round_to_integers", "        np.left_shift(values >> _COIN_BITS, 1, out=values)\n        round_to_integers"),
    ("noise clamp", QUANTIZE, "np.clip(out, -clamp, clamp, out=out)", "pass"),
    ("noise colluders", SHARING, "return _ceil(self.variance / (survivors - self.colluders))", "return _ceil(self.variance / survivors)"),
    ("noise V rounded up", SHARING, "return _ceil(self.variance / (survivors - self.colluders))", "return Fraction(math.floor(self.variance / (survivors - self.colluders) * 16), 16)"),
    ("noise virtual variance", SHARING, "* exact(self.delta_steps) ** 2) + VIRTUAL_VARIANCE", "* exact(self.delta_steps) ** 2)"),
    ("noise base without rounding", SHARING, "return self.share(self.sites) - ROUNDING_VARIANCE", "return self.share(self.sites) - 2 * ROUNDING_VARIANCE"),
    ("noise own multiplier", SHARING, "own = math.sqrt(float(self.share(self.sites) - VIRTUAL_VARIANCE))", "own = math.sqrt(float(self.share(self.sites)))"),
    ("noise sensitivity coins", SHARING, "moved * moved + Decimal(dimension) / 4 + luck", "moved * moved + luck"),
    ("noise sensitivity luck", SHARING, " + luck * (moved + root / 2)", ""),
    ("noise smooth", SHARING, "if least < LEAST_VARIANCE:", "if False:"),
    ("noise wrap", SHARING, "if self.limit >= 1 << (self.bits - 1):", "if False:"),
    ("noise precise", SHARING, "if not self.is_precise:", "if False:"),
    ("noise fixed point", SHARING, "if self.reach >= 1 << (_FIXED_WIDTH", "if False and (_FIXED_WIDTH"),
    ("noise magnitudes", SHARING, "if not _MAGNITUDES[0] <= value <= _MAGNITUDES[1]:", "if False:"),
    ("noise roster left out", "shared/accord_shared/plan.py", "if self.shared_noise and left_out > divided_for:", "if False:"),
    ("noise slack", ACCOUNTING, "left = delta - sum(event.slack * event.steps for event in shared)", "left = delta"),
    ("noise slack of a plan", ACCOUNTING, "delta = privacy.delta - plan.releases * (SLACK + VARIATION", "delta = privacy.delta - 0 * (SLACK + VARIATION"),
    ("noise participant rate", ACCOUNTING, '1.0 if plan.privacy.noise == "participant" else rate', "rate"),
    ("noise colluding", ACCOUNTING, "if colluding and isinstance(event, SharedGaussian):", "if False:"),
    ("noise little of it", ACCOUNTING, "event.sampling_rate if sigma >= MIN_SIGMA else 1.0", "event.sampling_rate"),
    ("noise reserve calibrated", "shared/accord_shared/plan.py", "return self.rounds_per_site + (self.run.max_extra_attempts if self.shared_noise else 0)", "return self.rounds_per_site"),
    ("noise events' numbers", EVENTS, "if not (numbers and ", "if not ("),
    ("noise events' own", EVENTS, "if not (self.own_noise_multiplier <= self.noise_multiplier and 0 <= self.slack < 1):", "if False:"),
    ("noise budget", SITE, "        self._check_budget(plan, spent)\n        event = self._checked_event(plan, shares)", "        event = self._checked_event(plan, shares)"),
    ("noise event checked", SITE, "if event is not None and run_epsilon(plan, event) > (plan.privacy.epsilon or 0.0):", "if False:"),
    ("noise other weights", SITE, "if request.round == spent.last_round and request.model_hash != spent.last_model:\n            raise ProtocolError(f\"round {request.round} was released before, from other weights\")\n        self._check_budget", "if False:\n            pass\n        self._check_budget"),
    ("noise reserved", SITE, "        self._reserve(request, event)\n        words", "        words"),
    ("noise charged", SITE, "self._charge(request, event, None, heads)", "self._store.ledger.witness(heads)"),
    ("noise update kept", SITE, "self._charge(request, event, None, heads)", "self._charge(request, event, np.zeros(3, dtype=np.float32), heads)"),
    ("noise fresh", SITE, "words = encode(self._unnoised(request, plan), shares, self._generator)", "words = encode(self._unnoised(request, plan), shares, SecureGenerator(bytes(32)))"),
    ("noise plan limits", SITE, "self._store.check_plan(plan.hash, event, plan.releases, dataset=self._dataset)", "pass"),
    ("noise reserve limits", LEDGER, "            self._limits.check(balance, entry.dataset, entry.plan, Spent.of(entry.event))\n", ""),
    ("noise release limits", LEDGER, "if reserved is None or not reserved.permits(step):", "if False:"),
    ("noise permits", "client/accord_client/ledger/entries.py", "return mine == other and self.attempt == release.attempt and self.event == release.event", "return mine == other"),
    ("noise others' reservations", LIMITS, " + balance.reserved_by_others(dataset, plan)", ""),
    ("noise receipt signature", MEMBERS, "receipt.verify(self._identity.keys)", "pass"),
    ("noise receipt site", MEMBERS, "if receipt.site != self._name:", "if False:"),
    ("noise receipt opened", "client/accord_client/ledger/receipts.py", "        self.verify(identity.keys)\n        sealed = self.sealed_bytes", "        sealed = self.sealed_bytes"),
    ("noise recover common", LEDGER, "costs, progress = lacking(account, _common(account, balance, writing))", "costs, progress = lacking(account, Account())"),
    ("noise recover once", LEDGER, "            if receipt.head == balance.head or any(receipt.head in _heads(entry) for entry in balance.imports):\n                return False\n", ""),
    ("noise recover above", LEDGER, "_append(writing, entry, above=receipt.seq)", "_append(writing, entry)"),
    ("noise imported steps", BALANCE, "self._add(cost.dataset, cost.plan, cost.spent)", "pass"),
    ("noise vanishing squares", "client/accord_client/gradients.py", "inputs, grads = inputs / sizes, grads * sizes", "pass"),
    ("noise clipped update", "client/accord_client/trainer.py", "return update * min(1.0, spec.clip_norm / (norm * (1.0 + CLIP_MARGIN))) if norm > 0.0 else update", "return update"),
]  # fmt: skip
"""Of sections 13 to 15; `test_hostile_noise` alone has to notice."""


def killer(mutant: tuple[str, str, str, str]) -> str:
    """Names of the first tests that fail, or nothing."""
    tests = "tests/adversarial"
    if mutant in NOISE_MUTANTS or mutant in CHOICE_MUTANTS:
        tests += "/test_hostile_noise.py" if mutant in NOISE_MUTANTS else "/test_hostile_choices.py"
    _, file, old, new = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("server", "client", "shared", "simulations", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = (copy / file).read_text()
        if source.count(old) != 1:
            return f"NOT FOUND: {source.count(old)} times"
        (copy / file).write_text(source.replace(old, new))
        paths = [str(copy / part) for part in ("shared", "client", "server", "simulations")]
        command = [sys.executable, "-m", "pytest", "-q", "-rf", "-x", tests, "--tb=no"]
        command += ["-k", "not control and not without_the_check and not look_at_the_cohort_alone"]
        done = subprocess.run(
            command,
            cwd=copy,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        if done.returncode not in (0, 1):  # of what was not even collected nothing is shown
            return f"NOT FOUND: pytest ends with {done.returncode}"
        return ", ".join(re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, re.MULTILINE))


def main() -> int:
    chosen = [
        mutant for mutant in MUTANTS + CHOICE_MUTANTS + NOISE_MUTANTS if all(word in mutant[0] for word in sys.argv[1:])
    ]
    survivors = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, found in zip(chosen, pool.map(killer, chosen), strict=True):
            survivors += not found or found.startswith("NOT FOUND")
            print(f"{mutant[0]}: {found or 'SURVIVES'}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
