"""Flower's own SecAgg+ in one process: what Accord's secure aggregation is measured against.

Client (`secaggplus_mod`) and server (`SecAggPlusWorkflow`) are the installed ones, quantisation, conversion of arrays
to bytes and unmasking included. Only the transport is not: messages pass through Flower's protobuf form, which nobody
pays for, so that a client can no more write into the server's objects than over a network. Where there is a choice
it favours Flower: the request carries no model, training and turning its result into bytes are free, and the server's
strategy is Flower's default, `FedAvg`.

Of the protocol's settings Flower has defaults for all but two. `num_shares = 1.0` is its "every other client is a
neighbour" (that of its `SecAggWorkflow`), which matches Accord's masks between all pairs. `reconstruction_threshold =
2/3` is the usual tolerance of a third dropping out, and that of Flower's example (2 of 3 shares). The rest is left
alone: weights up to 1000, clipping at ±8, 22 bits a value, sums modulo 2³². Vectors lie within ±1, so none is clipped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flwr.client.mod import secaggplus_mod
from flwr.common import (
    ArrayRecord,
    Code,
    ConfigRecord,
    Context,
    FitRes,
    Message,
    Parameters,
    RecordDict,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common.recorddict_compat import arrayrecord_to_parameters, fitres_to_recorddict
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from accord_shared.errors import Aborted, PlanError
from accord_simulations.bench._peers import _quiet

_SHARES, _THRESHOLD = 1.0, 2 / 3
_RUN = 1
_TRIPS = 4


@dataclass(frozen=True)
class FlowerSecAgg:
    """What one sum costs."""

    client_cpu_s: float
    """Of the whole protocol: the median over the clients that did not drop."""
    server_cpu_s: float
    upload_bytes_per_parameter: float
    """Of the message with the masked vector."""
    trips: int


def measure_flower_secagg(
    clients: int, dimension: int, dropped: int, seed: int = 0, *, shares: int | None = None
) -> FlowerSecAgg:
    """One weighted average of `clients` vectors, of which `dropped` keep silent once keys are shared.

    `shares` is Flower's `num_shares` as a number: a client has one neighbour less. Without it all are neighbours.

    Raises:
        PlanError: a number is out of range.
        Aborted: Flower gave up, since too few clients were left, or its average is wrong.
    """
    if shares is not None and not 3 <= shares <= clients:
        raise PlanError(f"Flower's SecAgg+ cannot give {shares} shares to {clients} clients")
    if clients < 2 or dimension < 1 or not 0 <= dropped < clients:
        raise PlanError(f"Flower's SecAgg+ cannot add {clients} vectors of {dimension} values with {dropped} dropped")
    everyone = [_Client(index + 1, dimension, seed) for index in range(clients)]
    survivors = everyone[: clients - dropped]
    wire = _Wire(everyone, silent={client.node for client in everyone[clients - dropped :]})
    _be_a_server_process()
    context = _server_context(wire, everyone)
    workflow = SecAggPlusWorkflow(_SHARES if shares is None else shares, _THRESHOLD)
    with _quiet():
        started = time.process_time()
        workflow(cast(Grid, wire), context)
        elapsed = time.process_time() - started
    _check(context, workflow, survivors)
    if wire.trips != _TRIPS:
        raise Aborted(f"Flower's SecAgg+ took {wire.trips} trips, not {_TRIPS}")
    return FlowerSecAgg(
        client_cpu_s=statistics.median(client.cpu_s for client in survivors),
        server_cpu_s=elapsed - wire.cpu_s,
        upload_bytes_per_parameter=statistics.mean(wire.uploads) / dimension,
        trips=wire.trips,
    )


def _be_a_server_process() -> None:
    """What Flower sets when it starts a ServerApp: without it no message can be made."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = _RUN, 1, SUPERLINK_NODE_ID


def _context(node: int) -> Context:
    return Context(run_id=_RUN, node_id=node, node_config={}, state=RecordDict(), run_config={})


class _Client:
    """A client with its vector, weight, protocol state and meter."""

    def __init__(self, node: int, dimension: int, seed: int) -> None:
        generator = np.random.default_rng((seed, node))
        self.node = node
        self.vector = generator.uniform(-1, 1, dimension).astype(np.float32)
        self.examples = int(generator.integers(500, 1001))
        self.cpu_s = 0.0
        self._context = _context(node)

    def answer(self, request: Message) -> Message:
        """One step of the protocol, on the meter."""
        started = time.process_time()
        reply = secaggplus_mod(request, self._context, self._train)
        self.cpu_s += time.process_time() - started
        return reply

    def _train(self, request: Message, context: Context) -> Message:
        """Hand out the vector, off the meter."""
        del context
        started = time.process_time()
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([self.vector]), self.examples, {})
        reply = Message(fitres_to_recorddict(result, keep_input=False), reply_to=request)
        self.cpu_s -= time.process_time() - started
        return reply


class _Wire:
    """The one method of Flower's `Grid` that the workflow calls; `cpu_s` is all that passes in it."""

    def __init__(self, clients: list[_Client], silent: set[int]) -> None:
        self._clients = {client.node: client for client in clients}
        self._silent = silent
        self.cpu_s = 0.0
        self.trips = 0
        self.uploads: list[int] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies of those that answer."""
        del timeout
        started = time.process_time()
        self.trips += 1
        replies = [reply for message in messages if (reply := self._deliver(message)) is not None]
        self.cpu_s += time.process_time() - started
        return replies

    def _deliver(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        masked = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE] == Stage.COLLECT_MASKED_VECTORS
        if masked and node in self._silent:
            return None
        request = message_from_proto(message_to_proto(message))
        reply = message_to_proto(self._clients[node].answer(request))
        if masked:
            self.uploads.append(reply.ByteSize())
        return message_from_proto(reply)


class _Strict(FedAvg):
    """Flower's default strategy, which averages what the workflow decoded; here a failed client ends the run."""

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[Parameters | None, dict[str, Any]]:
        """As FedAvg.

        Raises:
            Aborted: a client failed.
        """
        if failures:
            raise Aborted(f"a client of Flower's SecAgg+ failed: {failures[0]}")
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        return parameters, dict(metrics)


def _server_context(wire: _Wire, clients: list[_Client]) -> LegacyContext:
    manager = SimpleClientManager()
    for client in clients:
        manager.register(GridClientProxy(client.node, cast(Grid, wire), _RUN))
    context = LegacyContext(_context(SUPERLINK_NODE_ID), strategy=_Strict(), client_manager=manager)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
    return context


def _check(context: LegacyContext, workflow: SecAggPlusWorkflow, survivors: list[_Client]) -> None:
    """Compare the decoded average with that of the vectors.

    Each client rounds a value at random to a multiple of `step` and hits it within one; half a step more is for fp32.

    Raises:
        Aborted: there is none, or it is further away.
    """
    decoded = parameters_to_ndarrays(arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True))
    if not decoded:
        raise Aborted(f"Flower's SecAgg+ halted with {len(survivors)} clients left")
    weights = [client.examples for client in survivors]
    step = 2 * workflow.clipping_range / workflow.quantization_range
    error = float(np.abs(decoded[0] - _average(survivors)).max())
    if not error <= 1.5 * len(survivors) * step * workflow.max_weight / sum(weights):
        raise Aborted(f"the average of Flower's SecAgg+ is wrong by {error:.3g}")


def _average(clients: list[_Client]) -> NDArray[np.float64]:
    total = np.zeros(clients[0].vector.shape)
    for client in clients:
        total += client.examples * client.vector.astype(np.float64)
    return total / sum(client.examples for client in clients)
