"""The wire: what may travel, key by key and byte by byte, and nothing else (item 11's wire half)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from accord_client import site as site_module
from accord_client.app import answered
from accord_client.site import Site
from accord_shared import PROTOCOL_VERSION, errors
from accord_shared.errors import (
    REFUSALS,
    AccordError,
    BudgetExhausted,
    DataError,
    ModelError,
    NonFinite,
    OutputError,
    PlanError,
    PrivacyError,
    ProtocolError,
    Withheld,
)
from accord_shared.messages import (
    Enquiry,
    Introduced,
    IntroduceRequest,
    Joined,
    MaskedUpload,
    MaskRequest,
    Message,
    Opened,
    OpenRequest,
    Refusal,
    SurvivorsRequest,
    SurvivorsSigned,
    TrainReply,
    TrainRequest,
)
from accord_shared.wire import INLINE, decode, encode, payload_bytes
from conformance.lab import Lab, ask, dimension, join, joint_weights, lab_plan, request
from conformance.secure_lab import SecureLab, secure_lab_plan

VECTOR = np.array([1.5, -0.0, 3e-39, 3e38], dtype=np.float32)
MESSAGES: list[Message] = [
    Enquiry(1, "run", "{}", "a" * 64, "b" * 64),
    Joined("site-ä", 1, "a" * 64, b"\x00credential", b"bundle\xff"),
    TrainRequest(1, "run", "a" * 64, 3, 2, VECTOR),
    TrainReply("run", 3, 2, VECTOR),
    IntroduceRequest("run", ("bank-ä",), (b"credential",)),
    Introduced("run", (b"introduction", b"")),
    MaskRequest(
        1,
        "run",
        "a" * 64,
        "b" * 64,
        3,
        2,
        ("a", "ä"),
        (b"1", b"2"),
        b"k" * 32,
        ("ä",),
        (b"c",),
        (b"i",),
        VECTOR,
        (b"\x80",),
    ),
    MaskedUpload("run", 3, 2, np.arange(256, dtype=np.uint8), (b"sealed", b"\xff"), b"bundle", b"signature"),
    SurvivorsRequest("run", 3, 2, (0, 1, 5)),
    SurvivorsSigned("run", 3, 2, b"signature"),
    OpenRequest("run", 3, 2, (0, 1), (0,), (b"signature",), (b"", b"sealed")),
    Opened("run", 3, 2, (b"", b"shares")),
    Refusal("ProtocolError", "no"),
]
FIELDS, VECTORS = "accord.fields", "accord.vectors"
each_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)


def equal(one: Message, two: Message) -> bool:
    same = type(one) is type(two)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        same &= (
            a.tobytes() == b.tobytes() and a.dtype == b.dtype
            if isinstance(a, np.ndarray)
            else (a == b and type(a) is type(b))
        )
    return bool(same)


def test_every_message_is_among_them() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(Message))


@each_message
def test_messages_come_back_bit_for_bit(message: Message) -> None:
    assert equal(decode(encode(message)), message)


def parts(message: Message) -> tuple[dict[str, Any], dict[str, Array]]:
    content = encode(message)
    arrays = dict(content[VECTORS]) if VECTORS in content else {}
    return dict(content[FIELDS]), arrays  # type: ignore[arg-type]


def content_of(scalars: dict[str, Any], arrays: dict[str, Array]) -> RecordDict:
    content = RecordDict({FIELDS: ConfigRecord(scalars)})
    if arrays:
        content[VECTORS] = ArrayRecord(arrays)
    return content


def test_long_vectors_travel_as_arrays_and_short_ones_do_not() -> None:
    for size, inline in ((INLINE // 4, True), (INLINE // 4 + 1, False)):
        reply = TrainReply("run", 1, 1, np.arange(size, dtype=np.float32))
        content = encode(reply)
        assert (VECTORS not in content) is inline
        assert equal(decode(content), reply)
    scalars, _ = parts(TrainReply("run", 1, 1, np.zeros(2, np.float32)))
    for data in (bytes(9), bytes(INLINE + 4)):
        with pytest.raises(ProtocolError, match="float32"):
            decode(content_of({**scalars, "update": data}, {}))
    with pytest.raises(ProtocolError, match="unknown fields"):
        decode(content_of(scalars, {"update": array()}))


@each_message
def test_a_missing_field_is_refused(message: Message) -> None:
    scalars, arrays = parts(message)
    for name in [*scalars, *arrays]:
        fewer = {key: value for key, value in scalars.items() if key != name}
        with pytest.raises(ProtocolError):
            decode(content_of(fewer, {key: value for key, value in arrays.items() if key != name}))


@each_message
def test_a_field_more_is_refused(message: Message) -> None:
    scalars, arrays = parts(message)
    stray = {"loss": array()}
    with pytest.raises(ProtocolError, match="unknown fields"):
        decode(content_of({**scalars, "num_examples": 93}, arrays))
    with pytest.raises(ProtocolError, match="unknown fields"):
        decode(content_of(scalars, {**arrays, **stray}))


@each_message
def test_a_record_more_is_refused(message: Message) -> None:
    for name in ("metrics", VECTORS, FIELDS):
        for record in (MetricRecord({"accuracy": 0.9}), ConfigRecord({"n": 93}), ArrayRecord()):
            content = encode(message)
            if name in content and type(content[name]) is type(record):
                continue
            content[name] = record
            with pytest.raises(ProtocolError):
                decode(content)


@each_message
def test_a_field_of_another_type_is_refused(message: Message) -> None:
    scalars, arrays = parts(message)
    for name, value in scalars.items():
        for other in (1.5, True, b"x", [1], ["a"], [b"x"], [1.5], [True], "1", 1):
            alike = type(other) is type(value) and (not isinstance(other, list) or type(other[0]) is type(value[0]))
            if alike and name != "message":
                continue
            with pytest.raises(ProtocolError):
                decode(content_of({**scalars, name: other}, arrays))


def too_much(value: Any) -> Any:
    """A value of the same type that no message may have."""
    if isinstance(value, list):
        return [too_much(value[0])]
    return (
        1 << 60 if isinstance(value, int) else type(value)() + (b"x" if isinstance(value, bytes) else "x") * (1 << 23)
    )


def test_a_list_of_too_many_is_refused() -> None:
    scalars, _ = parts(SurvivorsRequest("run", 1, 1, ()))
    assert isinstance(decode(content_of({**scalars, "survivors": [1] * 100_000}, {})), SurvivorsRequest)
    with pytest.raises(ProtocolError, match="too large"):
        decode(content_of({**scalars, "survivors": [1] * 100_001}, {}))


@each_message
def test_fields_beyond_their_bounds_are_refused(message: Message) -> None:
    scalars, arrays = parts(message)
    for name, value in scalars.items():
        with pytest.raises(ProtocolError):
            decode(content_of({**scalars, name: too_much(value)}, arrays))
        if isinstance(value, int):
            with pytest.raises(ProtocolError):
                decode(content_of({**scalars, name: -1}, arrays))


def array(**changes: Any) -> Array:
    values = {"dtype": "float32", "shape": (2,), "stype": "accord.float32", "data": bytes(8), **changes}
    return Array(**values)


@pytest.mark.parametrize(
    "bad",
    [
        {"dtype": "float64", "data": bytes(16)},
        {"dtype": "object"},
        {"stype": "numpy.ndarray"},
        {"shape": (2, 1)},
        {"shape": ()},
        {"shape": (3,)},
        {"shape": (1,)},
        {"shape": (-2,)},
        {"data": bytes(9)},
        {"data": b""},
    ],
    ids=str,
)
def test_arrays_that_are_not_what_they_say_are_refused(bad: dict[str, Any]) -> None:
    scalars, _ = parts(MESSAGES[3])
    del scalars["update"]
    assert isinstance(decode(content_of(scalars, {"update": array()})), TrainReply)
    with pytest.raises(ProtocolError):
        decode(content_of(scalars, {"update": array(**bad)}))


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({FIELDS: ConfigRecord({"message": "Surprise"})})])
def test_what_is_no_message_is_refused(content: RecordDict) -> None:
    with pytest.raises(ProtocolError):
        decode(content)


# --- the contract: everything that a site may emit ------------------------------------------------------------------


def emitted(message: Message) -> dict[str, Any]:
    """Each key that leaves, with its bytes (of text: its UTF-8)."""
    content = encode(message)
    assert set(content) <= {FIELDS, VECTORS}
    keys = {f"{FIELDS}.{key}": value for key, value in content[FIELDS].items()}  # type: ignore[union-attr]
    for key, value in content[VECTORS].items() if VECTORS in content else ():  # type: ignore[union-attr]
        keys[f"{VECTORS}.{key}"] = value.data
        keys[f"{VECTORS}.{key}.meta"] = (value.dtype, tuple(value.shape), value.stype)
    return keys


def test_what_a_joining_site_emits(tmp_path: Path) -> None:
    plan = lab_plan()
    assert emitted(join(Lab(tmp_path).site("bank-7"), plan)) == {
        f"{FIELDS}.message": "Joined",
        f"{FIELDS}.site": "bank-7",
        f"{FIELDS}.protocol": PROTOCOL_VERSION,
        f"{FIELDS}.plan_hash": plan.hash,
        f"{FIELDS}.credential": b"",
        f"{FIELDS}.bundle": b"",
        f"{FIELDS}.receipt": b"",
    }


@pytest.mark.parametrize("records", [1, 12, 90])
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_what_a_trained_site_emits(records: int, rate: float, tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path, records=records), lab_plan({"local.sampling_rate": rate, "privacy.accountant": "rdp"})
    keys = emitted(ask(lab.joined(plan), plan, lab, 2, attempt=3))
    update = keys.pop(f"{FIELDS}.update")
    assert keys == {  # nothing depends on the number of records, or on who was sampled
        f"{FIELDS}.message": "TrainReply",
        f"{FIELDS}.run_id": "run",
        f"{FIELDS}.round": 2,
        f"{FIELDS}.attempt": 3,
    }
    assert len(update) == 4 * dimension(plan, lab)


def test_what_a_refusing_site_emits(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    site, weights = lab.joined(plan), np.zeros(dimension(plan, lab), np.float32)
    answers = [
        site.handle(replace(request(plan, 1, weights), protocol=99)),
        site.handle(request(plan, 99, weights)),
        site.handle(request(plan, 1, weights[:-1])),
        site.handle(request(plan, 1, weights + np.float32("nan"))),
        site.handle(Enquiry(PROTOCOL_VERSION, "run", "{", "0" * 64, "")),
        site.handle(Enquiry(PROTOCOL_VERSION, "run", plan.to_json(), "0" * 64, "")),
        site.handle(TrainReply("run", 1, 1, weights)),
    ]
    for answer in answers:
        keys = emitted(answer)
        assert set(keys) == {f"{FIELDS}.message", f"{FIELDS}.kind", f"{FIELDS}.reason"}
        assert isinstance(answer, Refusal)
        assert len(answer.reason.encode()) <= 1200
        assert "\n" not in answer.reason
        assert answer.kind in REFUSALS


SECRET = "Mrs Miller, IBAN DE02 1203"


@pytest.mark.parametrize("kind", [ModelError, PrivacyError, OutputError, NonFinite])
def test_words_about_the_machine_stay_at_home(kind: type[AccordError]) -> None:
    refusal = Refusal.of(kind(f"row 3: {SECRET}"))
    assert refusal.kind == kind.__name__
    assert SECRET not in refusal.reason


def test_every_kind_that_is_not_named_is_the_same_refusal() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AccordError)]
    others = [kind for kind in kinds if kind.__name__ not in REFUSALS]
    assert {DataError, AccordError} <= set(others)
    refusals = {Refusal.of(kind(f"row 3: {SECRET}")) for kind in (*others, Withheld, IndexError, MemoryError)}
    assert refusals == {Refusal("Withheld", "see the site's own log")}


@pytest.mark.parametrize("kind", [ProtocolError, BudgetExhausted, PlanError])
def test_words_about_public_things_travel_in_one_short_line(kind: type[AccordError]) -> None:
    refusal = Refusal.of(kind("round 3\nsecond line"))
    assert refusal.reason == "round 3"
    assert len(Refusal.of(kind("x" * 9999)).reason) <= 300
    assert isinstance(Refusal.of(kind("")).reason, str)
    assert type(refusal.error()) is kind


def unreadable(kind: type[Exception]) -> Callable[[pytest.MonkeyPatch, Site], None]:
    """Records that cannot be read."""

    def broken(_: object) -> Any:
        raise kind(f"train.csv row 3: label {SECRET!r} is not a label of the plan")

    return lambda patch, site: patch.setattr(site, "_examples_of", broken)


def untrainable(patch: pytest.MonkeyPatch, _: Site) -> None:
    """Records on which training fails."""

    def broken(*_: object, **__: object) -> Any:
        raise PlanError(f"no gradient at {SECRET}")

    patch.setattr(site_module, "train", broken)
    patch.setattr(site_module, "clipped_gradient", broken)


def overflowing(patch: pytest.MonkeyPatch, _: Site) -> None:
    """Records whose update is no number."""

    def broken(_: object, what: str) -> None:
        if what == "the update":
            raise NonFinite(what)

    patch.setattr(site_module, "check_finite", broken)


def empty(patch: pytest.MonkeyPatch, site: Site) -> None:
    """No records at all."""
    examples = site._examples_of
    patch.setattr(site, "_examples_of", lambda plan: examples(plan).take([]))


def held_up(lab: SecureLab, patch: pytest.MonkeyPatch) -> tuple[Site, Message]:
    """A site and the request to train that has reached it, but was not looked at yet."""
    site, kept = lab.sites[lab.names[0]], list[Message]()
    handle = site.handle

    def hold(message: Message) -> Message:
        if not isinstance(message, MaskRequest):
            return handle(message)
        kept.append(message)
        return Refusal("SitePaused", "")

    with patch.context() as short:
        short.setattr(site, "handle", hold)
        lab.collect(1)
    return site, kept[0]


TROUBLE: dict[str, Callable[[pytest.MonkeyPatch, Site], None]] = {
    **{kind.__name__: unreadable(kind) for kind in (DataError, PlanError, ProtocolError, OutputError, IndexError)},
    "untrainable": untrainable,
    "empty": empty,
    "overflowing": overflowing,
}

CLAMPED = ("overflowing", "cohort")
"""What is encoded under shared noise is clamped first."""


@pytest.mark.parametrize(
    ("trouble", "noise"),
    [(trouble, noise) for trouble in TROUBLE for noise in ("site", "cohort") if (trouble, noise) != CLAMPED],
)
def test_whatever_fails_on_records_is_one_refusal_on_the_wire(
    trouble: str, noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reason stays at the site, which shows it to its operator."""
    if noise == "cohort":
        secure = SecureLab(tmp_path, secure_lab_plan(**{"privacy.noise": "cohort"}))
        secure.exchange.join()
        site, message = held_up(secure, monkeypatch)
    else:
        lab, plan = Lab(tmp_path), lab_plan()
        site, message = lab.joined(plan), request(plan, 1, joint_weights(plan, lab, 1))
    TROUBLE[trouble](monkeypatch, site)
    content = answered(site.handle, encode(message))
    assert decode(content) == Refusal("Withheld", "see the site's own log")
    assert trouble == "IndexError" or "Error" in site.last_refusal or "NonFinite" in site.last_refusal


