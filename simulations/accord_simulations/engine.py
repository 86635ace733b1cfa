"""The federation on Flower's simulation runtime (Ray): the deployed ServerApp and ClientApp, many nodes."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue, SimpleQueue
from threading import Event
from typing import Any

import torch

from accord_server.app import Timing, server_app
from accord_server.rounds import Coordinator
from accord_shared.errors import Aborted, AccordError, SettingsError, Unreachable
from accord_shared.files import has_home, open_private
from accord_shared.plan import Plan
from accord_shared.vectors import Vector
from accord_simulations.participants import ParticipantHandler, WorkFolder
from accord_simulations.scenario import Resources
from accord_simulations.vault import SimulatedRoster, vaults

_RAY_ADDRESS = re.compile(r"(ray://)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_KNOCK_S = 10.0
OBJECT_STORE_BYTES = 256 * 2**20
"""Ray's shared memory: messages in flight are all that goes through it."""


@dataclass(frozen=True)
class Secured:
    """Who takes part in secure aggregation: the roster, and the participants' names in their order."""

    roster: SimulatedRoster
    names: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """How a federation is run on this machine or on a Ray cluster."""

    resources: Resources
    ray_address: str | None = None
    log_file: Path | None = None

    def run(
        self,
        plan: Plan,
        coordinator: Coordinator,
        work: WorkFolder,
        *,
        secured: Secured | None,
        stopping: Callable[[], bool],
        on_joined: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> Vector:
        """All rounds that are left; returns the finished weights [P].

        Raises:
            RoundAborted, Interrupted, NonFinite: as `Coordinator.run`.
            Aborted: Flower or Ray failed.
        """
        os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
        if not has_home():  # Flower asks for its place there as it is imported, and puts nothing into it
            os.environ.setdefault("FLWR_HOME", str(work.root / "flower"))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        from flwr.simulation import run_simulation  # noqa: PLC0415

        from accord_client.app import client_app  # noqa: PLC0415

        finished: list[Vector] = []
        roster_hash = ""
        vault: AbstractContextManager[None] = nullcontext()
        if work.vault is not None and secured is not None:
            roster_hash, vault = secured.roster.signed.roster.hash, vaults(work.vault, secured.roster, secured.names)
        app = server_app(
            plan,
            coordinator,
            roster_hash=roster_hash,
            timing=Timing(trip_timeout_s=self.resources.round_timeout_s),
            stopping=stopping,
            on_joined=on_joined,
            on_finished=finished.append,
        )
        with _flower_log(self.log_file), self._ray(), vault, _prompt_delivery():
            try:
                run_simulation(
                    server_app=app,
                    client_app=client_app(ParticipantHandler(work)),
                    num_supernodes=work.participants,
                    backend_config={"client_resources": self._client_resources()},
                )
            except AccordError:
                raise
            except Exception as error:
                raise Aborted(f"Flower's simulation runtime failed: {str(error).splitlines()[0][:200]}") from error
        if not finished:
            raise Aborted("Flower's simulation runtime ended before the run did")
        return finished[0]

    @contextmanager
    def _ray(self) -> Iterator[None]:
        """A Ray cluster of our own, or the one at `ray_address`; Flower takes what it finds running.

        Raises:
            Aborted: Ray does not start, or nobody answers at the address.
        """
        import ray  # noqa: PLC0415

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        if self.ray_address is None:  # "local", lest RAY_ADDRESS in the environment names another
            options |= {"num_cpus": os.cpu_count() or 1, "object_store_memory": OBJECT_STORE_BYTES}
        try:
            ray.init(address=self.ray_address or "local", **options)
        except Exception as error:  # Ray lets errors of many kinds through, also of its own start timing out
            ray.shutdown()
            raise Aborted(f"Ray did not start: {(str(error) or type(error).__name__).splitlines()[0][:200]}") from None
        for number, handler in handlers.items():  # Ray's own handler would end the process in mid-write
            signal.signal(number, handler)
        try:
            found: Callable[[], Mapping[str, float]] = ray.cluster_resources
            _require_room(self.resources, found())
            yield
        finally:
            ray.shutdown()

    def _client_resources(self) -> dict[str, Any]:
        return {
            "num_cpus": self.resources.cpus_per_participant,
            "num_gpus": self.resources.gpus_per_participant,
            "max_restarts": -1,  # Flower keeps a dead actor in its pool: every message to it would fail from then on
        }


def check_start(resources: Resources, ray_address: str | None) -> None:
    """Somebody listens at the address, or without one a participant fits into this machine.

    Raises:
        SettingsError: Ray has no such addresses, or the machine is too small.
        Unreachable: nobody listens there.
    """
    if ray_address is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        _require_room(resources, {"CPU": os.cpu_count() or 1, "GPU": gpus})
        return
    if ray_address != "auto" and _RAY_ADDRESS.fullmatch(ray_address) is None:
        raise SettingsError(f"--ray-address {ray_address[:80]!r} is neither HOST:PORT, ray://HOST:PORT nor auto")
    _knock(ray_address)


def _require_room(resources: Resources, found: Mapping[str, float]) -> None:
    """One participant fits: Ray would wait for ever for what is not there."""
    for key, kind, wanted in (
        ("cpus", "CPU", resources.cpus_per_participant),
        ("gpus", "GPU", resources.gpus_per_participant),
    ):
        if wanted > found.get(kind, 0.0):
            have = f"{found.get(kind, 0.0):g}"
            raise SettingsError(f"resources.{key}_per_participant = {wanted:g}, but there are {have} {kind}s")


def _knock(address: str) -> None:
    """Somebody listens there: Ray itself would try for minutes.

    Raises:
        Unreachable: nobody does.
    """
    match = _RAY_ADDRESS.fullmatch(address)
    if match is None:  # "auto" finds what runs on this machine
        return
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), timeout=_KNOCK_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unreachable(f"no Ray at {address}: {reason}") from None


@contextmanager
def _prompt_delivery() -> Iterator[None]:
    """Deliver messages to the workers as they come: Flower's own loop asks for every node's every 100 ms.

    With a thousand nodes such a look takes seconds. The loop is internal to flwr (pinned); a contract test guards its
    name and arguments.
    """
    from flwr.server.superlink.fleet.vce import vce_api  # noqa: PLC0415

    def deliver(state: Any, queue: Queue[Any], nodes_mapping: dict[int, int], f_stop: Event) -> None:
        waiting: SimpleQueue[int] = SimpleQueue()
        store = state.store_message_ins

        def note(message: Any) -> Any:
            stored = store(message)
            waiting.put(message.metadata.dst_node_id)
            return stored

        state.store_message_ins = note
        for node in nodes_mapping:  # what came before
            waiting.put(node)
        while not f_stop.is_set():
            try:
                node = waiting.get(timeout=0.1)
            except Empty:
                continue
            for message in state.get_message_ins(node_id=node, limit=1):
                queue.put(message)

    flowers_own = vce_api.add_messages_to_queue
    vce_api.add_messages_to_queue = deliver
    try:
        yield
    finally:
        vce_api.add_messages_to_queue = flowers_own


@contextmanager
def _flower_log(path: Path | None) -> Iterator[None]:
    """Send Flower's log (tracebacks of simulated crashes included) and the coordinator's to a file."""
    if path is not None:
        open_private(path, "a").close()  # a traceback may quote what a participant worked on
    target = logging.FileHandler(path) if path is not None else logging.NullHandler()
    target.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("flwr", "accord_server")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers[:], logger.propagate = [target], False
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
        target.close()
