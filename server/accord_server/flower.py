"""The coordinator's end of Flower: admits nodes, starts runs, and takes their trips, over the SuperLink's Unix socket.

These are Flower's internal modules (flwr is pinned; `tests/contract` guards what is used). The coordinator is its own
executor: it acquires the task of a run that it started itself, so that no bundle is ever unpacked or imported here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.superexec_auth import SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClient, ProtobufRequestContext
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from accord_server.superlink import SuperLinkSettings
from accord_shared.errors import Unreachable

log = logging.getLogger(__name__)

C = TypeVar("C", bound=ProtobufClient)
MOST_OBJECTS = 10_000
"""Of a reply."""
MOST_REPLY = 1 << 30
"""Bytes of a reply."""
STARTING_S = 10.0
"""A run waits so long at a time for the process to be started."""
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class SuperLink:
    """Commands of the coordinator to its own SuperLink.

    Raises from every call `httpx.HTTPError` where the process is gone.
    """

    def __init__(self, settings: SuperLinkSettings) -> None:
        self._settings = settings
        self._starting = threading.Lock()
        """Held from a run's start until its task is acquired, lest another takes it; and while the process starts."""
        token = settings.control_token.get_secret_value()
        self._control = _client(ControlHttpClient, settings.socket, _Bearer(token))

    def close(self) -> None:
        """Close the connection; another call opens it again."""
        self._control.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the process starts and is rid of what an older one left: a run that began meanwhile would go too."""
        with self._starting:
            yield

    def is_ready(self) -> bool:
        """Whether the process answers."""
        if not self._settings.socket.exists():  # httpcore leaks a socket that nobody accepts
            return False
        try:
            self._control.ListNodes(ListNodesRequest())
        except (httpx.HTTPError, OSError):
            return False
        return True

    def nodes(self) -> dict[bytes, int]:
        """Node of each public key that is admitted."""
        listed = self._control.ListNodes(ListNodesRequest()).nodes_info
        return {bytes(node.public_key): node.node_id for node in listed if node.status != "unregistered"}

    def admit(self, public_key: bytes) -> int:
        """Let the holder of a key (PEM, a NIST curve) connect as a node; its id. Repeated it changes nothing."""
        known = self.nodes().get(public_key)
        if known is not None:
            return known
        return int(self._control.RegisterNode(RegisterNodeRequest(public_key=public_key)).node_id)

    def expel(self, public_key: bytes) -> None:
        """Refuse the holder of a key from its next request on."""
        known = self.nodes().get(public_key)
        if known is not None:
            self._control.UnregisterNode(UnregisterNodeRequest(node_id=known))

    def stop_runs(self) -> None:
        """End the runs that a coordinator before left behind, and what waits of them in the sites' mailboxes."""
        for number, run in self._control.ListRuns(ListRunsRequest()).run_dict.items():
            if run.status.status != "finished":
                self.stop_run(number)

    def stop_run(self, flower_run: int) -> None:
        """End one of Flower's runs, and what it still has in the sites' mailboxes; ended ones are left alone."""
        with suppress(httpx.HTTPStatusError):
            self._control.StopRun(StopRunRequest(run_id=flower_run))

    @contextmanager
    def run(self) -> Iterator[FastGrid]:
        """Start a Flower run and be its executor.

        Raises:
            Unreachable: the process is being started, or Flower does not hand the run out; trying again helps.
        """
        if not self._starting.acquire(timeout=STARTING_S):
            raise Unreachable("the SuperLink is being started")
        try:
            started = self._control.StartRun(StartRunRequest(fab=fab_to_proto(_bundle())))
            if not started.run_id:
                raise Unreachable("Flower did not start a run")
            grid = FastGrid(self._settings.socket, self._acquire(started.run_id))
        finally:
            self._starting.release()
        client = grid._runtime_client
        heartbeat = HeartbeatSender(lambda: _beat(client))
        heartbeat.start()
        status, details = SubStatus.FAILED, "the coordinator stopped"
        try:
            task = client.PullTaskInput(PullTaskInputRequest())
            if task.run.run_id != started.run_id:
                raise Unreachable("Flower handed out another run than the coordinator's")
            grid.take(run_from_proto(task.run), task.task_id)
            yield grid
            status, details = SubStatus.COMPLETED, ""
        finally:
            with suppress(Exception):
                heartbeat.stop()
            with suppress(httpx.HTTPError, OSError):
                client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
            with suppress(httpx.HTTPError, OSError):  # its end is no reason to lose what the run came to
                self.stop_run(started.run_id)
            grid.close()

    def _acquire(self, flower_run: int) -> str:
        """Token of the task of our run. A task of a run that the coordinator did not start is taken, and ends there."""
        secret = bytes.fromhex(self._settings.superexec_secret.get_secret_value())
        sign = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE})
        with _client(RuntimeHttpClient, self._settings.socket, _version(), sign) as executor:
            for _ in range(100):
                task = executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
                if not task.token:
                    break
                if task.task.run_id == flower_run:
                    return str(task.token)
                log.warning("a run that the coordinator did not start is ended: %d", task.task.run_id)
                self.stop_run(task.task.run_id)
        raise Unreachable("Flower did not hand out the run")


