"""The site as a node of Flower: messages from the SuperLink's Fleet API, answered in this process.

It speaks through flwr's own connection code (internal: flwr is pinned, `tests/contract` guards what is used) and has no
way to ask for an app bundle, so nothing that a coordinator ships is unpacked, imported or run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from accord_shared.errors import NotAdmitted, OutputError, ProtocolError, Unreachable
from accord_shared.files import write_atomic
from accord_shared.service.causes import unreachable
from accord_shared.service.egress import Proxy

log = logging.getLogger(__name__)
T = TypeVar("T")

PULL_BACKOFF_S = 0.02
"""First pause where a message is announced before its objects are there; Flower's own is 1 s."""
CALL_S = 30.0
HEARTBEAT_S = 0.6 * HEARTBEAT_DEFAULT_INTERVAL


class _SignedTime:
    """What Flower asks of a node with every request: its key, the time, and a signature over the time.

    Flower's own says the time to the microsecond, and so when an answer was ready: whole seconds do.
    """

    def __init__(self, key: EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public = b64encode(public_key_to_bytes(key.public_key())).decode("ascii")

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the three headers."""
        timestamp = datetime.now(UTC).replace(microsecond=0).isoformat()
        signature = b64encode(sign_message(self._key, timestamp.encode("ascii"))).decode("ascii")
        names = (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
        context.request.headers.update(dict(zip(names, (self._public, timestamp, signature), strict=True)))
        return call_next(context)


@dataclass(frozen=True)
class Incoming:
    """A message of the coordinator, and the run of Flower's that it belongs to."""

    message: FlowerMessage
    run: int

    @property
    def content(self) -> RecordDict:
        """What it carries.

        Raises:
            ProtocolError: nothing.
        """
        if not self.message.has_content():
            raise ProtocolError("a message without content")
        return self.message.content


class FleetConnection:
    """An authenticated connection to a SuperLink, TLS 1.3 only; opened when it is made, closed by `close`.

    `authorities` are the PEM certificates that may sign the SuperLink's. All methods raise `Unreachable` where nobody
    answers (trying again may help) and `NotAdmitted` where the SuperLink does not know this node's key.

    Flower activates no node that it takes to be online, for a minute after a connection that was cut or a process that
    was killed. The number of the node is remembered in `memory`, and such a node goes on under it.
    """

    def __init__(
        self,
        address: str,
        authorities: bytes,
        key: EllipticCurvePrivateKey,
        memory: Path | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        self._who = f"the coordinator's SuperLink at {address}"
        self._proxy = proxy
        self._client = FleetHttpClient(
            f"https://{address}",
            verify=False,  # of the client that is replaced before it is used
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                _SignedTime(key),
            ],
        )
        self._client._client.close()
        self._client._client = http_client(authorities, proxy)
        self._ended = threading.Event()
        try:
            self._node = Node(node_id=self._activated(public_key_to_bytes(key.public_key()), memory))
        except BaseException:
            self._client.close()
            raise
        threading.Thread(target=self._beat, name="fleet-heartbeat", daemon=True).start()

    def _activated(self, public_key: bytes, memory: Path | None) -> int:
        """The node's number."""
        digest = hashlib.sha256(public_key).hexdigest()
        request = ActivateNodeRequest(public_key=public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            node = int(self._asked(self._client.ActivateNode, request).node_id)
        except _OnlineAlready:
            known = _remembered(memory, digest)
            if known is None:
                line = "the coordinator's SuperLink does not know this site's key, or holds it for online"
                raise NotAdmitted(line) from None
            beat = SendNodeHeartbeatRequest(node=Node(node_id=known), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            self._asked(self._client.SendNodeHeartbeat, beat)
            return known
        if memory is not None and _remembered(memory, digest) != node:
            with suppress(OutputError):  # a full disk keeps nobody away
                write_atomic(memory, json.dumps({"key": digest, "node": node}).encode(), mode=0o600)
        return node

    @property
    def node(self) -> int:
        """Flower's number of this node."""
        return int(self._node.node_id)

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(Unreachable, NotAdmitted):  # the loop that pulls meets the same and says it
                self._asked(self._client.SendNodeHeartbeat, request)

    def receive(self) -> Incoming | None:
        """The next message, with its content, or None.

        Raises:
            ProtocolError: its content does not arrive or does not fit; it is gone.
        """
        answer = self._asked(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        message = message_from_proto(answer.messages_list[0])
        return Incoming(self._inflated(message, answer.message_object_trees[0]), message.metadata.run_id)

    def _inflated(self, message: FlowerMessage, tree: ObjectTree) -> FlowerMessage:
        run = message.metadata.run_id
        pull = make_pull_object_fn_protobuf(
            lambda request: self._asked(self._client.PullObject, request), self._node, run
        )

        def confirm(object_id: str) -> None:
            received = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=object_id)
            self._asked(self._client.ConfirmMessageReceived, received)

        try:
            whole = pull_and_inflate_object_from_tree(
                tree, pull, confirm, return_type=FlowerMessage, initial_backoff=PULL_BACKOFF_S
            )
        except (ObjectPullError, TypeError, ValueError, KeyError) as error:
            raise ProtocolError(f"a message whose content does not arrive: {type(error).__name__}") from None
        whole.metadata.__dict__["_message_id"] = tree.object_id
        return whole

    def answer(self, incoming: Incoming, content: RecordDict) -> None:
        """Send the reply to a message; after `Unreachable` it may be sent again.

        What Flower would add of this machine's clock tells how long the answer took, and that depends on the records:
        beside its content a reply says nothing that the request did not.
        """
        asked = incoming.message.metadata
        reply = FlowerMessage(content, reply_to=incoming.message)
        added = {"_src_node_id": self._node.node_id, "_created_at": asked.created_at, "_ttl": asked.ttl}
        reply.metadata.__dict__.update(added)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            bare = message_to_proto(remove_content_from_message(reply))
        pushed = self._asked(
            self._client.PushMessages,
            PushMessagesRequest(
                node=self._node,
                messages_list=[bare],
                message_object_trees=[tree],
            ),
        )
        push = make_push_object_fn_protobuf(
            lambda request: self._asked(self._client.PushObject, request), self._node, incoming.run, pushed.session_id
        )
        push_objects(objects, push, object_ids_to_push=set(pushed.objects_to_push))

    def close(self) -> None:
        """Say that the node goes offline, and close."""
        self._ended.set()
        with suppress(Unreachable, NotAdmitted):
            self._asked(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    def _asked(self, call: Callable[..., T], request: object) -> T:
        """The answer to a request, with typed errors."""
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status in (401, 403, 404):
                raise NotAdmitted("the coordinator's SuperLink does not know this site's key") from None
            kind = _OnlineAlready if status == 412 else Unreachable
            raise kind(f"the coordinator's SuperLink answered with status {status}") from None
        except (httpx.HTTPError, ssl.SSLError) as error:
            raise _unreachable(error, self._who, self._proxy) from None


class _OnlineAlready(Unreachable):
    """The SuperLink takes the node to be online, so it does not activate it."""


def _remembered(memory: Path | None, digest: str) -> int | None:
    """The number of the node of a key, if it was noted."""
    try:
        found = json.loads(memory.read_bytes()) if memory is not None else {}
        return int(found["node"]) if found.get("key") == digest else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def http_client(authorities: bytes, proxy: Proxy | None) -> httpx.Client:
    """TLS 1.3 only, to a server that one of `authorities` (PEM) certified; nothing is read of the environment.

    Flower's own client would take proxies from there, and follow wherever a server sends it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authorities.decode("ascii"))
    headers = {"proxy-authorization": proxy.authorization} if proxy is not None and proxy.authorization else {}
    way = httpx.Proxy(proxy.url, headers=headers) if proxy is not None else None
    return httpx.Client(verify=context, timeout=CALL_S, trust_env=False, proxy=way)


def tls_version(address: str, authorities: bytes, proxy: Proxy | None) -> str:
    """The TLS by which the fleet's port answers, on the very way that messages take. No node is activated.

    Raises:
        Unreachable: it does not answer; the cause is named.
    """
    with http_client(authorities, proxy) as client:
        try:
            answer = client.post(f"https://{address}/v1/fleet/")
        except (httpx.HTTPError, ssl.SSLError) as error:
            raise _unreachable(error, f"the fleet at {address}", proxy) from None
        return str(answer.extensions["network_stream"].get_extra_info("ssl_object").version())


def _unreachable(error: Exception, who: str, proxy: Proxy | None) -> Unreachable:
    text = f"{type(error).__name__}: {error}"
    return unreachable(who, text, proxy.address if proxy is not None else None)
