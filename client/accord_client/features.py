"""What frozen layers compute, computed once: pooled embeddings and prefix hidden states, on disk.

An entry is named by the hash of everything that determines it: model digest, token limit, layer, texts. It
is as sensitive as the texts, so the folder is private to its owner (mode 0700). Entries are memory-mapped:
many participants of a simulation share one copy.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from accord_client.models import Encoder, EncoderModel, LabelFrame, Tokens
from accord_client.shapes import DUMMY, PROBES, Indices, Shape, row_batches, row_counts
from accord_client.trainer import Runtime
from accord_shared.errors import NonFinite, OutputError
from accord_shared.files import has_home, make_private, write_atomic

VERSION = 2
"""1 could hold embeddings of models that were read with random parts, and of other batches."""
_BLOCK = 256
_SPARE = 1 << 20
"""Bytes that are left on the disk for what must be written besides."""
Array = npt.NDArray[Any]


def default_folder() -> Path:
    """`$ACCORD_CACHE`, or `accord` in the user's cache folder.

    Raises:
        OutputError: neither is set, and the user has no home.
    """
    if base := os.environ.get("ACCORD_CACHE"):
        return Path(base)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "accord"
    if not has_home():
        raise OutputError("no folder for the cache: this user has no home, so set ACCORD_CACHE")
    return Path.home() / ".cache" / "accord"


def key(model_digest: str, max_tokens: int, layer: int, precision: str, texts: Sequence[str]) -> str:
    """Name of an entry: `layer` < 0 is pooled from that hidden state, k > 0 the output of the first k layers."""
    hasher = hashlib.sha256(f"{VERSION}|{model_digest}|{max_tokens}|{layer}|{precision}|{len(texts)}".encode())
    for text in texts:
        data = text.encode()
        hasher.update(len(data).to_bytes(8, "big") + data)
    return hasher.hexdigest()


class FeatureCache:
    """Arrays by key in a folder, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def has(self, name: str) -> bool:
        """Whether the entry is there."""
        return self._path(name).exists()

    def get(self, name: str, compute: Callable[[], Array]) -> Array:
        """The entry, memory-mapped read-only; computed and stored at the first call.

        Raises:
            NonFinite: what was computed holds NaN or infinity.
        """
        if not self.has(name):
            self.put(name, compute())
        entry: Array = np.load(self._path(name), mmap_mode="r", allow_pickle=False)
        return entry

    def require_room(self, size: int) -> None:
        """Before an entry of so many bytes is computed.

        Raises:
            OutputError: the disk has no room for it, and a little for what else is written.
        """
        make_private(self._folder)
        free, wanted = shutil.disk_usage(self._folder).free, size + size // 10 + _SPARE
        if free < wanted:
            raise OutputError(f"{self._folder}: embeddings need {_size(wanted)} of disk, and {_size(free)} are free")

    def put(self, name: str, value: Array) -> None:
        """Store an entry."""
        if not np.isfinite(value).all():
            raise NonFinite("features hold NaN or infinity")
        make_private(self._folder)
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        write_atomic(self._path(name), buffer.getvalue(), mode=0o600)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def pooled(
    encoder: Encoder,
    texts: Sequence[str],
    runtime: Runtime,
    on_progress: Callable[[int], None] = lambda _: None,
) -> npt.NDArray[np.float32]:
    """Pooled embeddings [n, d] of the texts, each the same whatever the others are."""
    tokens = encoder.tokenize(texts)
    result = np.empty((len(texts), encoder.hidden_size), dtype=np.float32)
    encoder.model.to(runtime.device)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        return encoder.pool(encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask).float()

    for rows, embedded in _alone(encoder, tokens, runtime, "pooled", run):
        result[rows] = embedded
        on_progress(len(rows))
    return result


def prefix_states(
    model: EncoderModel, tokens: Tokens, runtime: Runtime, on_progress: Callable[[int], None] = lambda _: None
) -> npt.NDArray[np.float16]:
    """Output of the frozen layers [all tokens, d], ragged as in `tokens`: of each text whatever the others are."""
    encoder = model.encoder
    result = np.empty((len(tokens.ids), encoder.hidden_size), dtype=np.float16)
    starts = tokens.ends - tokens.lengths
    seen: list[Tensor] = []
    layer = encoder.layers()[model.frozen_layers - 1]
    handle = layer.register_forward_hook(lambda _module, _args, output: seen.append(output))

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        model.logits({"ids": ids, "mask": mask})
        return seen.pop().float() * mask.unsqueeze(-1)  # padding is nobody's

    try:
        for rows, hidden in _alone(encoder, tokens, runtime, "prefix", run):
            for place, row in enumerate(rows):
                result[starts[row] : tokens.ends[row]] = hidden[place, : tokens.lengths[row]]
            on_progress(len(rows))
    finally:
        handle.remove()
    return result


