"""Pretrained models: sound ones load, broken ones are refused in one line and never half-loaded."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from accord_client import models, pretrained
from accord_client.check import _model
from accord_client.data import Examples
from accord_client.facts import plan_facts, trainable_parameters
from accord_client.features import FeatureCache, prefix_states
from accord_client.models import Encoder, EncoderModel, digest, locate
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared.errors import DataError, ModelError, PlanError, UnsupportedLayer
from accord_shared.plan import Plan
from command_line import Done, Run, accord_command, refused
from conftest import plan_of

__all__ = ["accord_command"]

TOKENS = 24
QUERY = "layer.0.attention.self.query.weight"


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str, **options: Any) -> Path:
        path = root / "-".join((name, *map(str, itertools.chain(*options.items()))))
        return path if path.exists() else tiny_models.save(name, path, **options)

    return folder


@pytest.fixture
def changed(shelf: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model after a change."""

    def folder(change: Callable[[Path], Any], name: str = "roberta", **options: Any) -> Path:
        path = tmp_path / "model"
        shutil.copytree(shelf(name, **options), path)
        change(path)
        return path

    return folder


def embedding(folder: Path) -> torch.Tensor:
    return Encoder(folder, TOKENS)._embedded(("my card was lost",), TOKENS)


# --- sound ones


@pytest.mark.parametrize("name", tiny_models.SOUND)
def test_sound_models_load_and_embed_the_same_twice(name: str, shelf: Callable[..., Path]) -> None:
    first = embedding(shelf(name))
    models._SOUND.clear()
    assert first.shape == (1, 32)
    assert torch.equal(first, embedding(shelf(name)))


@pytest.mark.parametrize("change", tiny_models.STILL_SOUND)
def test_what_changes_nothing_of_a_model_changes_nothing(
    change: str, changed: Callable[..., Path], shelf: Callable[..., Path]
) -> None:
    folder = changed(tiny_models.STILL_SOUND[change])
    assert models.pooling(folder) == ("cls" if change == "cls_pooling" else "mean")
    if change != "cls_pooling":
        torch.testing.assert_close(embedding(folder), embedding(shelf("roberta")), rtol=0, atol=5e-3)


def test_shards_and_bf16_load(shelf: Callable[..., Path]) -> None:
    whole = embedding(shelf("roberta"))
    sharded = shelf("roberta", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(embedding(sharded), whole)
    half = Encoder(shelf("roberta", bf16=True), TOKENS)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert 0 < float((half._embedded(("my card was lost",), TOKENS) - whole).norm()) < 0.05 * float(whole.norm())


def test_heads_and_other_names_of_the_backbone_give_the_backbone(shelf: Callable[..., Path], tmp_path: Path) -> None:
    """`roberta_mlm` holds `roberta.…` and a head: what loads is its backbone to the bit."""
    made = tiny_models.model("roberta_mlm").roberta.eval()
    encoder = Encoder(shelf("roberta_mlm"), TOKENS)
    loaded = encoder.model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in made.state_dict().items())


# --- broken ones


def refusal(folder: Path, tokens: int = TOKENS) -> str:
    with pytest.raises((ModelError, PlanError)) as caught:
        Encoder(folder, tokens)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    return line


@pytest.mark.parametrize("name", tiny_models.BROKEN)
def test_a_broken_model_is_refused(name: str, changed: Callable[..., Path]) -> None:
    change, words = tiny_models.BROKEN[name]
    assert words in refusal(changed(change))


@pytest.mark.parametrize("name", tiny_models.SHARDED)
def test_broken_shards_are_refused(name: str, changed: Callable[..., Path]) -> None:
    change, words = tiny_models.SHARDED[name]
    assert words in refusal(changed(change, max_shard_size="20KB"))


@pytest.mark.parametrize("name", tiny_models.UNSUPPORTED)
def test_architectures_that_are_not_supported_are_named(name: str, shelf: Callable[..., Path]) -> None:
    assert tiny_models.UNSUPPORTED[name] in refusal(shelf(name))


def test_a_padding_token_without_an_embedding_is_refused(changed: Callable[..., Path]) -> None:
    def pad(folder: Path) -> None:
        tiny_models.edit(folder / "tokenizer_config.json", pad_token="[PAD]")

    assert "its padding token has id 400, the model has 400 embeddings" in refusal(changed(pad, "gpt2_padeos"))


