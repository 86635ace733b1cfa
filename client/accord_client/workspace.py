"""What a plan needs of the pretrained model at this site: built once, used for every message."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accord_client.data import Examples
from accord_client.features import (
    FeatureCache,
    TokenBatches,
    feature_batches,
    key,
    pooled,
    prefix_states,
)
from accord_client.metrics import hold_back
from accord_client.models import Encoder, EncoderModel, HeadModel, LabelFrame, Tokens, digest, verified
from accord_client.trainer import Batches, Runtime, TrainableModel
from accord_shared.errors import ModelError
from accord_shared.plan import Plan
from accord_shared.vectors import Vector


class Workspace:
    """Encoder, label frame, trainable model and prepared records of one plan.

    At depth `head` the encoder is loaded only if something is missing in the cache: a simulated participant
    whose embeddings the harness has prepared never loads it.
    """

    def __init__(self, plan: Plan, cache: FeatureCache, runtime: Runtime) -> None:
        self.plan = plan
        self.runtime = runtime
        self._cache = cache

    @cached_property
    def _folder(self) -> Path:
        return verified(self.plan.model)

    @cached_property
    def _digest(self) -> str:
        return self.plan.model.digest or digest(self._folder)

    @cached_property
    def encoder(self) -> Encoder:
        """The pretrained encoder (loads it).

        Raises:
            ModelError: it is not sound, or its files were changed since they were compared with the plan.
        """
        wanted = self._digest
        encoder = Encoder(self._folder, self.plan.task.max_tokens, self.plan.model.layer)
        if digest(self._folder) != wanted:
            raise ModelError(f"the model in {self._folder} was changed while it was in use")
        return encoder

    def embeddings(
        self, texts: tuple[str, ...], on_progress: Callable[[int], None] = lambda _: None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Pooled embeddings [n, d], from the cache where they are.

        With `task.prompts` the mean over prompts of unit embeddings.
        """
        return self._cache.get(self._name(texts), lambda: self._embed(texts, on_progress))

    def _embed(
        self, texts: tuple[str, ...], on_progress: Callable[[int], None]
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        prompts = self.plan.task.prompts
        self._cache.require_room(len(texts) * self.encoder.hidden_size * 4)
        if prompts is None:
            return pooled(self.encoder, texts, self.runtime, on_progress)
        total = np.zeros((len(texts), self.encoder.hidden_size), dtype=np.float32)
        share = _Share(on_progress, len(prompts))
        for prompt in prompts:
            asked = tuple(prompt.replace("{}", text) for text in texts)
            part = pooled(self.encoder, asked, self.runtime, share)
            total += part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
        return total / np.float32(len(prompts))

    def _name(self, texts: tuple[str, ...]) -> str:
        """Of the embeddings of `texts` in the cache."""
        prompts = self.plan.task.prompts
        read = texts if prompts is None else (*texts, *prompts, f"{len(prompts)} prompts")
        return key(self._digest, self.plan.task.max_tokens, self.plan.model.layer, self.runtime.precision, read)

    def keep_embeddings(self, texts: tuple[str, ...], embeddings: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Store embeddings [n, d] that were computed elsewhere under the name that `embeddings` looks up."""
        if not self._cache.has(self._name(texts)):
            self._cache.put(self._name(texts), embeddings)

    @cached_property
    def frame(self) -> LabelFrame:
        """The label names' geometry."""
        embeddings = torch.from_numpy(np.array(self.embeddings(self.plan.task.texts)))
        return LabelFrame(embeddings=embeddings, spec=self.plan.adapter)

    @cached_property
    def _start(self) -> tuple[TrainableModel, Vector]:
        frame, device = self.frame, self.runtime.device
        if self.plan.adapter.depth == "head":
            model: TrainableModel = HeadModel(frame, device)
        else:
            model = EncoderModel(self.encoder, frame, self.plan, device)
        return model, model.vector()

    @property
    def model(self) -> TrainableModel:
        """The trainable model; training moves its weights."""
        return self._start[0]

    def initial(self) -> Vector:
        """The public starting weights [P]: equal wherever the plan is."""
        return self._start[1].copy()

    def prepare(self, examples: Examples, on_progress: Callable[[int], None] = lambda _: None) -> None:
        """Put into the cache whatever training on these records will read from there.

        Raises:
            OutputError: the disk is too small for it, which is found before anything is computed.
        """
        for part in hold_back(examples, self.plan.evaluation.released_fraction):
            if len(part):
                self.batches(part, on_progress)

    def batches(self, examples: Examples, on_progress: Callable[[int], None] = lambda _: None) -> Batches:
        """Records prepared for the plan's depth."""
        if self.plan.adapter.depth == "head":
            return feature_batches(
                self.embeddings(examples.texts, on_progress),
                examples.labels,
                examples.units,
                self.frame,
                self.runtime.device,
            )
        model = self.model
        if not isinstance(model, EncoderModel):
            raise ModelError("depth and model do not fit")
        tokens = self.encoder.tokenize(examples.texts)
        prefix = None
        if model.frozen_layers:
            precision = self.runtime.precision
            name = key(self._digest, self.plan.task.max_tokens, model.frozen_layers, precision, examples.texts)
            prefix = self._cache.get(name, lambda: self._prefix(model, tokens, on_progress))
        return TokenBatches(
            encoder=self.encoder,
            tokens=tokens,
            prefix=prefix,
            labels=torch.from_numpy(examples.labels),
            units=examples.units,
            device=self.runtime.device,
        )

    def _prefix(
        self, model: EncoderModel, tokens: Tokens, on_progress: Callable[[int], None]
    ) -> np.ndarray[Any, np.dtype[np.float16]]:
        self._cache.require_room(len(tokens.ids) * self.encoder.hidden_size * 2)
        return prefix_states(model, tokens, self.runtime, on_progress)


class _Share:
    """Progress of one of several equal passes: all together count every record once."""

    def __init__(self, on_progress: Callable[[int], None], passes: int) -> None:
        self._on_progress, self._passes = on_progress, passes
        self._seen = 0

    def __call__(self, rows: int) -> None:
        before = self._seen // self._passes
        self._seen += rows
        self._on_progress(self._seen // self._passes - before)
