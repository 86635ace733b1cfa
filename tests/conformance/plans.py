"""Subjects of plans: what the product trains, against the same forward pass in fp64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accord_client.conformance import Indices
from accord_client.data import Examples
from accord_client.features import FeatureCache, TokenBatches
from accord_client.models import EncoderModel
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared.plan import Plan

TEXTS = (
    "where is my card",
    "my card was lost in the post two weeks ago and nobody answers",
    "top up failed",
    "what is the exchange rate for euros today, please",
    "cancel my transfer",
    "top up by cheque?",
)


class PlanSubject:
    """The trainable model of `plan` on a few texts, its weights moved off their start."""

    def __init__(self, plan: Plan, cache: Path, units: tuple[int, ...] | None = None) -> None:
        torch.manual_seed(5)
        examples = Examples(
            texts=TEXTS,
            labels=np.arange(len(TEXTS)) % len(plan.task.labels),
            units=np.asarray(units or range(len(TEXTS)), dtype=np.int64),
        )
        self.plan = plan
        self.workspace = Workspace(plan, FeatureCache(cache), Runtime())
        self.units = examples.units
        self.batches = self.workspace.batches(examples)
        self._model = self.workspace.model
        start = self._model.vector()
        self._model.load(start + 0.02 * np.random.default_rng(3).normal(size=len(start)).astype(np.float32))
        self.module = self._model.module
        self._exact: Any = copy.deepcopy(self._model)
        self._exact.module.double()
        self.exact_module: nn.Module = self._exact.module

    def loss(self, rows: Indices) -> Tensor:
        """As the trainer computes it."""
        labels = self.batches.labels[torch.from_numpy(rows)]
        scores = self._model.logits(self.batches.inputs(rows))
        return nn.functional.cross_entropy(scores, labels, reduction="sum")

    def exact_loss(self, rows: Indices) -> Tensor:
        """The same in fp64, written out again."""
        labels = self.batches.labels[torch.from_numpy(rows)]
        return nn.functional.cross_entropy(self._exact_scores(rows), labels, reduction="sum")

    def _exact_scores(self, rows: Indices) -> Tensor:
        inputs = self.batches.inputs(rows)
        if isinstance(inputs, Tensor):
            return self._exact.module(inputs.double())
        assert isinstance(self._exact, EncoderModel)
        assert isinstance(self.batches, TokenBatches)
        prefix = inputs.get("prefix")
        self._exact._prefix = None if prefix is None else prefix.double()
        hidden = self.exact_module.backbone(input_ids=inputs["ids"], attention_mask=inputs["mask"]).last_hidden_state
        weights = inputs["mask"].unsqueeze(-1).double()
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        names = self.workspace.frame.embeddings.double()
        center = nn.functional.normalize(names, dim=-1).mean(0)
        features = nn.functional.normalize(nn.functional.normalize(pooled, dim=-1) - center, dim=-1)
        return self.exact_module.head(features)


def save_tiny_bert(folder: Path, tokenizer_from: Path) -> Path:
    """A BERT of 3 layers and width 32 with random weights and a real tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(11)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return folder