def test_a_part_that_is_random_is_found_whatever_the_loader_says(
    changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reading finds it without the list of missing tensors."""
    monkeypatch.setattr(pretrained, "_check_names", lambda *_: None)
    assert "reading it twice gives two models" in refusal(changed(tiny_models.without("encoder.layer.1.")))


def test_reading_leaves_the_random_state_alone(shelf: Callable[..., Path]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    models._SOUND.clear()
    Encoder(shelf("roberta"), TOKENS)
    assert torch.equal(torch.rand(1), expected)


def test_what_rust_panics_with_is_one_line() -> None:
    class PanicException(BaseException):
        """As pyo3 has it."""

    with pytest.raises(ModelError, match="cannot load m: first"), pretrained.told("cannot load m"):
        raise PanicException("first\nsecond")
    with pytest.raises(KeyboardInterrupt), pretrained.told("cannot load m"):
        raise KeyboardInterrupt


# --- where models are


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    wrong = ("file", "loop", "nowhere", "a\0b", "x" * 5000)
    for name in wrong:
        with pytest.raises(ModelError) as caught:
            digest(locate(f"path:{tmp_path / name}"))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        locate("path:~nobody-of-this-name/model")
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        (tmp_path / "two" / name / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="2 models in"):
        locate(f"path:{tmp_path / 'two'}")
    (tmp_path / "two" / "b" / "config.json").unlink()
    assert locate(f"path:{tmp_path / 'two'}") == tmp_path / "two" / "a"
    tiny_models.content("1_Pooling/config.json", '{"pooling_mode_cls_token": true}')(tmp_path / "two")
    with pytest.raises(ModelError, match="1_Pooling is not in the model's own folder"):
        locate(f"path:{tmp_path / 'two'}")


def test_files_that_cannot_be_read_are_refused(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = changed(lambda _: None)
    if os.geteuid():
        (folder / "model.safetensors").chmod(0)
    else:  # root may read everything

        def closed(path: Path) -> str:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(models, "sha256_file", closed)
    with pytest.raises(ModelError, match="Permission denied"):
        digest(folder)


def test_a_changed_file_changes_the_digest_in_the_same_process(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(lambda _: None)
    before = digest(folder)
    plan = plan_of({"model.source": f"path:{folder}", "model.digest": before})
    workspace = Workspace(plan, FeatureCache(tmp_path / "cache"), Runtime())
    assert workspace._digest == before
    assert workspace._folder == folder
    tiny_models.each(lambda _, tensor: tensor + 1, QUERY)(folder)
    assert digest(folder) != before
    with pytest.raises(ModelError, match="was changed while it was in use"):
        workspace.frame  # noqa: B018
    with pytest.raises(ModelError, match="is not the model of the plan"):
        models.verified(plan.model)


# --- positions, texts, layers

LIMITS = {
    "roberta": 32,
    "mpnet": 32,
    "bert": 40,
    "gpt2_padeos": 64,
    "distilbert": 64,
    "albert": 64,
    "llama": 64,
    "modernbert": 64,
    "deberta": None,
}


@pytest.mark.parametrize("name", LIMITS)
def test_positions_limit_the_tokens(name: str, shelf: Callable[..., Path]) -> None:
    limit = LIMITS[name]
    encoder = Encoder(shelf(name), limit or 200)
    tokens = encoder.tokenize(("card " * 500,))
    assert tokens.lengths.tolist() == [limit or 200]
    if limit is not None:
        assert f"task.max_tokens = {limit + 1} is more than the model's {limit}" in refusal(shelf(name), limit + 1)


def test_a_text_without_a_token_is_named(shelf: Callable[..., Path]) -> None:
    encoder = Encoder(shelf("gpt2_padeos"), TOKENS)
    with pytest.raises(DataError, match="1 of 2 texts have no token"):
        encoder.tokenize(("card", ""))


def test_an_inner_layer_is_the_one_that_an_exported_model_reads(shelf: Callable[..., Path]) -> None:
    Encoder(shelf("roberta"), TOKENS, -2)
    for name in ("gpt2_padeos", "llama"):  # these scale what the last layer gives
        with pytest.raises(ModelError, match=r"model\.layer is not supported for"):
            Encoder(shelf(name), TOKENS, -2)
    for layer in (-3, -40):
        with pytest.raises(PlanError, match=r"model\.layer"):
            Encoder(shelf("roberta"), TOKENS, layer)


@pytest.mark.parametrize(("name", "cached"), [("roberta", 1), ("mpnet", 0), ("deberta", 0), ("modernbert", 0)])
def test_frozen_layers_give_the_same_scores_whether_cached_or_not(
    name: str, cached: int, shelf: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers of some architectures give tuples or are asked for attributes: they run each time."""
    plan = plan_of({"model.source": f"path:{shelf(name)}", "adapter.depth": "full", "adapter.layers": "last:1"})
    workspace = Workspace(plan, FeatureCache(tmp_path), Runtime())
    texts = ("where is my card", "my loan is lost today", "payment")
    rows = torch.arange(3).numpy()
    batches, model = workspace.batches(Examples(texts, rows, rows)), workspace.model
    assert isinstance(model, EncoderModel)
    assert model.frozen_layers == cached
    inputs = batches.inputs(rows)
    assert isinstance(inputs, dict)
    assert ("prefix" in inputs) == bool(cached)
    with torch.no_grad():
        scores = model.logits(inputs)
        model.load(model.vector())
        whole = model.logits({key: value for key, value in inputs.items() if key != "prefix"})
    torch.testing.assert_close(scores, whole, rtol=0, atol=2e-3)
    assert prefix_states(model, workspace.encoder.tokenize(texts), Runtime()).shape[1] == 32 if cached else True


# --- plan check, simulate and site check alike

COMMON = ("missing_layer", "wrapped", "lfs", "no_tokenizer", "pad_beyond", "new_tokenizer", "cut_off", "bad_json")


def told_by(run: Callable[[], Any]) -> str:
    with pytest.raises((ModelError, PlanError, UnsupportedLayer)) as caught:
        run()
    return str(caught.value)


class SiteOfPlans:
    """What the check of models asks of a site."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        from accord_client.plans import PlanBook

        self.folder = self
        self.plans = folder / "plans"
        PlanBook(self.plans).offer(plan, "somebody", None)
        self.models = (plan.model.digest or "",)

    def policy(self) -> SiteOfPlans:
        return self


@pytest.fixture
def simulate(accord_command: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`accord simulate tiny.toml …` in this process."""
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    (entry,) = entry_points(group="accord.commands", name="simulation")
    return accord_command(entry, "simulate", "bank-demo", "--participants", "3", "--out", "out")


@pytest.fixture
def plan_check(accord_command: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan], Done]:
    """`accord plan check PLAN` in this process."""
    from accord_shared import cli

    run = accord_command(EntryPoint("client", "accord_client.facts:plan_facts", "accord.plan_facts"), "plan", "check")
    (facts,) = entry_points(group="accord.plan_facts")
    monkeypatch.setattr(cli, "entry_points", lambda group: [facts] if group == "accord.plan_facts" else [])

    def check(plan: Plan) -> Done:
        Path("plan.toml").write_text(plan.to_toml())
        return run("plan.toml")

    return check


