"""Everything that leaves a site through Flower's client, field by field, against the code that sends it.

A SuperLink of a few lines answers within the process and keeps every request whole. A field that no rule names fails,
so what a later flwr adds is noticed; and what a site says must not depend on how long it took.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.protobuf import client as protobuf_client
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import Message as Proto

from accord_client import agent as agent_module
from accord_client.agent import Agent, Standing
from accord_client.fleet import FleetConnection, Incoming
from accord_client.telemetry import AgentMetrics
from accord_shared.errors import DataError
from accord_shared.messages import MaskedUpload, Message, TrainReply, TrainRequest
from accord_shared.service.keyfile import new_tls_key
from accord_shared.wire import INLINE, decode, encode

NODE, RUN = 7, 11
PATHS: dict[str, tuple[type[Proto], type[Proto]]] = {
    "activate-node": (fleet_pb2.ActivateNodeRequest, fleet_pb2.ActivateNodeResponse),
    "deactivate-node": (fleet_pb2.DeactivateNodeRequest, fleet_pb2.DeactivateNodeResponse),
    "send-node-heartbeat": (heartbeat_pb2.SendNodeHeartbeatRequest, heartbeat_pb2.SendNodeHeartbeatResponse),
    "pull-messages": (fleet_pb2.PullMessagesRequest, fleet_pb2.PullMessagesResponse),
    "push-messages": (fleet_pb2.PushMessagesRequest, fleet_pb2.PushMessagesResponse),
    "pull-object": (message_pb2.PullObjectRequest, message_pb2.PullObjectResponse),
    "push-object": (message_pb2.PushObjectRequest, message_pb2.PushObjectResponse),
    "confirm-message-received": (message_pb2.ConfirmMessageReceivedRequest, message_pb2.ConfirmMessageReceivedResponse),
}
_CLIENT = httpx.Client
SECRET = "Mrs Miller, IBAN DE02 1203"


@dataclass
class Link:
    """The other end: hands out one message, and keeps what it is sent."""

    request: FlowerMessage
    sent: list[tuple[str, httpx.Headers, Proto]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.objects = {name: one.deflate() for name, one in get_all_nested_objects(self.request).items()}
        self.tree = get_object_tree(self.request)
        self.request.metadata.__dict__["_message_id"] = self.tree.object_id

    def answer(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.removeprefix("/v1/fleet/")
        asked, due = PATHS[name]
        message: Any = asked()
        message.ParseFromString(request.content)
        assert message.SerializeToString(deterministic=True) == request.content  # no byte that no field has
        self.sent.append((name, request.headers, message))
        reply: Any = due()
        if name == "activate-node":
            reply.node_id = NODE
        elif name == "pull-messages":
            reply.messages_list.append(message_to_proto(remove_content_from_message(self.request)))
            reply.message_object_trees.append(self.tree)
        elif name == "pull-object":
            reply.object_found = reply.object_available = True
            reply.object_content = self.objects[message.object_id]
        elif name == "push-messages":
            reply.session_id = "session"
            reply.objects_to_push.extend(_names(message.message_object_trees[0]))
        elif name == "push-object":
            reply.stored = True
        return httpx.Response(200, content=reply.SerializeToString())

    def bodies(self) -> list[bytes]:
        """What was sent, without the headers that name the second; objects are pushed in any order."""
        return sorted(name.encode() + message.SerializeToString(deterministic=True) for name, _, message in self.sent)


def _names(tree: Any) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _names(child)


def fields_of(message: Proto, path: str) -> Iterator[tuple[str, object]]:
    """Every field that is set, by its path."""
    for descriptor, value in message.ListFields():
        here = f"{path}.{descriptor.name}"
        values = [value] if isinstance(value, Proto | str | bytes | int | float) else value
        for one in values:
            if isinstance(one, Proto):
                yield from fields_of(one, here)
            else:
                yield here, one


@pytest.fixture
def key() -> EllipticCurvePrivateKey:
    return new_tls_key()


@pytest.fixture
def request_(monkeypatch: pytest.MonkeyPatch) -> FlowerMessage:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, RUN)
    content = encode(TrainRequest(1, "run", "a" * 64, 3, 2, np.zeros(4, np.float32)))
    return FlowerMessage(content, dst_node_id=NODE, message_type="train", ttl=60.0, group_id="")


@dataclass
class Station:
    """An agent's loop on one message, with what is in front of and behind it left out."""

    link: Link
    connection: FleetConnection
    handle: Callable[[Message], Message]

    def answer(self) -> None:
        agent = object.__new__(Agent)
        agent.standing, agent._metrics, agent._handle = Standing(), AgentMetrics(), self.handle  # type: ignore[method-assign]
        incoming = self.connection.receive()
        assert isinstance(incoming, Incoming)
        agent._answer(self.connection, incoming)
        self.connection.close()


