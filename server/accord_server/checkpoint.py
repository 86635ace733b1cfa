"""A run on disk: after each round, enough to continue at the next one as if nothing had happened.

`checkpoint/state.json` names the tensor file of its round and that file's SHA-256; the tensor file is
written first, so a crash between the two leaves the previous round whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors import SafetensorError
from safetensors.numpy import load, save

from accord_server.optimizer import State
from accord_shared.errors import CheckpointError
from accord_shared.files import make_folder, write_atomic
from accord_shared.vectors import check_finite

FORMAT = 1
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
        """Write it durably, then drop the tensor file of the round before.

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
        write_atomic(self._folder / "state.json", json.dumps(state, indent=1).encode())
        for old in self._folder.glob("round-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def begin_attempt(self, round_number: int, attempt: int) -> None:
        """Note durably that an attempt begins: sites answer no attempt twice, so none may be asked for again."""
        make_folder(self._folder)
        write_atomic(self._folder / "attempt.json", json.dumps([round_number, attempt]).encode())

    def attempts(self, round_number: int) -> int:
        """Attempts of a round that were begun, also before a crash.

        Raises:
            CheckpointError: the note is damaged.
        """
        path = self._folder / "attempt.json"
        if not path.exists():
            return 0
        try:
            noted, attempt = (int(value) for value in json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        return attempt if noted == round_number else 0

    def load(self, plan_hash: str) -> Checkpoint | None:
        """The last finished round, or None where no round has finished.

        Raises:
            CheckpointError: damaged, of a newer format, or of another plan.
        """
        path = self._folder / "state.json"
        if not path.exists():
            return None
        try:
            state = json.loads(path.read_text())
            data = (self._folder / state["tensors"]).read_bytes()
            if state["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {state['format']}, this version reads {FORMAT}")
            if state["plan_hash"] != plan_hash:
                raise CheckpointError(f"{path} belongs to plan {state['plan_hash'][:12]}…, not to {plan_hash[:12]}…")
            if _sha256(data) != state["sha256"]:
                raise CheckpointError(f"{self._folder / state['tensors']} is damaged: its SHA-256 differs")
            return _checkpoint(state, load(self._opened(state, data)))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def _opened(self, state: dict[str, Any], data: bytes) -> bytes:
        if not state.get("encrypted", False):
            return data
        if self._seal is None:
            raise CheckpointError(f"{self._folder} is encrypted: rounds.encrypt_checkpoints is off")
        return self._seal.open(data, f"{state['run_id']}/{state['tensors']}")


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