class FastGrid(HttpGrid):
    """Flower's grid over the Unix socket, which waits for nothing that is late."""

    def __init__(self, socket: Path, token: str) -> None:
        super().__init__("superlink", insecure=True, token=token)
        self._socket = socket
        self._task = 0
        self._arriving: dict[str, _Arriving] = {}
        """By the message that they reply to."""

    def _connect(self) -> None:
        token = RuntimeTokenHttpInterceptor(token=self._token)
        self._client = _client(RuntimeHttpClient, self._socket, _version(), token)

    def take(self, run: Run, task: int) -> None:
        """Speak for a run from now on."""
        self.set_run(run)
        self._task = task
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.run_id, SUPERLINK_NODE_ID, task

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their ids. Flower holds one run a process and stamps it on all: here each gets its own."""
        given = list(messages)
        for message in given:
            message.metadata.__dict__.update(
                _run_id=self.run.run_id, _src_node_id=SUPERLINK_NODE_ID, _src_task_id=self._task
            )
        return super().push_messages(given)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages that are there as a whole. A malformed one, or one that was lost, is an error.

        A site announces a reply before it sends its objects. Until all are there it keeps nobody waiting.
        """
        asked = list(message_ids)
        fresh = [identity for identity in asked if identity not in self._arriving]  # Flower hands each out once
        answer = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=fresh))
        for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            self._arriving[message.metadata.reply_to_message_id] = _Arriving(message.metadata, tree)
        arrived: list[Message] = []
        for identity in asked:
            reply = self._arriving.get(identity)
            whole = self._whole(reply) if reply is not None else None
            if whole is not None:
                del self._arriving[identity]
                arrived.append(whole)
        return arrived

    def _whole(self, reply: _Arriving) -> Message | None:
        """A reply with its content; None while objects are missing.

        What a site wrote into its message counts for nothing: whose reply it is, and to what, Flower has checked.
        """
        run, metadata = self.run.run_id, reply.metadata
        try:
            contents = self._objects(reply)
            if contents is None:
                return None
            received = ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=metadata.message_id)
            self._runtime_client.ConfirmMessageReceived(received)
            message = inflate_object_from_contents(metadata.message_id, contents)
            if not isinstance(message, Message) or not (message.has_error() or isinstance(message.content, RecordDict)):
                raise TypeError("not a message")
        except (httpx.HTTPError, OSError):
            raise
        except ObjectPullError as error:
            return _lost(run, metadata.reply_to_message_id, str(error))
        except Exception as error:  # flwr inflates whatever it finds, and fails in many ways
            return _lost(run, metadata.reply_to_message_id, f"a malformed reply: {type(error).__name__}")
        message.metadata.__dict__.update(
            _message_id=metadata.message_id,
            _reply_to_message_id=metadata.reply_to_message_id,
            _src_node_id=metadata.src_node_id,
        )
        return message

    def _objects(self, reply: _Arriving) -> dict[str, bytes] | None:
        """All objects of a reply, or None: the one that is missing is asked for first the next time.

        Raises:
            ObjectPullError: Flower does not have one of them, or they are too many or too long.
        """
        pull = make_pull_object_fn_protobuf(
            pull_object_protobuf=self._runtime_client.PullObject, node=self.node, run_id=self.run.run_id
        )
        wanted = list(dict.fromkeys(item.object_id for item in iterate_object_tree(reply.tree)))
        if len(wanted) > MOST_OBJECTS:
            raise ObjectPullError(reply.metadata.message_id, f"more than {MOST_OBJECTS} objects")
        contents: dict[str, bytes] = {}
        length = 0
        for identity in dict.fromkeys([*reply.missing, *wanted]):
            try:
                contents[identity] = pull(identity)
            except ObjectUnavailableError:
                reply.missing = (identity,)
                return None
            length += len(contents[identity])
            if length > MOST_REPLY:
                raise ObjectPullError(reply.metadata.message_id, f"more than {MOST_REPLY} bytes")
        return contents


@dataclass
class _Arriving:
    """A reply that was announced."""

    metadata: Any
    tree: Any
    missing: tuple[str, ...] = ()


def _lost(run: int, reply_to: str, reason: str) -> Message:
    metadata = Metadata(
        run_id=run,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=reply_to,
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type="system",
    )
    return make_message(metadata=metadata, error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=reason))


@cache
def _bundle() -> Fab:
    """The bundle without logic that Flower wants (`flower_app/`)."""
    folder = files("accord_server") / "flower_app"
    content = {name: (folder / name).read_bytes() for name in ("pyproject.toml", "app.py")}
    fab, _ = build_fab_from_files(content)
    return Fab("", fab, {})


class _Bearer:
    """Shows the coordinator's token."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


def _version() -> RuntimeVersionHttpInterceptor:
    return RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")


def _client(kind: type[C], socket: Path, *interceptors: Any) -> C:
    client = kind(
        "http://superlink", interceptors=interceptors, verify=False
    )  # no TLS on a Unix socket: no authorities
    client._client.close()
    client._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=30.0)
    return client


def _beat(client: RuntimeHttpClient) -> bool:
    """A sign of life of the run; a miss is not the end."""
    try:
        return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
    except httpx.HTTPError:
        return False