def station(
    patch: pytest.MonkeyPatch,
    key: EllipticCurvePrivateKey,
    request: FlowerMessage,
    handle: Callable[[Message], Message],
) -> Station:
    link = Link(request)
    transport = httpx.MockTransport(link.answer)
    patch.setattr(
        protobuf_client.httpx, "Client", lambda **options: _CLIENT(transport=transport, timeout=options["timeout"])
    )
    patch.setattr(ssl.SSLContext, "load_verify_locations", lambda self, cadata: None)
    return Station(link, FleetConnection("link:1", b"", key), handle)


def trained(message: Message) -> Message:
    assert isinstance(message, TrainRequest)
    return TrainReply(message.run_id, message.round, message.attempt, message.weights + 1)


def refused(_: Message) -> Message:
    raise DataError(f"row 3: {SECRET}")


def broken(_: Message) -> Message:
    raise IndexError(SECRET)


def masked(size: int) -> Callable[[Message], Message]:
    payload = (np.arange(size) % 251).astype(np.uint8)
    return lambda _: MaskedUpload("run", 3, 2, payload, (b"s" * 40,) * 3, b"b" * 156, b"t" * 16, b"{}")


HANDLERS = {
    "an update": trained,
    "a refusal": refused,
    "an accident": broken,
    "an upload": masked(1000),
    "a long upload": masked(INLINE + 1000),
}
ID = re.compile(r"[0-9a-f]{64}")
REPLY = "push-messages.messages_list"


def rules(link: Link, key: EllipticCurvePrivateKey) -> dict[str, Callable[[Any], bool]]:
    """Field by field, what it may be: of the request, of the node's key, or a digest of content that has rules."""
    asked = link.request.metadata
    objects = {one.object_id: one.object_content for name, _, one in link.sent if name == "push-object"}  # type: ignore[attr-defined]
    is_object = lambda value: value in objects and ID.fullmatch(value) is not None  # noqa: E731
    nodes = dict.fromkeys(
        [f"{name}.node.node_id" for name in PATHS if name not in ("activate-node", "deactivate-node")],
        NODE,
    )
    constants: dict[str, object] = {
        **nodes,
        "deactivate-node.node_id": NODE,
        "activate-node.heartbeat_interval": 30.0,
        "send-node-heartbeat.heartbeat_interval": 30.0,
        f"{REPLY}.metadata.run_id": asked.run_id,
        f"{REPLY}.metadata.src_node_id": NODE,
        f"{REPLY}.metadata.dst_node_id": asked.src_node_id,
        f"{REPLY}.metadata.reply_to_message_id": asked.message_id,
        f"{REPLY}.metadata.message_type": asked.message_type,
        f"{REPLY}.metadata.ttl": asked.ttl,
        f"{REPLY}.metadata.created_at": asked.created_at,
        f"{REPLY}.metadata.dst_task_id": asked.src_task_id,
        "push-object.session_id": "session",
        **{f"{name}.run_id": asked.run_id for name in ("push-object", "pull-object", "confirm-message-received")},
    }
    return {
        **{path: (lambda value, due=due: value == due) for path, due in constants.items()},
        "activate-node.public_key": lambda value: b"PUBLIC KEY" in value,
        f"{REPLY}.metadata.message_id": is_object,
        "push-messages.message_object_trees.object_id": is_object,
        "push-messages.message_object_trees.children.object_id": is_object,
        "push-messages.message_object_trees.children.children.object_id": is_object,
        "push-messages.message_object_trees.children.children.children.object_id": is_object,
        "push-messages.message_object_trees.children.children.children.children.object_id": is_object,
        "push-object.object_id": is_object,
        "push-object.object_content": lambda value: SECRET.encode() not in value,
        "pull-object.object_id": lambda value: value in link.objects,
        "confirm-message-received.message_object_id": lambda value: value == asked.message_id,
    }


