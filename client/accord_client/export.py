"""The finished model on disk, loadable by plain transformers, peft and safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from accord_client.models import EncoderModel, pooling, verified
from accord_client.workspace import Workspace
from accord_shared.files import make_folder, write_atomic
from accord_shared.vectors import Vector

_LOAD_BACKBONE = {
    "head": "",
    "lora": "\nfrom peft import PeftModel; encoder = PeftModel.from_pretrained(encoder, folder)",
    "full": '\nencoder.load_state_dict(load_file(f"{folder}/encoder.safetensors"), strict=False)',
}

_README = """# A model that was trained with Accord

{text}

```python
import json, torch; from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
folder, base = ".", {base!r}  # the base model: a folder or a hub name
info, head = json.load(open(f"{{folder}}/accord.json")), load_file(f"{{folder}}/head.safetensors")
tokenizer, encoder = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base, dtype=torch.float32){backbone}
texts = [prompt.replace("{{}}", text) for text in ["Where is my card?"] for prompt in info["prompts"]]
batch = tokenizer(texts, truncation=True, max_length={tokens}, {padded})
hidden, mask = encoder(**batch{hidden}, batch["attention_mask"].unsqueeze(-1)
pooled = torch.nn.functional.normalize({pooled}, dim=-1).unflatten(0, (-1, len(info["prompts"]))).mean(1)
features = torch.nn.functional.normalize(pooled, dim=-1) - head["center"]
print([info["labels"][i] for i in (features @ head["weight"].T).argmax(-1)])
```
"""

_HIDDEN, _INNER = ").last_hidden_state", ", output_hidden_states=True).hidden_states[{}]"
_PADDED = 'padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False'
_POOLED = {"mean": "(hidden * mask).sum(1) / mask.sum(1)", "cls": "hidden[:, 0]"}


def export_model(workspace: Workspace, weights: Vector, folder: Path, facts: dict[str, Any]) -> None:
    """Write `folder` (`model/`): head, adapter or encoder tensors, labels, facts of the run, a README.

    `facts` are public: plan hash, both epsilons, metrics.

    Raises:
        OutputError: the folder cannot be written.
    """
    plan = workspace.plan
    make_folder(folder)
    tensors = workspace.model.layout.split(weights)
    head = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith("head.")}
    frame = workspace.frame
    center = frame.center if plan.adapter.features == "label-centered" else torch.zeros(1)
    write_atomic(folder / "head.safetensors", save({**_contiguous(head), "center": center.float().numpy()}))
    if plan.adapter.depth == "lora":
        _write_adapter(workspace, weights, folder)
    elif plan.adapter.depth == "full":
        prefix = "backbone."
        trained = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        write_atomic(folder / "encoder.safetensors", save(_contiguous(trained)))
    info = {
        "labels": list(plan.task.labels),
        "prompts": list(plan.task.prompts or ("{}",)),
        "max_tokens": plan.task.max_tokens,
        "base_model": plan.model.source,
        "base_digest": plan.model.digest,
        "tokenizer": plan.model.source,
        "plan_hash": plan.hash,
        "unit": plan.privacy_unit,
        "depth": plan.adapter.depth,
        **facts,
    }
    write_atomic(folder / "accord.json", json.dumps(info, indent=1, sort_keys=True).encode())
    write_atomic(folder / "plan.toml", plan.to_toml().encode())
    write_atomic(folder / "README.md", _readme(workspace, facts).encode())


def _contiguous(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in tensors.items()}


def _write_adapter(workspace: Workspace, weights: Vector, folder: Path) -> None:
    """peft's own two files, so that `PeftModel.from_pretrained` reads them."""
    from peft import get_peft_model_state_dict

    model = workspace.model
    if not isinstance(model, EncoderModel):
        return
    model.load(weights)
    backbone: Any = model.module.backbone
    state = {name: value.detach().float().cpu().numpy() for name, value in get_peft_model_state_dict(backbone).items()}
    state = {name.replace(".layer.layer.", ".layer."): value for name, value in state.items()}
    config = backbone.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"inference_mode": True, "base_model_name_or_path": workspace.plan.model.source}
    write_atomic(folder / "adapter_model.safetensors", save(state))
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=1, default=str).encode())


def _readme(workspace: Workspace, facts: dict[str, Any]) -> str:
    plan = workspace.plan
    kind, _, name = plan.model.source.partition(":")
    base = {"hub": name.partition("@")[0], "path": name}.get(kind, f"<folder of the package {name}>")
    epsilon = facts.get("epsilon")
    if epsilon is None:
        promise = "**Without differential privacy.**"
    else:
        promise = f"({epsilon:.3g}, {plan.privacy.delta:g})-differentially private, unit: {plan.privacy_unit}."
        if (twice := facts.get("epsilon_unit_at_two_sites")) is not None:
            promise += f" A unit with records at two sites: epsilon {twice:.3g}."
    return _README.format(
        text=f"{plan.run.name}: {len(plan.task.labels)} classes, depth `{plan.adapter.depth}`. {promise}",
        base=base,
        backbone=_LOAD_BACKBONE[plan.adapter.depth],
        hidden=_HIDDEN if plan.model.layer == -1 else _INNER.format(plan.model.layer),
        tokens=plan.task.max_tokens,
        padded=_PADDED,
        pooled=_POOLED[pooling(verified(plan.model))],
    )
