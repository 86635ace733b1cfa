"""Kills a site with SIGKILL at random moments, starts it again, and lets the last process finish.

    python -m conformance.kill FOLDER KILLS ROUNDS

FOLDER/sent gets a line per reply that left: round and SHA-256. Exit codes of all processes go to stdout. One
process imports the product and forks each site, so that a start takes milliseconds.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

from accord_shared.plan import Plan
from conformance.lab import Lab, ask, lab_plan, trained


def kill_plan(rounds: int) -> Plan:
    """The plan whose rounds the site runs."""
    return lab_plan({"run.rounds": rounds, "privacy.accountant": "rdp"})


def run_site(folder: Path, rounds: int, started: int) -> None:
    """Serve the coordinator's rounds, each twice as if its first reply was lost."""
    plan, lab = kill_plan(rounds), Lab(folder / "lab")
    site = lab.joined(plan)
    sent = os.open(folder / "sent", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(started, b".")
    for number in range(max(1, site.releases(plan).last_round), rounds + 1):
        for _ in range(2):
            update = trained(ask(site, plan, lab, number)).update
            os.write(sent, f"{number} {hashlib.sha256(update.tobytes()).hexdigest()}\n".encode())


def main(folder: Path, kills: int, rounds: int) -> None:
    """Kill `kills` times, then run to the end."""
    moments = random.Random(1)  # noqa: S311  (when to kill, nothing else)
    for kill in range(kills + 1):
        ready, started = os.pipe()
        child = os.fork()
        if child == 0:
            run_site(folder, rounds, started)
            os._exit(0)
        os.read(ready, 1)
        if kill < kills:
            time.sleep(moments.uniform(0.0, 0.06))
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