@pytest.mark.parametrize("handler", HANDLERS)
def test_every_field_that_leaves_is_known(
    handler: str, monkeypatch: pytest.MonkeyPatch, key: EllipticCurvePrivateKey, request_: FlowerMessage
) -> None:
    here = station(monkeypatch, key, request_, HANDLERS[handler])
    here.answer()
    allowed = rules(here.link, key)
    seen = [pair for name, _, message in here.link.sent for pair in fields_of(message, name)]
    assert not {path for path, _ in seen} - set(allowed)
    for path, value in seen:
        assert allowed[path](value), f"{path} = {str(value)[:80]}"
    assert {name for name, _, _ in here.link.sent} >= {"push-messages", "push-object", "pull-messages"}


HEADERS = {
    "host": "link:1",
    "accept": None,
    "accept-encoding": None,
    "connection": "keep-alive",
    "user-agent": None,
    "content-type": "application/protobuf",
    "content-length": None,
    "flwr-package-name": "flwr",
    "flwr-package-version": None,
    "flwr-component-name": "SuperNode",
    "flwr-public-key": None,
    "flwr-timestamp": None,
    "flwr-signature": None,
}


def test_every_header_that_leaves_is_known(
    monkeypatch: pytest.MonkeyPatch, key: EllipticCurvePrivateKey, request_: FlowerMessage
) -> None:
    """The time of a request is told to the second: that it came is known to the millisecond by whoever it comes to."""
    here = station(monkeypatch, key, request_, trained)
    here.answer()
    for name, headers, message in here.link.sent:
        assert set(headers) == set(HEADERS), name
        for header, due in HEADERS.items():
            assert due is None or headers[header] == due
        assert headers["content-length"] == str(message.ByteSize())
        assert datetime.fromisoformat(headers["flwr-timestamp"]).microsecond == 0
        assert headers["user-agent"] == f"python-httpx/{httpx.__version__}"
    assert len({headers["flwr-public-key"] for _, headers, _ in here.link.sent}) == 1


@pytest.mark.parametrize("handler", HANDLERS)
def test_how_long_an_answer_took_is_in_none_of_its_bytes(
    handler: str, monkeypatch: pytest.MonkeyPatch, key: EllipticCurvePrivateKey, request_: FlowerMessage
) -> None:
    bodies = []
    for pause in (0.0, 0.05):

        def slow(message: Message, pause: float = pause) -> Message:
            time.sleep(pause)
            return HANDLERS[handler](message)

        here = station(monkeypatch, key, request_, slow)
        here.answer()
        bodies.append(here.link.bodies())
    assert bodies[0] == bodies[1]


def test_all_trouble_with_records_is_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, key: EllipticCurvePrivateKey, request_: FlowerMessage
) -> None:
    bodies = []
    for handler in (refused, broken):
        here = station(monkeypatch, key, request_, handler)
        here.answer()
        bodies.append(here.link.bodies())
    assert bodies[0] == bodies[1]
    assert agent_module.answered(refused, request_.content) == agent_module.answered(broken, request_.content)


def test_the_content_of_a_reply_is_accord_s_alone(
    monkeypatch: pytest.MonkeyPatch, key: EllipticCurvePrivateKey, request_: FlowerMessage, tmp_path: Path
) -> None:
    """What the link puts together again from the objects is the message that the site made, and no more."""
    here = station(monkeypatch, key, request_, trained)
    here.answer()
    pushed = {one.object_id: one.object_content for name, _, one in here.link.sent if name == "push-object"}  # type: ignore[attr-defined]
    content = agent_module.answered(trained, request_.content)
    assert isinstance(content, RecordDict)
    own = {name: one.deflate() for name, one in get_all_nested_objects(content).items()}
    assert own.items() <= pushed.items()
    assert len(pushed) == len(own) + 1  # and the message itself, whose fields have rules above
    assert isinstance(decode(content), TrainReply)
