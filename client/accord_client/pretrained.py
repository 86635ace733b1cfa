"""A pretrained encoder read from its files: whole, the same every time, or refused in one line.

The loaders of transformers are lenient: a tensor that the files lack is drawn at random, one that does not fit is
passed over, a tokenizer without its vocabulary has five tokens. Each site would then train another model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accord_shared.errors import AccordError, ModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "1_Pooling/*.json")
"""What is taken of a model repository, and what its digest covers."""

PROBES = ("My card No. 12 was lost, please!", "Überweisung von 20 € fehlt")
"""Texts that a sound tokenizer reads as its `tokenizer.json` says."""

_LFS = b"version https://git-lfs.github.com/spec/"
_MOST_HEADER = 100_000_000
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_POOLER = "pooler"
_RELATIVE = frozenset({"bloom", "deberta", "deberta-v2", "funnel", "mpt", "xlnet"})
"""Model types without a table of positions: their `max_position_embeddings` limits nothing."""
_REFUSED = {
    "quantization_config": "quantized weights are not supported",
    "transformers_weights": "weights in a file of another name are not supported",
    "attn_implementation": "code from elsewhere is not run",
    "_attn_implementation": "code from elsewhere is not run",
}
"""Keys of a configuration, and why they are refused."""
_LEAST_SPARE_ROWS = 127
"""Embeddings are padded to multiples of up to 128 rows."""


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever a library raises becomes one line: they let errors of many kinds through, and Rust's panics too."""
    try:
        yield
    except (AccordError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(f"{what}: {reason or type(error).__name__}") from None


def read_table(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        ModelError: it cannot be read, is no JSON object, or has a key twice.
    """
    with told(f"{path} is not readable JSON"):
        return _table(path.read_bytes())


def _table(data: bytes) -> dict[str, Any]:
    value = json.loads(data, object_pairs_hook=_without_doubles)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values under one key every reader takes another."""
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return table


# --- the files


@dataclass(frozen=True)
class _Stored:
    """Tensors of the weight files: data type by name."""

    dtypes: dict[str, str]

    @staticmethod
    def of(folder: Path) -> _Stored:
        dtypes: dict[str, str] = {}
        for path in _weight_files(folder):
            for name, dtype in _header(path).items():
                if name in dtypes:
                    raise ModelError(f"{path} holds {name}, which another weight file holds too")
                dtypes[name] = dtype
        return _Stored(dtypes)


def _check_files(folder: Path) -> dict[str, Any]:
    """The configuration, if the files are what they seem to be."""
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        with told(f"{path} cannot be read"), path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ModelError(f"{path} is a Git LFS pointer, not the file itself: `git lfs pull` fetches it")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter: merge it into its model first, so that one digest covers both")
    config = read_table(folder / "config.json")
    for key, reason in _REFUSED.items():
        if config.get(key) is not None:
            raise ModelError(f"{folder / 'config.json'} has {key}: {reason}")
    return config


def _weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    places = read_table(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{index} names no shards")
    files = []
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}, which is no safetensors file of the folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing: {index.name} names it")
        files.append(folder / name)
    return files


def _header(path: Path) -> dict[str, str]:
    """Data types of the tensors of a safetensors file, by name; the file has the length that its header tells."""
    with told(f"{path} is no safetensors file, or damaged"), path.open("rb") as file:
        size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise ValueError(f"a header of {length} bytes in {size}")
        table = _table(file.read(length))
        table.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in table.values()), default=0)
        if size != end:
            raise ValueError(f"{size} bytes, its header tells of {end}")
        return {name: str(tensor["dtype"]) for name, tensor in table.items()}


# --- weights


def read_model(folder: Path, *, twice: bool) -> nn.Module:
    """The model in fp32, dropout off; `twice` reads it again from another random state, which must change nothing.

    Raises:
        ModelError: files are missing or damaged, the weights are not those of the configuration, are not finite, or
            the architecture is not supported.
    """
    config, stored = _check_files(folder), _Stored.of(folder)
    wanted = _known_config(folder, config)
    model = _loaded(folder, wanted, stored, seed=1)
    if not twice:
        return model
    before = _fingerprint(model)
    del model  # a large one need not fit twice
    model = _loaded(folder, wanted, stored, seed=2)
    if _fingerprint(model) != before:
        raise ModelError(f"{folder}: reading it twice gives two models: a part of it is random")
    return model


