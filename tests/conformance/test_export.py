"""Item 13: what was trained moves, and the exported model's own README loads it to the same scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord_client.data import Examples
from accord_client.export import export_model
from accord_client.features import FeatureCache
from accord_client.trainer import Runtime, train
from accord_client.workspace import Workspace
from accord_shared.dp.noise import SecureGenerator
from conformance.plans import TEXTS, save_tiny_bert
from conftest import plan_of

ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"adapter.depth": "head"},
    "head-inner-layer": {"adapter.depth": "head", "model.layer": -2},
    "head-prompts": {"task.prompts": ["{}", "a customer asks: {}"]},
    "head-pooled": {"adapter.depth": "head", "adapter.features": "pooled"},
    "lora": {"adapter.depth": "lora", "adapter.rank": 4},
    "lora-last-1": {"adapter.depth": "lora", "adapter.rank": 4, "adapter.layers": "last:1"},
    "lora-freeze-a": {"adapter.depth": "lora", "adapter.freeze_a": True, "adapter.targets": ["query", "dense"]},
    "full": {"adapter.depth": "full"},
    "full-last-1": {"adapter.depth": "full", "adapter.layers": "last:1"},
}
# The README's one-liner leaves its file to the interpreter to close.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
PLAIN = {"privacy.noise": "none", "privacy.epsilon": None, "local.clip_norm": None, "local.learning_rate": 5.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"), model_folder)


def readme_code(folder: Path) -> str:
    """The README's lines, on all `TEXTS` where the README has one."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    code = code.replace('["Where is my card?"]', repr(list(TEXTS)))
    return str(code if "padding=True" in code else code.replace("truncation=True", "truncation=True, padding=True"))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_exported_model_scores_as_the_trained_one(
    adapter: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of({"model.source": f"path:{tiny}", **PLAIN, **ADAPTERS[adapter], "local.steps_per_round": 3})
    workspace = Workspace(plan, FeatureCache(tmp_path / "cache"), Runtime())
    examples = Examples(TEXTS, np.arange(len(TEXTS)) % 3, np.arange(len(TEXTS)))
    batches, start = workspace.batches(examples), workspace.initial()
    options: dict[str, Any] = {"noise_multiplier": 0.0, "generator": SecureGenerator(), "runtime": Runtime()}
    weights = start + train(workspace.model, batches, plan.local, start, **options).update
    moved = workspace.model.layout.split(weights - start)
    for name, change in moved.items():
        if "key.bias" in name:
            continue  # softmax does not see it
        assert np.abs(change).max() > 0, f"{name} did not move"

    export_model(workspace, weights, tmp_path / "model", {"epsilon": None})
    workspace.model.load(weights)
    rows = np.arange(len(TEXTS))
    with torch.no_grad():
        expected = workspace.model.logits(batches.inputs(rows))
        workspace.model.load(start)
        before = workspace.model.logits(batches.inputs(rows))
    assert float((expected - before).abs().max()) > 1e-3

    monkeypatch.chdir(tmp_path / "model")
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(readme_code(tmp_path / "model"), names)  # noqa: S102  (the README's lines are what is tested)
    scores = torch.nn.functional.normalize(names["features"], dim=-1) @ names["head"]["weight"].T
    torch.testing.assert_close(scores, expected, rtol=2e-3, atol=2e-3)
    labels = [plan.task.labels[index] for index in expected.argmax(-1)]
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(labels)


def test_the_real_model_s_adapter_survives_peft(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of({"model.source": f"path:{model_folder}", **PLAIN, **ADAPTERS["lora"]})
    workspace = Workspace(plan, FeatureCache(tmp_path / "cache"), Runtime())
    batches = workspace.batches(Examples(TEXTS, np.arange(len(TEXTS)) % 3, np.arange(len(TEXTS))))
    weights = workspace.initial() + 0.02 * np.random.default_rng(0).normal(size=len(workspace.initial()))
    export_model(workspace, weights.astype(np.float32), tmp_path / "model", {"epsilon": 3.0})
    workspace.model.load(weights.astype(np.float32))
    monkeypatch.chdir(tmp_path / "model")
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(readme_code(tmp_path / "model"), names)  # noqa: S102
        expected = workspace.model.logits(batches.inputs(np.arange(len(TEXTS))))
    scores = torch.nn.functional.normalize(names["features"], dim=-1) @ names["head"]["weight"].T
    torch.testing.assert_close(scores, expected, rtol=2e-3, atol=2e-3)
    assert "(3, 1e-05)-differentially private" in (tmp_path / "model" / "README.md").read_text()
