"""Pretrained encoders and what of them is trained, as one flat vector.

Weights come from a Python package that carries them, a local folder or the Hugging Face hub; only
safetensors are read and no code from a model repository is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accord_client.pretrained import MODEL_FILES, PROBES, most_tokens, read_model, read_table, read_tokenizer, told
from accord_client.shapes import DUMMY, Shape
from accord_shared.errors import DataError, ModelError, PlanError
from accord_shared.files import sha256_file
from accord_shared.plan import AdapterSpec, ModelSpec, Plan
from accord_shared.vectors import Layout, Vector

PROBE_TOKENS = 48
"""Up to here a probe text is embedded beside longer ones."""
_LOADING = threading.RLock()
"""Libraries import their own parts and load models by state of the whole process: one thread at a time."""
SAME = 1e-3
"""Relative difference of two embeddings of one text that rounding explains."""


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
        with told(f"no model at {name}"):
            root = Path(name).expanduser()
    with told(f"no model in {root}"):
        found = sorted(root.glob("config.json")) or _parts(root)
    if not found:
        raise ModelError(f"no model in {root}: config.json is missing")
    return found[0].parent


def _parts(root: Path) -> list[Path]:
    """A model in a folder of `root`, as packages have it; beside it there may be configurations of its pooling."""
    found = [path for path in sorted(root.glob("*/config.json")) if not path.parent.name.endswith("_Pooling")]
    if len(found) > 1:
        raise ModelError(f"{len(found)} models in {root}: name the folder of one, {found[0].parent} for instance")
    if found and pooling(root) != pooling(found[0].parent):
        raise ModelError(f"{root / '1_Pooling'} is not in the model's own folder, {found[0].parent}: move it there")
    return found


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    with told(f"cannot get {repository} at {revision} from the hub"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(MODEL_FILES)))


def digest(folder: Path) -> str:
    """`sha256:…` over the names and contents of the model's files.

    Raises:
        ModelError: one cannot be read, or there are no safetensors weights.
    """
    with told(f"the model in {folder} cannot be read"):
        files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
        stats = [path.stat() for path in files]
        seen = tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in stats)
        return _digest(folder, tuple(files), seen)


@lru_cache(maxsize=16)
def _digest(folder: Path, files: tuple[Path, ...], _seen: tuple[tuple[int, ...], ...]) -> str:
    """Computed again as soon as a file has changed."""
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


_SOUND: set[tuple[str, int, int]] = set()
"""(digest, max_tokens, layer) of encoders that this process has found to be sound."""


class Encoder:
    """A Hugging Face encoder with its tokenizer and pooling; deterministic (dropout off).

    Raises:
        ModelError: the model is damaged, incomplete, of an architecture that is not supported, or does not embed a text
            by that text alone.
        PlanError: it has fewer positions than `max_tokens`, or fewer layers than `layer` needs.
    """

    def __init__(self, folder: Path, max_tokens: int, layer: int = -1) -> None:
        with _LOADING:
            self._load(folder, max_tokens, layer)

    def _load(self, folder: Path, max_tokens: int, layer: int) -> None:
        key = (digest(folder), max_tokens, layer)
        self.pooling = pooling(folder)
        self.model: nn.Module = read_model(folder, twice=key not in _SOUND)
        self.tokenizer = read_tokenizer(folder, self.model)
        self.max_tokens = max_tokens
        limit = most_tokens(self.model)
        if limit is not None and max_tokens > limit:
            raise PlanError(f"task.max_tokens = {max_tokens} is more than the model's {limit}")
        before = self._hidden_states(layer, folder) if layer != -1 and key not in _SOUND else None
        if layer != -1:
            self._drop_layers(layer)
        if key not in _SOUND:
            self._check(folder, before)
            _SOUND.add(key)

    @property
    def hidden_size(self) -> int:
        """Width of the pooled embedding."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def _drop_layers(self, layer: int) -> None:
        """Leave out the layers above the pooled one: nobody needs what they would compute."""
        layers = self.layers()
        if -layer > len(layers):
            raise PlanError(f"model.layer = {layer}: the model has {len(layers)} layers")
        del layers[layer + 1 :]
        self.model.config.num_hidden_layers = len(layers)  # type: ignore[union-attr]

    def _check(self, folder: Path, before: Tensor | None) -> None:
        """The embedding of a text depends on that text alone, and is the layer's that exported models read.

        A batch whose rows mix has no bound on what one record changes.
        """
        name = type(self.model).__name__
        with told(f"{folder}: {name} cannot embed a text"):
            texts = ("a", *PROBES)
            alone = torch.cat([self._embedded((text,), PROBE_TOKENS) for text in texts])
            beside = self._embedded((*texts, " ".join(PROBES) * PROBE_TOKENS), PROBE_TOKENS)[: len(texts)]
            self._embedded((" ".join(PROBES) * self.max_tokens,), self.max_tokens)
        if alone.shape[1] != self.hidden_size or not bool(torch.isfinite(alone).all()):
            raise ModelError(f"{folder}: the embeddings of {name} are not {self.hidden_size} finite numbers")
        if _differ(alone, beside):
            raise ModelError(f"{folder}: {name} is not supported: it embeds a text in another way beside longer ones")
        if before is not None and _differ(alone[1:], before):
            raise ModelError(f"{folder}: model.layer is not supported for {name}: its last layer is treated apart")

    def _embedded(self, texts: Sequence[str], most: int) -> Tensor:
        """Embeddings [n, d] of the first `most` tokens of the texts, in one batch."""
        with torch.inference_mode():
            ids, mask = self.pad(self.tokenize(texts, min(most, self.max_tokens)), range(len(texts)))
            return self.pool(self.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    def _hidden_states(self, layer: int, folder: Path) -> Tensor:
        """Embeddings [n, d] of the probe texts from a hidden state of the whole model."""
        with torch.inference_mode(), told(f"{folder}: {type(self.model).__name__} does not show its hidden states"):
            ids, mask = self.pad(self.tokenize(PROBES, min(PROBE_TOKENS, self.max_tokens)), range(len(PROBES)))
            states = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            if -layer > len(states):
                raise PlanError(f"model.layer = {layer}: the model has {len(states)} hidden states")
            return self.pool(states[layer], mask)

    def tokenize(self, texts: Sequence[str], most: int | None = None) -> Tokens:
        """Token ids with special tokens, cut at `most` (`max_tokens`).

        Raises:
            DataError: a text has no token, so that there is nothing to embed.
        """
        encoded = self.tokenizer(list(texts), truncation=True, max_length=most or self.max_tokens)["input_ids"]
        if empty := sum(not ids for ids in encoded):
            raise DataError(f"{empty} of {len(texts)} texts have no token in the model's vocabulary")
        ends = np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
        return Tokens(ids=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]), ends=ends)

    def pad(self, tokens: Tokens, rows: Sequence[int], shape: Shape | None = None) -> tuple[Tensor, Tensor]:
        """(ids, attention mask), both [B, T] int64, padded to `shape`, or to the longest of the rows."""
        sequences = [tokens.row(row) if row >= 0 else self._stand_in(row, shape or Shape()) for row in rows]
        width = shape.width if shape is not None else max(len(sequence) for sequence in sequences)
        ids = np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for place, sequence in enumerate(sequences):
            ids[place, : len(sequence)] = sequence
            mask[place, : len(sequence)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def _stand_in(self, row: int, shape: Shape) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token ids [t] of a dummy, which is short where the shape has padding, or of a probe."""
        length = shape.width if shape.full else 1 if row == DUMMY else max(1, shape.width + row)
        if row == DUMMY:
            return np.full(length, self.tokenizer.pad_token_id, dtype=np.int64)
        vocabulary = int(self.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        return np.random.default_rng(-row).integers(0, vocabulary, length)  # made up, and the same everywhere

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


def _differ(one: Tensor, other: Tensor) -> bool:
    """Of embeddings [n, d] of the same texts."""
    return bool(((one - other).norm(dim=1) > SAME * other.norm(dim=1)).any())


def pooling(folder: Path) -> str:
    """How a sentence-transformers model pools its tokens: `mean`, or `cls`.

    Raises:
        ModelError: in another way.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return "mean"
    config = read_table(path)
    prefix = "pooling_mode_"
    modes = [name.removeprefix(prefix) for name, on in config.items() if name.startswith(prefix) and on]
    named = config.get("pooling_mode", modes or "mean")
    wanted = [named] if isinstance(named, str) else named
    known = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    if len(wanted) != 1 or wanted[0] not in known:
        raise ModelError(f"{path} asks for pooling by {' and '.join(map(str, wanted))}: mean or cls are supported")
    return known[wanted[0]]


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

    With the first `frozen_layers` layers frozen their output is taken from `inputs["prefix"]` where given: the layer
    before the first trained one hands it in, the ones before that pass through.
    """

    def __init__(self, encoder: Encoder, frame: LabelFrame, plan: Plan, device: str) -> None:
        self.encoder = encoder
        self.frame = frame
        with _LOADING:
            backbone = _adapted(encoder, plan)
        self.module: nn.Module = _Classifier(backbone, frame).to(device)
        self.layout = _layout(self.module)
        self._prefix: Tensor | None = None
        self._device = device
        self.frozen_layers = self._feed_prefix(frozen_prefix(encoder, plan.adapter))

    def _feed_prefix(self, frozen: int) -> int:
        """Let the frozen layers hand in a cached prefix; 0 where the architecture's layers cannot, so that all run."""
        layers = self.encoder.layers()
        whole = list(layers[:frozen])
        for index, layer in enumerate(whole):
            layers[index] = _Hand(layer, self, last=index == frozen - 1)
        if not frozen or self._prefix_fits(frozen):
            return frozen
        for index, layer in enumerate(whole):
            layers[index] = layer
        return 0

    def _prefix_fits(self, frozen: int) -> bool:
        """Whether a prefix that is handed in gives the scores that the whole model gives."""
        encoder, seen = self.encoder, list[Any]()
        ids, mask = (part.to(self._device) for part in encoder.pad(encoder.tokenize(PROBES), range(len(PROBES))))
        inputs = {"ids": ids, "mask": mask}
        handle = encoder.layers()[frozen - 1].register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            with torch.inference_mode():
                expected = self.logits(inputs)
                return not _differ(self.logits(inputs | {"prefix": seen[0]}), expected)
        except Exception:  # tuples, attributes that the model asks its layers for, and whatever else there is
            return False
        finally:
            handle.remove()
            self._prefix = None

    def load(self, vector: Vector) -> None:
        """Set the trainable tensors from `vector` [P]."""
        _load(self.module, vector)

    def vector(self) -> Vector:
        """The trainable tensors as one vector [P]."""
        return _vector(self.module)

    def logits(self, inputs: Tensor | dict[str, Tensor]) -> Tensor:
        """Class scores [B, classes] of `ids` and `mask` [B, T] and, with `frozen_layers`, `prefix` [B, T, d]."""
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