def _known_config(folder: Path, config: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(f"{folder}: model_type {kind!r} is not known to transformers {__version__}")
    with _quiet(), told(f"cannot load {folder}"):
        wanted = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(wanted, "is_encoder_decoder", False):
        raise ModelError(f"{folder} is an encoder-decoder model ({kind}), which is not supported")
    return wanted


def _loaded(folder: Path, config: Any, stored: _Stored, *, seed: int) -> nn.Module:
    from transformers import AutoModel

    with _quiet(), torch.random.fork_rng(devices=[]), told(f"cannot load {folder}"):
        torch.manual_seed(seed)
        model, info = AutoModel.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, with their names
        )
    _check_names(folder, model, info, stored)
    _check_values(folder, model)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _check_names(folder: Path, model: Any, info: dict[str, Any], stored: _Stored) -> None:
    """The backbone's tensors are all there, once, and of its shape; what belongs to poolers and heads is nobody's."""
    expected, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ModelError(f"{folder}: {name} is {list(found)} in the weights and {list(wanted)} by config.json")
    missing = sorted(name for name in info["missing_keys"] if name.partition(".")[0] != _POOLER)
    if missing:
        elsewhere = next((name for name in stored.dtypes if name.endswith(f".{missing[0]}")), None)
        hint = f" (it is there as {elsewhere}: save the model without that prefix)" if elsewhere else ""
        raise ModelError(f"{folder}: {len(missing)} tensors are not in the weights, {missing[0]} for one{hint}")
    children = {name.partition(".")[0] for name in expected} - {_POOLER}
    for name in sorted(info["unexpected_keys"]):
        if name.removeprefix(prefix).partition(".")[0] in children or _ends_as(name, expected):
            raise ModelError(f"{folder}: the weights hold {name}, which the model of config.json does not have")
    parameters, seen = {name for name, _ in model.named_parameters()}, set[str]()
    for name, dtype in stored.dtypes.items():
        bare = _today(name.removeprefix(prefix))
        if bare in seen:
            raise ModelError(f"{folder}: the weights hold {bare} twice, once as {name}")
        seen.add(bare)
        if dtype not in _FLOATS and (bare.endswith("weight") or bare in parameters):
            raise ModelError(f"{folder}: {name} is of type {dtype}: quantized weights are not supported")


def _today(name: str) -> str:
    """A tensor's name, where old checkpoints have another one."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _ends_as(name: str, expected: set[str]) -> bool:
    """Whether it is a backbone's tensor under another prefix: which of two copies is meant, nobody can tell."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in expected for start in range(1, len(parts) - 2))


