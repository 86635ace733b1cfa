"""Plain Flower with Opacus on the same records: what Accord's simulation is measured against.

Two `NumPyClient`s as Flower's and Opacus' examples have them, a fresh model and `make_private` in every message.
`plain` encodes its texts at every step with the frozen encoder. `caching` computes the embeddings of a
participant once in each actor process and rebuilds only head and privacy engine. Neither does any accounting, nor
evaluation: what Accord does of both is on Accord's bill alone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context, NDArrays, Parameters, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accord_client.data import Examples
from accord_shared.errors import Aborted

_SETTLE_S = 0.3


@dataclass(frozen=True)
class PeerTask:
    """What a peer's clients train: small, since it travels with every message."""

    folder: str
    """Holds a file of records for each participant."""
    model: str
    """Folder of the encoder."""
    max_tokens: int
    classes: int
    steps: int
    sampling_rate: float
    learning_rate: float
    clip_norm: float
    noise_multiplier: float

    def put_records(self, index: int, examples: Examples) -> None:
        """Write the records of participant `index`."""
        value = {"texts": examples.texts, "labels": examples.labels.tolist()}
        self._path(index).write_text(json.dumps(value))

    def records(self, index: int) -> tuple[list[str], Tensor]:
        """Texts and labels [n] of participant `index`."""
        value = json.loads(self._path(index).read_text())
        return value["texts"], torch.tensor(value["labels"])

    def _path(self, index: int) -> Path:
        return Path(self.folder) / f"{index:04d}.json"


