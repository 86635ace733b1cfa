"""Pretrained encoders and what of them is trained, as one flat vector.

Weights come from a Python package that carries them, a local folder or the Hugging Face hub; only
safetensors are read and no code from a model repository is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accord_shared.errors import ModelError, PlanError
from accord_shared.files import sha256_file
from accord_shared.plan import AdapterSpec, ModelSpec, Plan
from accord_shared.vectors import Layout, Vector

MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "1_Pooling/*.json")
"""What is taken of a model repository, and what its digest covers."""


def locate(source: str) -> Path:
    """The folder that holds `config.json` of a model source; a hub model is downloaded or taken from the cache.

    Raises:
        ModelError: the package, folder or hub model is not there.
    """
    kind, _, name = source.partition(":")
    if kind == "hub":
        return _download(name)
    if kind == "package":
        spec = importlib.util.find_spec(name)  # finds without importing: no code of the package runs
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"the model package {name} is not installed: pip install {name.replace('_', '-')}")
        root = Path(spec.submodule_search_locations[0])
    else:
        root = Path(name).expanduser()
    found = sorted(root.glob("config.json")) or sorted(root.glob("*/config.json"))
    if not found:
        raise ModelError(f"no model in {root}: config.json is missing")
    return found[0].parent


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(f"cannot get {repository} at {revision} from the hub: {reason}") from None


@lru_cache(maxsize=16)
def digest(folder: Path) -> str:
    """`sha256:…` over the names and contents of the model's files."""
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(f"no safetensors weights in {folder}: other formats can run code and are refused")
    listing = [(path.relative_to(folder).as_posix(), sha256_file(path)) for path in files]
    return "sha256:" + hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def verified(spec: ModelSpec) -> Path:
    """The folder of the plan's model, checked against the plan's digest where it names one.

    Raises:
        ModelError: absent, or its digest is another.
    """
    folder = locate(spec.source)
    if spec.digest is not None and digest(folder) != spec.digest:
        raise ModelError(f"{spec.source} is not the model of the plan: {digest(folder)} is not {spec.digest}")
    return folder


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts, ragged: text i holds `ids[ends[i-1]:ends[i]]`."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    ends: np.ndarray[Any, np.dtype[np.int64]]

    def row(self, index: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token ids [t] of one text."""
        start = self.ends[index - 1] if index else 0
        return self.ids[start : self.ends[index]]

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Number of tokens [n] of each text."""
        return np.diff(self.ends, prepend=0)


class Encoder:
    """A Hugging Face encoder with its tokenizer and pooling; deterministic (dropout off)."""

    def __init__(self, folder: Path, max_tokens: int, layer: int = -1) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self.model: nn.Module = AutoModel.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"cannot load {folder}: {str(error).splitlines()[0][:200]}") from None
        limit = getattr(self.model.config, "max_position_embeddings", max_tokens)
        if max_tokens > limit:
            raise PlanError(f"task.max_tokens = {max_tokens} is more than the model's {limit}")
        if any(bool(torch.isnan(p).any()) for p in self.model.parameters()):
            raise ModelError(f"the weights in {folder} hold NaN")
        if self.tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer in {folder} has no padding token")
        if layer != -1:
            self._drop_layers(layer)
        self.max_tokens = max_tokens
        self.pooling = pooling(folder)
        self.model.eval().requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        """Width of the pooled embedding."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def _drop_layers(self, layer: int) -> None:
        """Leave out the layers above the pooled one: nobody needs what they would compute."""
        layers = self.layers()
        if -layer >= len(layers):
            raise PlanError(f"model.layer = {layer}: the model has {len(layers)} layers")
        del layers[layer + 1 :]
        self.model.config.num_hidden_layers = len(layers)  # type: ignore[union-attr]

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids with special tokens, cut at `max_tokens`."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        ends = np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
        return Tokens(ids=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]), ends=ends)

    def pad(self, tokens: Tokens, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(ids, attention mask), both [B, T] int64, padded to the longest of the rows."""
        sequences = [tokens.row(row) for row in rows]
        width = max(len(sequence) for sequence in sequences)
        ids = np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for place, sequence in enumerate(sequences):
            ids[place, : len(sequence)] = sequence
            mask[place, : len(sequence)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """One vector [B, d] per text from hidden states [B, T, d]."""
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

    def layers(self) -> nn.ModuleList:
        """The transformer layers in order.

        Raises:
            ModelError: the architecture keeps them in another way.
        """
        depth = getattr(self.model.config, "num_hidden_layers", None)
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise ModelError(f"{type(self.model).__name__} has no plain list of layers")


def pooling(folder: Path) -> str:
    """How a sentence-transformers model pools its tokens: `mean`, or `cls`."""
    config = folder / "1_Pooling" / "config.json"
    if config.exists() and json.loads(config.read_text()).get("pooling_mode_cls_token"):
        return "cls"
    return "mean"


@dataclass(frozen=True)
class LabelFrame:
    """The public geometry of the label names: what features are centred on and heads start from.

    `embeddings` [classes, d] are the raw pooled embeddings of the label texts.
    """

    embeddings: Tensor
    spec: AdapterSpec

    def features(self, pooled: Tensor) -> Tensor:
        """Unit-length features [B, d] of pooled embeddings [B, d]: per record, so clipping stays per record."""
        if self.spec.features == "label-centered":
            pooled = nn.functional.normalize(pooled.float(), dim=-1) - self.center.to(pooled.device)
        return nn.functional.normalize(pooled.float(), dim=-1)

    @property
    def center(self) -> Tensor:
        """The mean [d] of the label names' unit embeddings: what features are centred on."""
        return nn.functional.normalize(self.embeddings.float(), dim=-1).mean(dim=0)

    def initial_head(self) -> Tensor:
        """Head weights [classes, d] to start from: the label names themselves, or zeros."""
        if self.spec.init == "zeros":
            return torch.zeros_like(self.embeddings)
        return self.spec.init_scale * self.features(self.embeddings)

    def head(self) -> nn.Linear:
        """A linear head at its public start. No bias: on unit features it would take half of the clip norm."""
        classes, width = self.embeddings.shape
        head = nn.Linear(width, classes, bias=False)
        with torch.no_grad():
            head.weight.copy_(self.initial_head())
        return head


class HeadModel:
    """A linear head over cached features: the encoder itself is not needed any more."""

    def __init__(self, frame: LabelFrame, device: str) -> None:
        self.module: nn.Module = frame.head().to(device)
        self.layout = _layout(self.module, prefix="head.")

    def load(self, vector: Vector) -> None:
        """Set the trainable tensors from `vector` [P]."""
        _load(self.module, vector)

    def vector(self) -> Vector:
        """The trainable tensors as one vector [P]."""
        return _vector(self.module)

    def logits(self, inputs: Tensor | dict[str, Tensor]) -> Tensor:
        """Class scores [B, classes] of features [B, d]."""
        scores: Tensor = self.module(inputs)
        return scores


class EncoderModel:
    """The encoder with LoRA pairs or all its layers trainable, and the linear head on top.

    With the first layers frozen their output is taken from `inputs["prefix"]` where given: the layer before
    the first trained one hands it in, the ones before that pass through.
    """

    def __init__(self, encoder: Encoder, frame: LabelFrame, plan: Plan, device: str) -> None:
        self.encoder = encoder
        self.frame = frame
        self.frozen_layers = frozen_prefix(encoder, plan.adapter)
        backbone = _adapted(encoder, plan)
        self.module: nn.Module = _Classifier(backbone, frame).to(device)
        self.layout = _layout(self.module)
        self._prefix: Tensor | None = None
        if self.frozen_layers:
            _feed_prefix(encoder.layers(), self.frozen_layers, self)

    def load(self, vector: Vector) -> None:
        """Set the trainable tensors from `vector` [P]."""
        _load(self.module, vector)

    def vector(self) -> Vector:
        """The trainable tensors as one vector [P]."""
        return _vector(self.module)

    def logits(self, inputs: Tensor | dict[str, Tensor]) -> Tensor:
        """Class scores [B, classes] of `ids` and `mask` [B, T] and, if layers are frozen, `prefix` [B, T, d]."""
        if not isinstance(inputs, dict):
            raise ModelError("an encoder reads token ids, not features")
        self._prefix = inputs.get("prefix")
        module = self.module
        hidden = module.backbone(input_ids=inputs["ids"], attention_mask=inputs["mask"])  # type: ignore[operator]
        pooled = self.encoder.pool(hidden.last_hidden_state, inputs["mask"])
        scores: Tensor = module.head(self.frame.features(pooled))  # type: ignore[operator]
        return scores

    def prefix(self) -> Tensor | None:
        """The frozen layers' output [B, T, d] for the batch at hand, if it was given."""
        return self._prefix


class _Classifier(nn.Module):
    """Backbone and head side by side, so that names and order of the trainable tensors are plain."""

    def __init__(self, backbone: nn.Module, frame: LabelFrame) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = frame.head()


def frozen_prefix(encoder: Encoder, spec: AdapterSpec) -> int:
    """How many layers from the bottom are frozen and can be computed once per text.

    Raises:
        PlanError: more layers are to be trained than there are.
    """
    if spec.layers == "all":
        return 0
    wanted, total = int(spec.layers.removeprefix("last:")), len(encoder.layers())
    if wanted > total:
        raise PlanError(f'adapter.layers = "{spec.layers}": the model has {total} layers')
    return total - wanted


def _adapted(encoder: Encoder, plan: Plan) -> nn.Module:
    frozen = frozen_prefix(encoder, plan.adapter)
    if plan.adapter.depth == "lora":
        return _with_lora(encoder, plan, frozen)
    for layer in encoder.layers()[frozen:]:
        layer.requires_grad_(True)
    return encoder.model


def _with_lora(encoder: Encoder, plan: Plan, frozen: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    spec = plan.adapter
    config = LoraConfig(
        r=spec.rank or 8,
        lora_alpha=spec.alpha or 16.0,  # type: ignore[arg-type, unused-ignore]
        target_modules=list(spec.targets or ()),
        layers_to_transform=list(range(frozen, len(encoder.layers()))),
        lora_dropout=0.0,
        bias="none",
    )
    try:
        with warnings.catch_warnings():  # peft still asks transformers by an old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            backbone: nn.Module = get_peft_model(encoder.model, config)  # type: ignore[arg-type, unused-ignore]
    except ValueError as error:
        raise PlanError(f"adapter.targets = {list(spec.targets or ())}: {str(error)[:150]}") from None
    _public_start(backbone, plan.run.seed, freeze_a=bool(spec.freeze_a))
    return backbone.eval()


def _public_start(backbone: nn.Module, seed: int, *, freeze_a: bool) -> None:
    """A uniform as in `nn.Linear` and B zero, from the plan's public seed: equal at every site."""
    generator = np.random.default_rng([seed, 0xA0])  # public, so that sites agree; never used for noise
    for name, parameter in backbone.named_parameters():
        if ".lora_A." in name:
            bound = 1.0 / np.sqrt(parameter.shape[1])
            start = generator.uniform(-bound, bound, size=tuple(parameter.shape)).astype(np.float32)
            parameter.data.copy_(torch.from_numpy(start))
            parameter.requires_grad_(not freeze_a)


class _Hand(nn.Module):
    """Stands for a frozen layer: hands in the cached prefix, or runs the layer when there is none."""

    def __init__(self, layer: nn.Module, owner: EncoderModel, *, last: bool) -> None:
        super().__init__()
        self.layer = layer
        self._owner = [owner]  # in a list: a module would register what it is assigned
        self._last = last

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefix = self._owner[0].prefix()
        if prefix is None:
            return self.layer(hidden, *args, **kwargs)
        return prefix.to(hidden.dtype) if self._last else hidden


def _feed_prefix(layers: nn.ModuleList, frozen: int, owner: EncoderModel) -> None:
    for index in range(frozen):
        layers[index] = _Hand(layers[index], owner, last=index == frozen - 1)


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _layout(module: nn.Module, prefix: str = "") -> Layout:
    named = _trainable(module)
    return Layout(
        names=tuple(prefix + name for name, _ in named),
        shapes=tuple(tuple(parameter.shape) for _, parameter in named),
    )


def _load(module: nn.Module, vector: Vector) -> None:
    parameters = [parameter for _, parameter in _trainable(module)]  # a vector off the wire is read-only
    parts = torch.split(torch.from_numpy(np.array(vector)), [parameter.numel() for parameter in parameters])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))


def _vector(module: nn.Module) -> Vector:
    parts = [parameter.detach().float().reshape(-1) for _, parameter in _trainable(module)]
    flat: Vector = torch.cat(parts).cpu().numpy().copy()
    return flat
