"""A run on disk: after each round, enough to continue at the next one as if nothing had happened.

`checkpoint/state.json` names the tensor file of its round and that file's SHA-256; the tensor file is
written first, so a crash between the two leaves the previous round whole. The last few rounds are kept: what a bad
disk made of the newest is not the end of the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors import SafetensorError
from safetensors.numpy import load, save

from accord_server.optimizer import State
from accord_shared.errors import CheckpointError, OutputError
from accord_shared.files import make_folder, write_atomic
from accord_shared.vectors import check_finite

log = logging.getLogger(__name__)

FORMAT = 1
KEPT = 3
"""Rounds on disk."""
ROOM_BESIDE = 1 << 16
"""Bytes held free for a checkpoint beside its tensors and its history."""
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Checkpoint:
    """The coordinator after `round` finished rounds (0: before the first)."""

    run_id: str
    plan_hash: str
    round: int
    weights: Float64
    optimizer: State
    averaged: Float64
    """Sum of the iterates that the plan averages."""
    averaged_count: int
    history: tuple[dict[str, Any], ...] = field(default_factory=tuple)
    """Public facts of each finished round, as JSON values."""


@dataclass(frozen=True)
class Begun:
    """The newest attempt that sites may have answered; they answer none twice, and no earlier round again."""

    round: int = 0
    attempt: int = 0
    cohort: tuple[str, ...] = ()
    """Whom it asked: sites may refuse a further attempt of the round that asks others."""
    closed: bool = False
    """The round is not tried again, whatever came of it."""


@dataclass(frozen=True)
class Seal:
    """Encrypts tensor files at rest: AES-256-GCM under a random nonce, bound to the run and the file's name."""

    cipher: AESGCM

    def close(self, data: bytes, label: str) -> bytes:
        """nonce ‖ ciphertext ‖ tag."""
        nonce = os.urandom(12)
        return nonce + self.cipher.encrypt(nonce, data, label.encode())

    def open(self, data: bytes, label: str) -> bytes:
        """The data.

        Raises:
            CheckpointError: it was encrypted under another key or label, or is damaged.
        """
        try:
            return self.cipher.decrypt(data[:12], data[12:], label.encode())
        except (InvalidTag, ValueError):
            raise CheckpointError(f"{label} cannot be decrypted: another key, or damaged") from None