@pytest.mark.parametrize("name", COMMON)
def test_a_broken_model_is_one_line_everywhere(
    name: str, changed: Callable[..., Path], simulate: Run, plan_check: Callable[[Plan], Done], tmp_path: Path
) -> None:
    change, words = tiny_models.BROKEN[name]
    folder = changed(change)
    plan = plan_of({"model.source": f"path:{folder}", "task.max_tokens": TOKENS})
    refused(plan_check(plan), words)
    found = [one for one in _model(SiteOfPlans(tmp_path, plan)) if words in one.line]  # type: ignore[arg-type]
    assert [one.state for one in found] == ["fail"]


@pytest.mark.parametrize("name", COMMON[:3])
def test_a_broken_model_is_refused_before_a_simulation_writes_anything(
    name: str, changed: Callable[..., Path], simulate: Run
) -> None:
    change, words = tiny_models.BROKEN[name]
    options = ("--set", f"model.source='path:{changed(change)}'", "--set", f"task.max_tokens={TOKENS}")
    for depth in ("head", "lora"):
        refused(simulate(*options, "--depth", depth), words)
        assert not Path("out").exists()


def test_too_many_tokens_and_layers_without_gradients_are_one_line_everywhere(
    shelf: Callable[..., Path], tmp_path: Path, simulate: Run
) -> None:
    long = plan_of({"model.source": f"path:{shelf('roberta')}", "task.max_tokens": 33})
    deep = plan_of({"model.source": f"path:{shelf('gpt2_padeos')}", "adapter.depth": "full"})
    for plan, words in ((long, "task.max_tokens = 33 is more than the model's 32"), (deep, "no exact per-sample")):
        assert words in told_by(lambda plan=plan: plan_facts(plan))
        found = list(_model(SiteOfPlans(tmp_path / words[:4], plan)))  # type: ignore[arg-type]
        assert [one.state for one in found if words in one.line] == ["fail"]
    refused(simulate("--set", f"model.source='path:{shelf('roberta')}'"), "is more than the model's 32")
    refused(simulate("--set", f"model.source='path:{shelf('gpt2_padeos')}'", "--depth", "full"), "no exact per-sample")
    assert not Path("out").exists()


def test_the_check_of_a_site_loads_models_that_its_policy_allows(
    shelf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: Callable[..., Path]
) -> None:
    folder = shelf("roberta")
    plan = plan_of({"model.source": f"path:{folder}", "model.digest": digest(folder), "task.max_tokens": TOKENS})
    assert trainable_parameters(plan) == 3 * 32
    lines = [one.line for one in _model(SiteOfPlans(tmp_path, plan)) if one.state == "ok"]  # type: ignore[arg-type]
    assert any("loads" in line for line in lines)
    from accord_client import check

    broken = changed(tiny_models.without("encoder.layer.1."))
    allowed = plan_of({"model.source": "package:nowhere", "model.digest": digest(broken)})
    monkeypatch.setattr(check, "_KNOWN_MODELS", (f"path:{broken}",))
    assert "not in the weights" in told_by(lambda: list(_model(SiteOfPlans(tmp_path / "b", allowed))))  # type: ignore[arg-type]