def _check_values(folder: Path, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.startswith(_POOLER):
            continue
        for own, parameter in module.named_parameters(name, recurse=False):
            if not bool(torch.isfinite(parameter).all()):
                raise ModelError(f"{folder}: {own} holds NaN or infinity")
            is_matrix = parameter.dim() > 1 and parameter.shape[0] > 1 and not isinstance(module, nn.Embedding)
            if is_matrix and not bool(parameter.any()):  # what a download that broke off has not filled
                raise ModelError(f"{folder}: {own} is zero throughout")


def _fingerprint(model: nn.Module) -> dict[str, int]:
    """A sum over the bits of every tensor but the pooler's, whose output nobody reads."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: _bits(tensor) for name, tensor in tensors if not name.startswith(_POOLER)}


def _bits(tensor: Tensor) -> int:
    flat = tensor.detach().reshape(-1)
    whole = torch.int32 if flat.element_size() == torch.int32.itemsize else torch.uint8
    return int(flat.view(whole).sum(dtype=torch.int64))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of its own: what matters of it is raised."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        theirs.set_verbosity(before)


# --- the tokenizer


def read_tokenizer(folder: Path, model: nn.Module) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be read, lacks its vocabulary or a padding token, is not the model's, or reads texts in
            another way than its files say.
    """
    from transformers import AutoTokenizer

    rows = _rows(folder, model)
    with _quiet(), told(f"cannot load the tokenizer of {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _check_vocabulary(folder, tokenizer, rows)
        _check_reading(folder, tokenizer)
    for table in _position_tables(model):
        own, other = tokenizer.pad_token_id, table.padding_idx
        if other not in (None, own):  # positions are counted by which ids are padding
            raise ModelError(f"{folder}: the tokenizer's padding has id {own}, the model's {other}")
    return tokenizer


def _rows(folder: Path, model: Any) -> int:
    """Rows of the token embedding."""
    with told(f"{folder}: {type(model).__name__} has no embedding of tokens"):
        return int(model.get_input_embeddings().num_embeddings)


def _check_vocabulary(folder: Path, tokenizer: Any, rows: int) -> None:
    names = dict(type(tokenizer).vocab_files_names)
    for name in names.values():
        if (folder / name).exists() and not any(fnmatch(name, pattern) for pattern in MODEL_FILES):
            raise ModelError(f"the tokenizer in {folder} reads {name}, which no digest of a model covers")
    plain = [name for key, name in names.items() if key in ("vocab_file", "merges_file")]
    absent = [name for name in plain if not (folder / name).is_file()]
    if absent and not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no vocabulary: neither tokenizer.json nor {absent[0]}")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no padding token")
    ids = set(tokenizer.get_vocab().values()) | {tokenizer.pad_token_id}
    if min(ids) < 0 or max(ids) >= rows:
        wrong = max(ids) if max(ids) >= rows else min(ids)
        which = "its padding token" if wrong == tokenizer.pad_token_id else "a token"
        raise ModelError(f"the tokenizer in {folder}: {which} has id {wrong}, the model has {rows} embeddings")
    if rows - len(ids) > max(_LEAST_SPARE_ROWS, rows // 10):
        raise ModelError(f"the tokenizer in {folder} has {len(ids)} tokens, the model has {rows} embeddings")


def _check_reading(folder: Path, tokenizer: Any) -> None:
    """`tokenizer.json` decides: the class that `tokenizer_config.json` names may take it for another kind."""
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        return
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_padding()
    plain.no_truncation()
    for text in PROBES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != plain.encode(text, add_special_tokens=False).ids:
            kind = type(tokenizer).__name__
            raise ModelError(f"the tokenizer in {folder}: {kind} does not read texts as tokenizer.json says")
    vocabulary = plain.get_vocab(with_added_tokens=True)
    for name, tokens in _vocabularies(folder, type(plain.model).__name__):
        if any(vocabulary.get(token) != number for token, number in tokens.items()):
            raise ModelError(f"the tokenizer in {folder}: {name} and tokenizer.json are of different tokenizers")


def _vocabularies(folder: Path, kind: str) -> Iterator[tuple[str, dict[str, int]]]:
    """What stands beside `tokenizer.json`, where its form is that of the kind."""
    if kind == "WordPiece" and (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_bytes().decode().split("\n")
        yield "vocab.txt", {line.rstrip("\r"): number for number, line in enumerate(lines) if line.strip()}
    if kind == "BPE" and (folder / "vocab.json").is_file():
        yield "vocab.json", read_table(folder / "vocab.json")


# --- positions


def most_tokens(model: Any) -> int | None:
    """Most tokens that the model has positions for; None: any number.

    RoBERTa's kind keeps the rows up to its padding id for itself.
    """
    limits = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for table in _position_tables(model)
    ]
    named = getattr(model.config, "max_position_embeddings", None)
    if isinstance(named, int) and named > 0 and (limits or model.config.model_type not in _RELATIVE):
        limits.append(named)
    return min(limits, default=None)


def _position_tables(model: nn.Module) -> list[nn.Embedding]:
    names = ("wpe", "embed_positions", "position_embedding", "position_embeddings")
    modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    return [module for name, module in modules if isinstance(module, nn.Embedding) and name in names]
