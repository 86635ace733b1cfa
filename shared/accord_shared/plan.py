"""The plan: everything that a run is, as data. A site runs only what the plan names and it has.

Mechanism parameters live here, because a difference would change bytes or epsilon; performance
flags (device, precision, threads, batch in memory) live with the process that runs.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from accord_shared.canonical import canonical_bytes, canonical_hash
from accord_shared.errors import PlanError
from accord_shared.secagg.graph import most_left_out, sparse_thresholds
from accord_shared.secagg.thresholds import COMPLETE_MAX, SMALL_MAX, signatures, thresholds

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=1e-12, le=1)]
"""Of Poisson sampling. Far below, accountants lose all digits."""
Depth = Literal["head", "lora", "full"]
Noise = Literal["none", "site", "cohort", "participant"]
ServerOptimizer = Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]

_LORA_DEFAULTS: dict[str, Any] = {"rank": 8, "alpha": 16.0, "targets": ("query", "value")}
_LORA_KEYS = (*_LORA_DEFAULTS, "freeze_a")


def label_text(label: str) -> str:
    """A label in plain words: `reverted_card_payment?` reads "reverted card payment"."""
    return re.sub(r"[_-]+", " ", label).strip(" ?").lower() or label


class Table(BaseModel):
    """A frozen table of a plan: unknown keys are errors, strings are not coerced to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSpec(Table):
    """How often, and the seed of *public* choices (cohorts, initial weights); never of noise."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    rounds: int = Field(ge=1, le=100_000)
    rounds_per_site: int | None = Field(default=None, ge=1, le=100_000)
    """Most rounds that one site releases (None: all). A run that expects dropouts schedules make-up rounds:
    more `rounds` than this, at no more cost to any site."""
    seed: int = Field(default=0, ge=0, lt=2**53)
    max_extra_attempts: int = Field(default=3, ge=0, le=1000)


class ModelSpec(Table):
    """The pretrained encoder and the digest of its files (`sha256:…`)."""

    source: str = Field(pattern=r"^(package:[A-Za-z_][A-Za-z0-9_]*|path:.+|hub:[^/@\s]+/[^/@\s]+@[^@\s]+)$")
    digest: str | None = Field(default=None, pattern=r"^sha256:[0-9a-f]{64}$")
    layer: int = Field(default=-1, ge=-64, le=-1)
    """The hidden state that is pooled, counted from the end: -1 is the last layer's."""