class CheckpointFolder:
    """Reads and writes the checkpoint of one run, encrypted where there is a seal."""

    def __init__(self, folder: Path, seal: Seal | None = None) -> None:
        self._folder = folder
        self._seal = seal

    def save(self, checkpoint: Checkpoint) -> None:
        """Write it durably, then drop what is older than the last `KEPT` rounds.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
        """
        make_folder(self._folder)
        tensors = {"weights": checkpoint.weights, "averaged": checkpoint.averaged}
        tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
        data = save(tensors)
        name = f"round-{checkpoint.round:05d}.safetensors"
        if self._seal is not None:
            data = self._seal.close(data, f"{checkpoint.run_id}/{name}")
        self._room.unlink(missing_ok=True)
        write_atomic(self._folder / name, data)
        state = {
            "format": FORMAT,
            "run_id": checkpoint.run_id,
            "plan_hash": checkpoint.plan_hash,
            "round": checkpoint.round,
            "averaged_count": checkpoint.averaged_count,
            "tensors": name,
            "encrypted": self._seal is not None,
            "sha256": _sha256(data),
            "history": list(checkpoint.history),
        }
        text = json.dumps(state, indent=1).encode()
        write_atomic(self._folder / f"state-{checkpoint.round:05d}.json", text, durable=False)
        write_atomic(self._folder / "state.json", text)
        self._prune(checkpoint.round)

    def _prune(self, newest: int) -> None:
        """Only the last rounds stay; none is newer than what was just written."""
        kept = {f"{number:05d}" for number in range(newest - KEPT + 1, newest + 1)}
        for pattern in ("round-*.safetensors", "state-*.json"):
            for old in self._folder.glob(pattern):
                if old.stem.rpartition("-")[2] not in kept:
                    old.unlink(missing_ok=True)

    # --- attempts

    @property
    def _room(self) -> Path:
        return self._folder / "room"

    def begin(self, begun: Begun, room: int = 0) -> None:
        """Note durably that an attempt begins, before any site is asked.

        `room` bytes are held on the disk for the checkpoint of its round: a sum that cannot be kept was released in
        vain.

        Raises:
            OutputError: the disk is full or the folder cannot be written; no site needs to know.
        """
        make_folder(self._folder)
        if room:
            self._hold(room + ROOM_BESIDE)
        write_atomic(self._folder / "attempt.json", json.dumps(asdict(begun)).encode())

    def _hold(self, room: int) -> None:
        try:
            descriptor = os.open(self._room, os.O_CREAT | os.O_RDWR, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, room)
            finally:
                os.close(descriptor)
        except OSError as error:
            with suppress(OSError):
                self._room.unlink(missing_ok=True)
            raise OutputError(f"no room for a checkpoint in {self._folder}: {error.strerror}") from error

    def begun(self) -> Begun:
        """The newest attempt that was begun, also before a crash. A note that is damaged closes the round it was of."""
        path = self._folder / "attempt.json"
        try:
            found = json.loads(path.read_text())
            values = int(found["round"]), int(found["attempt"]), tuple(map(str, found["cohort"]))
            return Begun(*values, closed=bool(found["closed"]))
        except FileNotFoundError:
            return Begun()
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.error("%s cannot be read (%s): its round is not tried again", path, type(error).__name__)
            return Begun(self._newest() + 1, closed=True)

    def _newest(self) -> int:
        """The newest round that was finished, by the names of the files alone."""
        found = (path.stem.rpartition("-")[2] for path in self._folder.glob("state-*.json"))
        return max((int(number) for number in found if number.isdecimal()), default=0)

    # --- reading

    def load(self, plan_hash: str) -> Checkpoint | None:
        """The last finished round that is whole, or None where no round has finished.

        Raises:
            CheckpointError: none is whole; or one is of a newer format, of another plan, or under another key.
        """
        found = [path for path in (self._folder / "state.json", *self._older()) if path.exists()]
        if not found:
            return None
        damage: list[str] = []
        for path, state in sorted(self._states(found, damage), key=lambda item: -item[1]["round"]):
            _check_fits(path, state, plan_hash)
            try:
                checkpoint = self._read(path, state)
            except (_Damaged, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                damage.append(f"{path} cannot be used: {error}")
                continue
            for line in damage:
                log.error(
                    "%s: the run falls back to round %d", line, checkpoint.round, extra={"run": checkpoint.run_id}
                )
            return checkpoint
        raise CheckpointError(damage[0])

    def _older(self) -> list[Path]:
        return sorted(self._folder.glob("state-*.json"), reverse=True)

    @staticmethod
    def _states(paths: list[Path], damage: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """States by their files, each round once."""
        seen: set[int] = set()
        for path in paths:
            try:
                state = json.loads(path.read_text())
                number = int(state["round"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                damage.append(f"{path} cannot be read: {error}")
                continue
            if number not in seen:
                seen.add(number)
                yield path, state

    def _read(self, path: Path, state: dict[str, Any]) -> Checkpoint:
        data = (self._folder / state["tensors"]).read_bytes()
        if _sha256(data) != state["sha256"]:
            raise _Damaged(f"{state['tensors']} is damaged: its SHA-256 differs")
        return _checkpoint(state, load(self._opened(state, data)))

    def _opened(self, state: dict[str, Any], data: bytes) -> bytes:
        if not state.get("encrypted", False):
            return data
        if self._seal is None:
            raise CheckpointError(f"{self._folder} is encrypted: rounds.encrypt_checkpoints is off")
        return self._seal.open(data, f"{state['run_id']}/{state['tensors']}")


class _Damaged(Exception):
    """A file holds other bytes than were written."""


def _check_fits(path: Path, state: dict[str, Any], plan_hash: str) -> None:
    """What an older checkpoint would not mend."""
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')}, this version reads {FORMAT}")
    if state.get("plan_hash") != plan_hash:
        raise CheckpointError(f"{path} belongs to plan {str(state.get('plan_hash'))[:12]}…, not to {plan_hash[:12]}…")


def _checkpoint(state: dict[str, Any], tensors: dict[str, Any]) -> Checkpoint:
    check_finite(tensors["weights"], "the checkpoint's weights")
    return Checkpoint(
        run_id=state["run_id"],
        plan_hash=state["plan_hash"],
        round=state["round"],
        weights=tensors["weights"],
        averaged=tensors["averaged"],
        averaged_count=state["averaged_count"],
        optimizer={
            name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")
        },
        history=tuple(state["history"]),
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