def _alone(
    encoder: Encoder, tokens: Tokens, runtime: Runtime, kind: str, run: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[Indices, Array]]:
    """(rows, what `run` makes of them), a batch at a time, by shapes that are the rows' own."""

    def inputs(rows: Indices, shape: Shape) -> tuple[Tensor, Tensor]:
        ids, mask = encoder.pad(tokens, rows.tolist(), shape)
        return ids.to(runtime.device), mask.to(runtime.device)

    def counts(shape: Shape) -> Sequence[int]:
        most, name = runtime.rows(features=False), (kind, runtime.device, runtime.precision)
        return row_counts(encoder).of(name, shape, most, lambda rows: [run(*inputs(rows, shape))])

    with torch.inference_mode(), runtime.autocast(), runtime.repeatable():
        for shape, rows in row_batches(tokens.lengths, len(tokens.lengths), encoder.max_tokens, counts):
            real = rows != DUMMY
            yield rows[real], run(*inputs(rows, shape)).cpu().numpy()[real]


@dataclass(frozen=True)
class FeatureBatches:
    """Records as features [n, d]: what depth `head` trains on."""

    features: Tensor
    labels: Tensor
    units: Indices
    lengths: None = None
    longest: int = 0

    def inputs(self, rows: Indices, shape: Shape | None = None) -> Tensor:
        """Features [B, d] of the rows; of stand-ins zeros, or made-up ones."""
        del shape
        index = torch.from_numpy(np.maximum(rows, 0)).to(self.features.device)
        if not (rows < 0).any():
            return self.features[index]
        features = self.features.new_zeros(len(rows), self.features.shape[1])
        real = torch.from_numpy(rows >= 0).to(self.features.device)
        features[real] = self.features[index[real]]
        for probe in PROBES:
            made_up = np.random.default_rng(-probe).normal(size=self.features.shape[1]).astype(np.float32)
            features[torch.from_numpy(rows == probe).to(real.device)] = torch.from_numpy(made_up).to(real.device)
        return features


@dataclass(frozen=True)
class TokenBatches:
    """Records as token ids, with the frozen prefix where there is one: what `lora` and `full` train on."""

    encoder: Encoder
    tokens: Tokens
    prefix: Array | None
    labels: Tensor
    units: Indices
    device: str

    @property
    def lengths(self) -> Indices:
        """Number of tokens [n] of each record."""
        return self.tokens.lengths

    @property
    def longest(self) -> int:
        """Most tokens that a record can have."""
        return self.encoder.max_tokens

    def inputs(self, rows: Indices, shape: Shape | None = None) -> dict[str, Tensor]:
        """`ids`, `mask` [B, T] and `prefix` [B, T, d] of the rows."""
        ids, mask = self.encoder.pad(self.tokens, rows.tolist(), shape)
        batch = {"ids": ids, "mask": mask}
        if self.prefix is not None:
            hidden = torch.zeros(*ids.shape, self.prefix.shape[1])
            for place, row in enumerate(rows.tolist()):
                if row < 0:
                    hidden[place] = self._made_up(row, hidden.shape[1])
                    continue
                end = self.tokens.ends[row]
                length = end - (self.tokens.ends[row - 1] if row else 0)
                hidden[place, :length] = torch.from_numpy(np.asarray(self.prefix[end - length : end], dtype=np.float32))
            batch["prefix"] = hidden
        return {name: value.to(self.device) for name, value in batch.items()}

    def _made_up(self, row: int, width: int) -> Tensor:
        """The prefix [T, d] of a dummy or a probe."""
        if row == DUMMY or self.prefix is None:
            return torch.zeros(1)
        size = (width, self.prefix.shape[1])
        return torch.from_numpy(np.random.default_rng(-row).normal(size=size).astype(np.float32))


def feature_batches(
    embeddings: npt.NDArray[np.float32],
    labels: Indices,
    units: Indices,
    frame: LabelFrame,
    device: str,
) -> FeatureBatches:
    """Records at depth `head` from their pooled embeddings [n, d]."""
    features = torch.empty(embeddings.shape)
    for start in range(0, len(features), _BLOCK):  # blocks of one size: their arithmetic is the same
        block, part = torch.zeros(_BLOCK, embeddings.shape[1]), embeddings[start : start + _BLOCK]
        block[: len(part)] = torch.from_numpy(np.array(part))
        features[start : start + _BLOCK] = frame.features(block)[: len(part)]
    return FeatureBatches(features=features.to(device), labels=torch.from_numpy(labels), units=units)