class _FrozenEncoder(nn.Module):
    """A Hugging Face encoder with mean pooling whose weights do not move."""

    def __init__(self, task: PeerTask) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

        self._max_tokens = task.max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(task.model)
        self.backbone = AutoModel.from_pretrained(task.model).requires_grad_(False)

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return int(self.backbone.config.hidden_size)

    def forward(self, texts: list[str]) -> Tensor:
        """Unit-length embeddings [B, d], padded to the longest text of the batch."""
        if not texts:
            return torch.zeros(0, self.width)
        self.backbone.eval()  # Opacus wants training mode, the frozen encoder no dropout
        batch = self._tokenizer(texts, truncation=True, max_length=self._max_tokens, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = self.backbone(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


class _TextClassifier(nn.Module):
    """Frozen encoder and linear head over texts, which are named by their place."""

    def __init__(self, task: PeerTask, texts: list[str]) -> None:
        super().__init__()
        self._texts = texts
        self.encoder = _FrozenEncoder(task)
        self.head = nn.Linear(self.encoder.width, task.classes)

    def forward(self, places: Tensor) -> Tensor:
        """Class scores [B, classes] of the texts at `places` [B]."""
        scores: Tensor = self.head(self.encoder([self._texts[place] for place in places.tolist()]))
        return scores


class _PeerClient(NumPyClient):
    """Builds model and privacy engine, takes the round's steps, returns the head."""

    def __init__(self, task: PeerTask, model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        self._task, self._model = task, model
        self._data = TensorDataset(inputs, labels)

    def fit(self, parameters: NDArrays, config: dict[str, Any]) -> tuple[NDArrays, int, dict[str, Any]]:
        """One message."""
        del config
        _set_head(self._model, parameters)
        _private_steps(self._task, self._model, self._data)
        return _get_head(self._model), len(self._data), {}


def _private_steps(task: PeerTask, model: nn.Module, data: TensorDataset) -> None:
    from opacus import PrivacyEngine  # noqa: PLC0415

    model.train()
    loader = DataLoader(data, batch_size=max(1, round(task.sampling_rate * len(data))))
    private, optimizer, batches = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=task.learning_rate),
        data_loader=loader,
        noise_multiplier=task.noise_multiplier,
        max_grad_norm=task.clip_norm,
    )
    done = 0
    while done < task.steps:
        for inputs, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            if done == task.steps:
                break


def _head(model: nn.Module) -> nn.Linear:
    return next(module for name, module in model.named_modules() if name in ("", "head") and type(module) is nn.Linear)


def _set_head(model: nn.Module, parameters: NDArrays) -> None:
    with torch.no_grad():
        for parameter, value in zip(_head(model).parameters(), parameters, strict=True):
            parameter.copy_(torch.from_numpy(value))


def _get_head(model: nn.Module) -> NDArrays:
    return [parameter.detach().numpy() for parameter in _head(model).parameters()]


class _Idle(NumPyClient):
    """Answers the warm-up round: the actor has imported what it needs and is not measured for it."""

    def fit(self, parameters: NDArrays, config: dict[str, Any]) -> tuple[NDArrays, int, dict[str, Any]]:
        """Import, wait so that the other actors get their share of the messages, hand back."""
        del config
        import opacus  # noqa: F401, PLC0415
        import transformers  # noqa: F401, PLC0415

        time.sleep(_SETTLE_S)
        return parameters, 1, {}


class _Choosing(NumPyClient):
    """The idle client in the first round, the real one after it."""

    def __init__(self, factory: PeerClients, index: int) -> None:
        self._factory, self._index = factory, index

    def fit(self, parameters: NDArrays, config: dict[str, Any]) -> tuple[NDArrays, int, dict[str, Any]]:
        """One message."""
        client = _Idle() if config["round"] == 1 else self._factory.client(self._index)
        return client.fit(parameters, config)


_CACHE: dict[int, Tensor] = {}
_ENCODERS: dict[str, _FrozenEncoder] = {}


def _embeddings(task: PeerTask, index: int, texts: list[str]) -> Tensor:
    """Embeddings [n, d] of a participant, once per process."""
    if index not in _CACHE:
        if task.model not in _ENCODERS:
            _ENCODERS[task.model] = _FrozenEncoder(task)
        parts = [_ENCODERS[task.model](texts[start : start + 64]) for start in range(0, len(texts), 64)]
        _CACHE[index] = torch.cat(parts)
    return _CACHE[index]


@dataclass(frozen=True)
class PeerClients:
    """Flower's `client_fn`."""

    task: PeerTask
    caching: bool

    def __call__(self, context: Context) -> Client:
        """The client of the node that `context` names."""
        return _Choosing(self, int(context.node_config["partition-id"])).to_client()

    def client(self, index: int) -> NumPyClient:
        """A participant with model and records, built anew for a message."""
        texts, labels = self.task.records(index)
        if not self.caching:
            return _PeerClient(self.task, _TextClassifier(self.task, texts), torch.arange(len(texts)), labels)
        inputs = _embeddings(self.task, index, texts)
        return _PeerClient(self.task, nn.Linear(inputs.shape[1], self.task.classes), inputs, labels)


class _Timed(FedAvg):
    """FedAvg over all clients that notes when its rounds begin and end."""

    def __init__(self, participants: int, initial: Parameters) -> None:
        super().__init__(
            fraction_evaluate=0.0,
            min_fit_clients=participants,
            min_available_clients=participants,
            initial_parameters=initial,
            on_fit_config_fn=lambda number: {"round": number},
            accept_failures=False,
        )
        self.begins: list[float] = []
        self.ends: list[float] = []

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
        """Requests of a round."""
        self.begins.append(time.monotonic())
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Replies of a round.

        Raises:
            Aborted: a client failed, so that the time would be that of less work.
        """
        if failures:
            raise Aborted(f"a peer's client failed: {failures[0]}")
        combined = super().aggregate_fit(server_round, results, failures)
        self.ends.append(time.monotonic())
        return combined


def run_peer(clients: PeerClients, participants: int, rounds: int, width: int, ray: dict[str, Any]) -> float:
    """Client rounds per second over `rounds` rounds, after a round that only imports.

    Raises:
        Aborted: Flower or a client failed.
    """
    from flwr.simulation import run_simulation  # noqa: PLC0415

    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    start = [np.zeros((clients.task.classes, width), np.float32), np.zeros(clients.task.classes, np.float32)]
    strategy = _Timed(participants, ndarrays_to_parameters(start))
    parts = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds + 1))
    with _quiet():
        run_simulation(
            server_app=ServerApp(server_fn=lambda _: parts),
            client_app=ClientApp(client_fn=clients),
            num_supernodes=participants,
            backend_config=ray,
        )
    if len(strategy.ends) != rounds + 1:
        raise Aborted(f"the peer finished {len(strategy.ends)} of {rounds + 1} rounds")
    return participants * rounds / (strategy.ends[-1] - strategy.begins[1])


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
