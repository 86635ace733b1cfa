"""Tiny pretrained models, sound ones and ones that are broken, named after what is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TEXTS = tuple(f"my card number {i} was lost please help with the loan and payment today" for i in range(200))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VOCABULARY = 400
Tensors = dict[str, torch.Tensor]


def tokenizer(**special: str) -> Any:
    """Byte-level BPE of 400 tokens, with RoBERTa's special tokens or those of `special` alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = list(dict.fromkeys(special.values())) or ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=names, initial_alphabet=alphabet)
    plain.train_from_iterator(TEXTS, trainer)
    if not special:
        plain.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        special = {
            "cls_token": "<s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        }
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def roberta_config() -> Any:
    from transformers import RobertaConfig

    return RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=34, pad_token_id=1, **SMALL)


def model(name: str) -> Any:
    """A model with random weights."""
    import transformers as t

    config = {"vocab_size": VOCABULARY, "pad_token_id": 1}
    gpt2 = t.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    made: dict[str, Callable[[], Any]] = {
        "roberta": lambda: t.RobertaModel(roberta_config()),
        "roberta_mlm": lambda: t.RobertaForMaskedLM(roberta_config()),
        "roberta_cls": lambda: t.RobertaForSequenceClassification(roberta_config()),
        "bert": lambda: t.BertModel(t.BertConfig(**config, max_position_embeddings=40, **SMALL)),
        "bert_mlm": lambda: t.BertForPreTraining(t.BertConfig(**config, max_position_embeddings=40, **SMALL)),
        "gpt2_padeos": lambda: t.GPT2Model(gpt2),
        "gpt2_lm": lambda: t.GPT2LMHeadModel(gpt2),
        "distilbert": lambda: t.DistilBertForMaskedLM(
            t.DistilBertConfig(**config, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64)
        ),
        "albert": lambda: t.AlbertModel(
            t.AlbertConfig(**config, embedding_size=16, max_position_embeddings=64, **SMALL)
        ),
        "mpnet": lambda: t.MPNetModel(t.MPNetConfig(**config, max_position_embeddings=34, **SMALL)),
        "llama": lambda: t.LlamaModel(
            t.LlamaConfig(**config, max_position_embeddings=64, num_key_value_heads=1, **SMALL)
        ),
        "llama_lm": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**config, max_position_embeddings=64, num_key_value_heads=1, **SMALL)
        ),
        "modernbert": lambda: t.ModernBertModel(
            t.ModernBertConfig(**config, cls_token_id=0, sep_token_id=2, max_position_embeddings=64, **SMALL)
        ),
        "deberta": lambda: t.DebertaV2Model(
            t.DebertaV2Config(
                **config,
                max_position_embeddings=64,
                relative_attention=True,
                position_biased_input=False,
                pos_att_type=["p2c", "c2p"],
                **SMALL,
            )
        ),
        "fnet": lambda: t.FNetModel(
            t.FNetConfig(
                **config,
                hidden_size=32,
                num_hidden_layers=2,
                intermediate_size=64,
                max_position_embeddings=64,
                tpu_short_seq_length=64,
            )
        ),
        "t5": lambda: t.T5Model(t.T5Config(**config, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)),
        "t5_encoder": lambda: t.T5EncoderModel(
            t.T5Config(**config, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        ),
        "vit": lambda: t.ViTModel(t.ViTConfig(image_size=32, patch_size=16, **SMALL)),
    }
    torch.manual_seed(3)
    return made[name]()


SOUND = (
    "roberta",
    "roberta_mlm",
    "roberta_cls",
    "bert",
    "bert_mlm",
    "gpt2_padeos",
    "gpt2_lm",
    "distilbert",
    "albert",
    "mpnet",
    "llama",
    "llama_lm",
    "modernbert",
    "deberta",
)
UNSUPPORTED = {
    "fnet": "FNetModel is not supported: it embeds a text in another way beside longer ones",
    "t5": "encoder-decoder model (t5)",
    "t5_encoder": "tensors are not in the weights, decoder.",
    "vit": "has no embedding of tokens",
}


