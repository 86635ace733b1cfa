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
MEMBER, KEYS, DEALING = f"{SECAGG}member.py", f"{SECAGG}keys.py", f"{SECAGG}dealing.py"
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
    ("R3 two", MEMBER, "if count == 2 and not self._terms.own_noise:", "if False:"),
    ("R3 sparse minimum", MEMBER, "if count < self._terms.minimum:", "if False:"),
    ("R3 sparse names", MEMBER, "if not set(self._run_names).issuperset(request.cohort):", "if False:"),
    ("R3 minimum", f"{SECAGG}thresholds.py", "if n < 2 or not 1 <= minimum <= n:", "if n < 2:"),
    ("R3 plan's size", KEYS, "self.mode, self.size)", "self.mode)"),
    ("R4 number", MEMBER, "if len(request.bundles) != count:", "if False:"),
    ("R4 own", MEMBER, "if own == bundle), None)", "), None)"),
    ("R4 forget", MEMBER, "for older in [g for g in self._keys if g < generation]:", "for older in []:"),
    ("R4 session", MEMBER, "if bundle.session != peer.session:", "if False:"),
    ("R4 bundle signature", KEYS, "verify(member, bundle.signed_bytes(terms, member.name), data[-ED25519_SIGNATURE:])", "pass"),
    ("R4 low order", KEYS, "    except ValueError:\n        raise ProtocolError(f\"an X25519", "    except ValueError:\n        return bytes(32)\n        raise ProtocolError(f\"an X25519"),
    ("R5 introduced", MEMBER, "        if missing:", "        if False:"),
    ("R5 number", MEMBER, "if not len(request.peers) == len(request.credentials) == len(request.introductions):", "if False:"),
    ("R5 own peer", MEMBER, "if name == self._name:\n            raise ProtocolError(\"R5", "if False:\n            raise ProtocolError(\"R5"),
    ("R5 credential signatures", KEYS, "verify_both(member, credential.signed_bytes(terms, member.name), data[end:])", "pass"),
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
    ("R9 choose once", MEMBER, "if self._chosen is not None:\n            raise", "if False:\n            raise"),
    ("R9 complete", MEMBER, "if degree is None:", "if False:"),
    ("sparse holders", MEMBER, "if chosen is None or cohort[index] in chosen)]))", ")]))"),
    ("context", KEYS, "okm = _hkdf(shared + kem_secret, attempt.context,", "okm = _hkdf(shared + kem_secret, b\"\","),
    ("context model", KEYS, "shown = (t.dimension, self.model_hash,", "shown = (t.dimension,"),
    ("survivors context", KEYS, '"accord/1/survivors", self.context,', '"accord/1/survivors",'),
    ("self mask", MEMBER, "plus = [self_mask, *(", "plus = [*("),
    ("post-quantum secret", KEYS, "_hkdf(shared + kem_secret, attempt", "_hkdf(shared, attempt"),
    ("one kind of share", DEALING, " if index not in alive)]", ")]"),
    ("share length", DEALING, "if len(shares) != SHARE_BYTES * (1 + len(partners)):", "if False:"),
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


def killer(mutant: tuple[str, str, str, str]) -> str:
    """Names of the first tests that fail, or nothing."""
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
        command = [sys.executable, "-m", "pytest", "-q", "-rf", "-x", "tests/adversarial", "--tb=no"]
        command += ["-k", "not control and not without_the_check and not look_at_the_cohort_alone"]
        done = subprocess.run(
            command,
            cwd=copy,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        return ", ".join(re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, re.MULTILINE))


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if all(word in mutant[0] for word in sys.argv[1:])]
    survivors = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, found in zip(chosen, pool.map(killer, chosen), strict=True):
            survivors += not found
            print(f"{mutant[0]}: {found or 'SURVIVES'}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