class TaskSpec(Table):
    """What is learned, and whose privacy unit a record belongs to."""

    kind: Literal["classification"] = "classification"
    labels: tuple[str, ...] = Field(min_length=2, max_length=10_000)
    label_texts: tuple[str, ...] | None = None
    prompts: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=16)
    """What every text, also a label's, is read in, at `{}`: unit embeddings are averaged over prompts. Public."""
    max_tokens: int = Field(default=64, ge=4, le=8192)
    unit: str = Field(default="row", pattern=r"^(row|column:.+)$")

    @field_validator("labels", "label_texts", "prompts", "unit", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("task.labels has duplicates")
        if self.label_texts is not None and len(self.label_texts) != len(self.labels):
            raise ValueError("task.label_texts must name every label once")
        if any(prompt.count("{}") != 1 for prompt in self.prompts or ()):
            raise ValueError("task.prompts: each has exactly one {}, where the text goes")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The label names in plain words, as an encoder reads them."""
        return self.label_texts or tuple(label_text(label) for label in self.labels)


class AdapterSpec(Table):
    """What is trained: the head alone, LoRA and head, or every layer but the embeddings."""

    depth: Depth = "head"
    rank: int | None = Field(default=None, ge=1, le=1024)
    alpha: Positive | None = None
    targets: tuple[str, ...] | None = None
    freeze_a: bool | None = None
    layers: str = Field(default="all", pattern=r"^(all|last:[1-9][0-9]*)$")
    init: Literal["label-names", "zeros"] = "label-names"
    features: Literal["pooled", "label-centered"] = "label-centered"
    init_scale: Positive = 1.0

    @field_validator("targets", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _lora_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("depth") == "lora":
            given = {key: value for key, value in values.items() if value is not None}
            return {**_LORA_DEFAULTS, "freeze_a": False, **given}
        named = [key for key in _LORA_KEYS if values.get(key) is not None]
        if named:
            raise ValueError(f'adapter.{named[0]} belongs to depth = "lora", not {values.get("depth")!r}')
        if values.get("depth", "head") == "head" and values.get("layers", "all") != "all":
            raise ValueError('adapter.layers needs depth = "lora" or "full": a head trains no layer')
        return values


class LocalSpec(Table):
    """One site's part of a round. All constants are public: none is derived from private counts."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sampling_rate: Rate = 1.0
    steps_per_round: int = Field(default=1, ge=1, le=100_000)
    expected_records: int = Field(ge=1, lt=2**53)
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """C. Noise needs it; plain training clips per unit where it is given, which helps against wrong labels."""

    @property
    def expected_batch(self) -> float:
        """q·E, the expected Poisson sample: what sums of gradients are divided by, from public constants alone."""
        return self.sampling_rate * self.expected_records


class ServerSpec(Table):
    """The server optimiser on the mean update (Reddi et al. 2021, Algorithm 2)."""

    optimizer: ServerOptimizer = "fedavg"
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    second_moment: Annotated[float, Field(ge=0, lt=1)] = 0.99
    adaptivity: Positive = 1e-3
    average_last: Fraction = 0.0


class PrivacySpec(Table):
    """Who adds which noise, and what may be spent."""

    noise: Noise = "site"
    epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    accountant: Literal["pld", "prv", "rdp"] = "pld"
    noise_multiplier: Annotated[float, Field(ge=0.2, le=1e6)] | None = None
    """σ (None: calibrated). For parties whose accountants differ in its last digit; each checks what it costs."""

    @model_validator(mode="after")
    def _epsilon_fits_noise(self) -> Self:
        if self.noise == "none" and self.epsilon is not None:
            raise ValueError('privacy.epsilon contradicts privacy.noise = "none"')
        if self.noise == "none" and self.noise_multiplier is not None:
            raise ValueError('privacy.noise_multiplier contradicts privacy.noise = "none"')
        if self.noise != "none" and self.epsilon is None:
            raise ValueError(f'privacy.epsilon is missing: privacy.noise = "{self.noise}" needs it')
        return self


class CohortSpec(Table):
    """How many sites a round asks, and how many must finish it."""

    size: int = Field(ge=1, le=100_000)
    minimum: int = Field(default=1, ge=1, le=100_000)
    colluders: int = Field(default=0, ge=0, le=100_000)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum > self.size:
            raise ValueError(f"cohort.minimum = {self.minimum} is more than cohort.size = {self.size}")
        if self.colluders >= self.minimum and self.colluders > 0:
            raise ValueError(f"cohort.colluders = {self.colluders} leaves no honest site of {self.minimum}")
        return self


class SecureAggregationSpec(Table):
    """Whether the coordinator may see single updates."""

    mode: Literal["malicious", "semi_honest", "off"] = "malicious"
    bits: int | None = Field(default=None, ge=8, le=62)
    """Width of the modulus: bytes up are `bits` / 8 a parameter. None: 24 or, under shared noise, what it needs."""
    bound: Positive | None = None
    """Largest magnitude of a coordinate of one site's update (None: from the plan's other constants)."""


class EvaluationSpec(Table):
    """Held-out data and the metrics that are scored on it; the first metric is the main one."""

    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    released_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Units that each site holds back to score the joint model every round: two noised counts travel as further
    coordinates of its update, masked like it."""
    metrics: tuple[Literal["accuracy", "macro_f1"], ...] = Field(default=("accuracy", "macro_f1"), min_length=1)

    @field_validator("metrics", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Plan(Table):
    """A run, whole. Equal plans have equal hashes, whatever their TOML looked like."""

    version: Literal[1] = 1
    run: RunSpec
    model: ModelSpec
    task: TaskSpec
    adapter: AdapterSpec = AdapterSpec()
    local: LocalSpec
    server: ServerSpec = ServerSpec()
    privacy: PrivacySpec
    cohort: CohortSpec
    secure_aggregation: SecureAggregationSpec = SecureAggregationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()

    @model_validator(mode="before")
    @classmethod
    def _minimum_follows_from_size(cls, values: Any) -> Any:
        """Without `cohort.minimum`: what the secure sum needs, and two thirds of the cohort."""
        cohort = values.get("cohort") if isinstance(values, dict) else None
        if not isinstance(cohort, dict) or "minimum" in cohort or not isinstance(cohort.get("size"), int):
            return values
        secure = values.get("secure_aggregation")
        if isinstance(secure, dict) and secure.get("mode") == "off":
            return values
        return {**values, "cohort": {**cohort, "minimum": default_minimum(cohort["size"], cohort.get("colluders", 0))}}

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        noise, local = self.privacy.noise, self.local
        if noise == "cohort" and (local.optimizer, local.momentum) != ("sgd", 0.0):
            raise ValueError(
                'privacy.noise = "cohort" needs local.optimizer = "sgd" without momentum: one clipped gradient is '
                "summed; server.optimizer has momentum and adaptive steps"
            )
        if noise == "cohort" and self.local.steps_per_round != 1:
            raise ValueError(
                'local.steps_per_round must be 1 under privacy.noise = "cohort": local iterates depend on the '
                "site's own share of the noise only, so several steps would not carry the cohort's guarantee"
            )
        if self.shared_noise and self.secure_aggregation.mode == "off":
            raise ValueError(f'privacy.noise = "{noise}" needs secure_aggregation.mode other than "off"')
        if noise == "participant" and self.evaluation.released_fraction > 0:
            raise ValueError('evaluation.released_fraction needs privacy.noise other than "participant"')
        self._check_thresholds()
        if noise != "none" and self.local.clip_norm is None:
            raise ValueError(f'local.clip_norm is missing: privacy.noise = "{noise}" needs it')
        if self.run.rounds_per_site is not None and self.run.rounds_per_site > self.run.rounds:
            raise ValueError(f"run.rounds_per_site = {self.run.rounds_per_site} is more than run.rounds")
        if self.task.prompts is not None and self.adapter.depth != "head":
            raise ValueError('task.prompts needs adapter.depth = "head": deeper training reads each text once')
        if self.model.layer != -1 and self.adapter.depth != "head":
            raise ValueError('model.layer needs adapter.depth = "head": layers above it would never be trained')
        if noise != "none" and self.privacy.delta * self.local.expected_records >= 1:
            raise ValueError(
                f"privacy.delta = {self.privacy.delta:g} is not below 1 / local.expected_records: "
                "such a guarantee allows releasing a whole record"
            )
        return self

    def _check_thresholds(self) -> None:
        """A cohort that answers in full can be summed securely; PROTOCOL.md, section 4."""
        mode, cohort = self.secure_aggregation.mode, self.cohort
        if mode == "off":
            return
        if cohort.size > COMPLETE_MAX:
            sparse_thresholds(cohort.size, cohort.minimum, cohort.colluders)
        else:
            own_noise = self.privacy.noise == "site"
            thresholds(cohort.size, cohort.minimum, cohort.colluders, mode, own_noise=own_noise)

    @property
    def extra_coordinates(self) -> int:
        """Coordinates of an update beyond the model's: the counts of `evaluation.released_fraction`."""
        return 2 if self.evaluation.released_fraction > 0 else 0

    @property
    def rounds_per_site(self) -> int:
        """Most rounds that one site releases: what its budget is calibrated to."""
        return self.run.rounds_per_site or self.run.rounds

    @property
    def privacy_unit(self) -> str:
        """What ε protects: "row", "column:NAME" (all rows of a site that share a cell), or "participant"."""
        return "participant" if self.privacy.noise == "participant" else self.task.unit

    @property
    def shared_noise(self) -> bool:
        """Whether sites add shares of one noise: what leaves a site is protected by the secure sum alone."""
        return self.privacy.noise in ("cohort", "participant")

    @property
    def releases(self) -> int:
        """Most updates that one site releases.

        A repeated attempt resends a `site`'s noised update unchanged; under shared noise it is a release of its own,
        for which `run.max_extra_attempts` over the whole run are held in reserve.
        """
        return self.rounds_per_site + (self.run.max_extra_attempts if self.shared_noise else 0)

    @property
    def noise_sharers(self) -> int:
        """Honest sites of a whole cohort that a sum has for certain: shared noise is divided among them.

        On a sparse graph the sum may miss a few honest survivors (PROTOCOL.md, sections 9 and 13).
        """
        cohort = self.cohort
        if cohort.size <= COMPLETE_MAX:
            return cohort.size - cohort.colluders
        degree = sparse_thresholds(cohort.size, cohort.minimum, cohort.colluders).degree or 0
        return cohort.size - cohort.colluders - most_left_out(cohort.size, cohort.minimum, cohort.colluders, degree)

    def check_roster(self, members: int) -> None:
        """A sparse graph spans all members of the roster, be they more than `cohort.size` or fewer (PROTOCOL.md, 9).

        Raises:
            PlanError: no secure sum on such a roster: one line with the numbers.
        """
        cohort = self.cohort
        if self.secure_aggregation.mode == "off":
            return
        if cohort.minimum > members:
            raise PlanError(f"cohort.minimum = {cohort.minimum}, but the roster has {members} members")
        if cohort.size <= COMPLETE_MAX:
            return
        try:
            degree = sparse_thresholds(members, cohort.minimum, cohort.colluders).degree or 0
        except PlanError as error:
            raise PlanError(f"above {COMPLETE_MAX} sites the graph spans the roster: {error}") from None
        left_out = most_left_out(members, cohort.minimum, cohort.colluders, degree)
        divided_for = cohort.size - cohort.colluders - self.noise_sharers
        if self.shared_noise and left_out > divided_for:
            raise PlanError(
                f"on a roster of {members} a sum may miss {left_out} honest sites, and the noise is divided for "
                f"{divided_for}, as on one of {cohort.size}: set cohort.size to {members}"
            )

    @property
    def steps(self) -> int:
        """Most noisy gradient steps of one site over the whole run."""
        return self.releases * self.local.steps_per_round

    def canonical(self) -> bytes:
        """The bytes that are hashed and signed: RFC 8785 JSON, decimals as strings."""
        return canonical_bytes(self.model_dump(exclude_none=True))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical bytes, hexadecimal."""
        return canonical_hash(self.model_dump(exclude_none=True))

    def to_json(self) -> str:
        """A JSON text that `from_json` reads back to an equal plan."""
        return self.model_dump_json(exclude_none=True)

    def to_toml(self) -> str:
        """The plan as TOML, with every default written out."""
        return tomli_w.dumps(json.loads(self.to_json()))

    def revised(self, changes: dict[str, Any]) -> Plan:
        """A copy with dotted keys replaced (`{"local.learning_rate": 0.5}`), validated again.

        Raises:
            PlanError: a key is unknown or the result contradicts itself.
        """
        return make_plan(apply_changes(self.model_dump(exclude_none=True), changes))

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Read the JSON form.

        Raises:
            PlanError: it is not a plan.
        """
        try:
            return Plan.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(first_problem(error)) from None


def default_minimum(size: int, colluders: int) -> int:
    """Least survivors where a plan names none: what the secure sum needs, and more than two thirds of the cohort.

    Four fifths in a sparse graph, whose shares grow with the square of the losses that it must stand.
    """
    if size <= SMALL_MAX:
        return max(1, size)
    needed = max(signatures(size, colluders), (size + colluders) // 2 + 1)
    return min(size, needed if size <= COMPLETE_MAX else max(needed, -(-4 * size // 5)))


def apply_changes(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of `table` with dotted keys set; `None` removes a key."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        target = result
        for key in path:
            child = target.setdefault(key, {})
            if not isinstance(child, dict):
                raise PlanError(f"{dotted}: {key} is not a table")
            target[key] = target = dict(child)
        if value is None:
            target.pop(last, None)
        else:
            target[last] = value
    return result


def first_problem(error: ValidationError) -> str:
    """One line that names the first offending key and says what is wrong with it."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) if str(part).isprintable() else repr(part) for part in problem["loc"])
    what = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"unknown key: {where}"
    if problem["type"] == "missing":
        return f"missing key: {where}"
    if problem["type"] == "value_error" or not where:
        return what
    return f"{where} = {str(problem['input'])[:60]!r}: {what}"


def make_plan(table: dict[str, Any]) -> Plan:
    """Validate a nested table.

    Raises:
        PlanError: one line that names the key.
    """
    try:
        return Plan.model_validate(table)
    except ValidationError as error:
        raise PlanError(first_problem(error)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        PlanError: it is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, RecursionError) as error:  # not all that is wrong is a `TOMLDecodeError`: huge numbers
        raise PlanError(f"{path} is not TOML: {str(error)[:200]}") from None


def read_plan(path: Path) -> Plan:
    """Read a plan from TOML.

    Raises:
        PlanError: it is missing, malformed, has unknown keys or contradicts itself.
    """
    try:
        return make_plan(read_toml(path))
    except PlanError as error:
        raise PlanError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