def save(name: str, folder: Path, **options: Any) -> Path:
    """A model and its tokenizer."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} if name.startswith("gpt2") else {}
    made = model(name)
    if options.pop("bf16", False):
        made = made.bfloat16()
    made.save_pretrained(folder, **options)
    tokenizer(**special).save_pretrained(folder)
    return folder


# --- broken in one way


def edit(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; None removes one."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def weights(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        changed = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
        save_file(changed, path, metadata={"format": "pt"})

    return apply


def each(change: Callable[[str, torch.Tensor], torch.Tensor], part: str) -> Callable[[Path], None]:
    """Change the tensors whose name contains `part`."""
    return weights(lambda all_: {n: change(n, tensor) if part in n else tensor for n, tensor in all_.items()})


def without(part: str) -> Callable[[Path], None]:
    return weights(lambda all_: {name: tensor for name, tensor in all_.items() if part not in name})


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    return weights(lambda all_: {rename(name): tensor for name, tensor in all_.items()})


def also(name_of: Callable[[str], str], part: str) -> Callable[[Path], None]:
    """Other values of some tensors under further names."""
    return weights(lambda all_: all_ | {name_of(n): tensor + 1 for n, tensor in all_.items() if part in n})


def content(name: str, data: bytes | str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return apply


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: content(name, change((folder / name).read_bytes()))(folder)


def remove(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def looped(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)

    return apply


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def header(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Change the JSON at the beginning of the weights."""

    def apply(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        changed = change(data[8 : 8 + length].decode()).encode()
        return len(changed).to_bytes(8, "little") + changed + data[8 + length :]

    return bytes_of("model.safetensors", apply)


def doubled(text: str) -> str:
    """A JSON object whose first key appears twice."""
    key, value = next(item for item in json.loads(text).items() if item[0] != "__metadata__")
    return f"{{{json.dumps(key)}: {json.dumps(value)}, {text.lstrip()[1:]}"


def added_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())["added_tokens"]
    edit(path, added_tokens=[*tokens, {**tokens[0], "id": VOCABULARY, "content": "<new>"}])


def new_kind_of_bpe(folder: Path) -> None:
    kind = json.loads((folder / "tokenizer.json").read_text())["model"] | {"type": "NewBPE", "new": 1}
    edit(folder / "tokenizer.json", model=kind)


def far_id(folder: Path) -> None:
    kind = json.loads((folder / "tokenizer.json").read_text())["model"]
    last = max(kind["vocab"], key=kind["vocab"].get)
    edit(folder / "tokenizer.json", model=kind | {"vocab": kind["vocab"] | {last: 5000}})


def adapter_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit_ = {"base_model_name_or_path": "somewhere/else", "peft_type": "LORA"}
    content("adapter_config.json", json.dumps(edit_))(folder)
    save_file({"base_model.model.query.lora_A.weight": torch.zeros(2, 32)}, folder / "adapter_model.safetensors")