def test_an_accident_at_a_site_leaves_without_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower sends the text of an exception to the coordinator: none may reach it."""
    from flwr.app import Context
    from flwr.app import Message as FlowerMessage
    from flwr.supercore.task_identity import TaskIdentity

    from accord_client.app import client_app

    def accident(_: Message) -> Message:
        raise IndexError(f"Target {SECRET} is out of bounds")

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    app = client_app(lambda _: accident)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    message = FlowerMessage(encode(MESSAGES[2]), dst_node_id=1, message_type="train")
    reply = app(message, context)
    assert SECRET not in str(dict(reply.content[FIELDS]))  # type: ignore[arg-type]
    assert isinstance(decode(reply.content), Refusal)


def test_a_stranger_s_refusal_reads_as_a_protocol_error() -> None:
    assert type(Refusal("SystemExit", "boo").error()) is ProtocolError


@each_message
def test_payload_bytes_count_every_field(message: Message) -> None:
    scalars, arrays = parts(message)
    scalars.pop("message")
    items = [item for value in scalars.values() for item in (value if isinstance(value, list) else [value])]
    expected = sum(len(item) if isinstance(item, bytes) else len(str(item).encode()) for item in items)
    assert payload_bytes(message) == expected + sum(len(value.data) for value in arrays.values())