def tokenizer_class(name: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class=name)


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def place(where: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Path], None]:
    """Change which shard each tensor is said to be in."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        edit(path, weight_map=where(json.loads(path.read_text())["weight_map"]))

    return apply


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def tensor_in_two_shards(folder: Path) -> None:
    first, second = shards(folder)[:2]
    save_file(load_file(second) | {n: t + 1 for n, t in load_file(first).items()}, second, metadata={"format": "pt"})


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1\n"
QUERY, LAST = "layer.0.attention.self.query.weight", "encoder.layer.1."

STILL_SOUND: dict[str, Callable[[Path], None]] = {
    "prefixed": renamed(lambda name: f"roberta.{name}"),
    "without_pooler": without("pooler"),
    "old_names": renamed(lambda n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")),
    "fp64": each(lambda _, tensor: tensor.double(), ""),
    "fp16": each(lambda _, tensor: tensor.half(), ""),
    "cls_pooling": content("1_Pooling/config.json", '{"pooling_mode_cls_token": true}'),
    "mean_pooling": content("1_Pooling/config.json", '{"pooling_mode": "mean"}'),
}
"""Changes of `roberta` after which it loads."""

BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    # tensors
    "wrapped": (renamed(lambda name: f"module.{name}"), "it is there as module."),
    "nested": (renamed(lambda name: f"model.roberta.{name}"), "it is there as model.roberta."),
    "half_wrapped": (renamed(lambda n: f"module.{n}" if LAST in n else n), f"it is there as module.{LAST}"),
    "missing_layer": (without(LAST), f"16 tensors are not in the weights, {LAST}"),
    "missing_norm": (without("embeddings.LayerNorm.weight"), "embeddings.LayerNorm.weight"),
    "missing_bias": (without("layer.0.attention.self.query.bias"), "query.bias"),
    "more_layers": (config(num_hidden_layers=3), "not in the weights, encoder.layer.2."),
    "fewer_layers": (config(num_hidden_layers=1), f"the weights hold {LAST}"),
    "other_size": (config(vocab_size=VOCABULARY + 8), "is [400, 32] in the weights and [408, 32] by config.json"),
    "transposed": (each(lambda _, tensor: tensor.T, "intermediate.dense.weight"), "is [32, 64] in the weights"),
    "fewer_positions": (config(max_position_embeddings=20), "position_embeddings.weight is [34, 32]"),
    "two_copies": (also(lambda name: f"roberta.{name}", QUERY), "twice"),
    "two_names": (also(lambda name: name.replace("weight", "gamma"), "embeddings.LayerNorm.weight"), "twice"),
    "copy_in_wrapper": (also(lambda name: f"module.{name}", QUERY), f"the weights hold module.encoder.{QUERY}"),
    "infinity": (each(lambda _, tensor: tensor / 0, QUERY), "holds NaN or infinity"),
    "nan": (each(lambda _, tensor: tensor * float("nan"), "layer.0.output.dense.bias"), "holds NaN or infinity"),
    "beyond_fp32": (each(lambda _, tensor: tensor.double() * 1e60, QUERY), "holds NaN or infinity"),
    "zeros": (each(lambda _, tensor: tensor * 0, f"{LAST}output.dense.weight"), "is zero throughout"),
    "int8": (each(lambda _, tensor: (100 * tensor).to(torch.int8), QUERY), "is of type I8"),
    "fp8": (each(lambda _, tensor: tensor.to(torch.float8_e4m3fn), QUERY), "is of type F8_E4M3"),
    # files
    "pickle": (pickled, "no safetensors weights"),
    "lfs": (content("model.safetensors", LFS), "is a Git LFS pointer"),
    "lfs_tokenizer": (content("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer"),
    "cut_off": (bytes_of("model.safetensors", lambda data: data[: len(data) // 2]), "no safetensors file, or damaged"),
    "one_byte_short": (bytes_of("model.safetensors", lambda data: data[:-1]), "no safetensors file, or damaged"),
    "one_byte_long": (bytes_of("model.safetensors", lambda data: data + b"\0"), "no safetensors file, or damaged"),
    "no_bytes": (content("model.safetensors", b""), "no safetensors file, or damaged"),
    "noise": (content("model.safetensors", bytes(range(256)) * 9), "no safetensors file, or damaged"),
    "doubled_tensor": (header(doubled), "appears twice"),
    "no_weights": (remove("model.safetensors"), "no safetensors weights"),
    "other_name": (
        lambda folder: shutil.move(folder / "model.safetensors", folder / "weights.safetensors"),
        "has neither model.safetensors",
    ),
    "weights_in_a_loop": (looped("model.safetensors"), "cannot be read"),
    "file_in_a_loop": (looped("other.json"), "cannot be read"),
    "adapter_alone": (adapter_alone, "holds an adapter"),
    "adapter_beside": (content("adapter_config.json", '{"base_model_name_or_path": "a/b"}'), "holds an adapter"),
    # configuration
    "bad_json": (content("config.json", '{"model_type": "roberta",'), "config.json is not readable JSON"),
    "json_list": (content("config.json", "[]"), "config.json is not readable JSON"),
    "not_utf8": (content("config.json", b"\xff\xfe\x00"), "config.json is not readable JSON"),
    "doubled_key": (bytes_of("config.json", lambda data: doubled(data.decode()).encode()), "appears twice"),
    "new_type": (config(model_type="qwen99"), "model_type 'qwen99' is not known"),
    "no_type": (config(model_type=None), "model_type None is not known"),
    "code_of_its_own": (config(model_type="own", auto_map={"AutoModel": "m.M"}), "model_type 'own' is not known"),
    "bad_value": (config(num_attention_heads=3), "cannot load"),
    "bad_kind": (config(hidden_size="32"), "cannot load"),
    "bad_activation": (config(hidden_act="nothing"), "cannot load"),
    "pad_id_in_config": (config(pad_token_id=4000), "cannot load"),
    "other_pad_id": (config(pad_token_id=0), "the tokenizer's padding has id 1, the model's 0"),
    "quantized": (config(quantization_config={"quant_method": "bitsandbytes"}), "quantized weights"),
    "elsewhere": (config(transformers_weights="other.safetensors"), "another name"),
    "attention_code": (config(attn_implementation="somebody/attention"), "code from elsewhere"),
    "cross_attention": (config(is_decoder=True, add_cross_attention=True), "not in the weights"),
    "max_pooling": (content("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}'), "pooling by max_tokens"),
    "two_poolings": (
        content("1_Pooling/config.json", '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}'),
        "pooling by mean_tokens and cls_token",
    ),
    "bad_pooling": (content("1_Pooling/config.json", "{"), "is not readable JSON"),
    # tokenizer
    "no_tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "has no vocabulary"),
    "no_vocabulary": (both(tokenizer_class("XLMRobertaTokenizer"), remove("tokenizer.json")), "has no vocabulary"),
    "new_tokenizer": (new_kind_of_bpe, "cannot load the tokenizer"),
    "other_class": (tokenizer_class("BertTokenizer"), "BertTokenizer does not read texts as tokenizer.json says"),
    "other_kind": (tokenizer_class("XLMRobertaTokenizer"), "cannot load the tokenizer"),
    "bytes_class": (tokenizer_class("ByT5Tokenizer"), "ByT5Tokenizer does not read texts"),
    "empty_tokenizer": (content("tokenizer.json", "{}"), "cannot load the tokenizer"),
    "cut_tokenizer": (bytes_of("tokenizer.json", lambda data: data[:-40]), "cannot load the tokenizer"),
    "file_without_digest": (
        both(tokenizer_class("PhobertTokenizer"), content("vocab.txt", "a 1\nb 1\n"), content("bpe.codes", "a b 1\n")),
        "reads bpe.codes, which no digest of a model covers",
    ),
    "no_padding": (lambda f: edit(f / "tokenizer_config.json", pad_token=None), "has no padding token"),
    "pad_beyond": (lambda f: edit(f / "tokenizer_config.json", pad_token="[PAD]"), "its padding token has id 400"),
    "token_beyond": (added_token, "a token has id 400, the model has 400 embeddings"),
    "id_beyond": (far_id, "a token has id 5000"),
    "fewer_rows": (
        both(config(vocab_size=390), each(lambda _, tensor: tensor[:390], "word_embeddings")),
        "the model has 390 embeddings",
    ),
    "many_rows": (
        both(config(vocab_size=4000), each(lambda _, tensor: tensor.repeat(10, 1), "word_embeddings")),
        "has 400 tokens, the model has 4000 embeddings",
    ),
    "other_vocabulary": (content("vocab.json", '{"a": 1, "b": 0}'), "of different tokenizers"),
}
"""What is done to `roberta`, and words of its refusal."""

SHARDED: dict[str, tuple[Callable[[Path], None], str]] = {
    "absent_shard": (lambda folder: shards(folder)[1].unlink(), "is missing"),
    "unknown_shard": (place(lambda all_: all_ | {next(iter(all_)): "no.safetensors"}), "no.safetensors is missing"),
    "outside": (place(lambda all_: {n: f"../{name}" for n, name in all_.items()}), "no safetensors file of the folder"),
    "pickled_shard": (place(lambda all_: dict.fromkeys(all_, "a.bin")), "no safetensors file of the folder"),
    "unnamed_shard": (
        place(lambda all_: {n: name for n, name in all_.items() if "00002" not in name}),
        "tensors are not in the weights",
    ),
    "no_shards": (place(lambda _: {}), "names no shards"),
    "bad_index": (content("model.safetensors.index.json", "{"), "is not readable JSON"),
    "twice": (tensor_in_two_shards, "which another weight file holds too"),
    "cut_shard": (lambda folder: bytes_of(shards(folder)[2].name, lambda data: data[:-7])(folder), "damaged"),
}
"""The same to `roberta` in shards."""
