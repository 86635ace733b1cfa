"""Real `accord` processes on this machine: started, watched, killed, restarted, and cleaned up, each with its folder.

Every process leads a session of its own, so that what it starts can be found and ended with it. Only what was started
here is ever signalled: a leader is reaped after its group is gone, so the group's number is still its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import psutil
import tomli_w

from accord_shared.errors import Aborted, MissingExtra, NotRunning, OutputError, Refused
from accord_shared.files import write_atomic
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc as rpcs
from accord_shared.service.rpc import local_channel

T = TypeVar("T")
POLL_S = 0.1
CALL_S = 30.0
COMMAND_S = 120.0
STOP_S = 30.0
"""A daemon that was told to stop has so long."""
START_S = 90.0
FINISHED = ("finished", "aborted", "stopped")


class Process:
    """One process and what it starts, with its log."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._environment = dict(environment)
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Id of the leader, and of its session and group; its zombie holds the number until `clear`.

        Raises:
            NotRunning: it was never started, or was cleared away.
        """
        if self._popen is None:
            raise NotRunning(f"{self.name} was not started")
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether the leader lives. It is not reaped here."""
        if self._popen is None:
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def start(self) -> None:
        """Start it, again too: what is left of the last time is ended first."""
        if self.running:
            raise Aborted(f"{self.name} runs already")
        self.clear()
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send a signal to the leader."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill -9 of the leader and, at the same time, of all that it started: the power is cut."""
        others = self.others()
        os.killpg(self.pid, signal.SIGKILL)
        for process in others:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._wait(STOP_S)

    def stop(self, within_s: float = STOP_S) -> int:
        """SIGTERM to the leader; its exit code. What it leaves behind is left for `others` to see.

        Raises:
            Aborted: it does not end in time.
        """
        if self.running:
            self.signal(signal.SIGTERM)
        return self._wait(within_s)

    def _wait(self, within_s: float) -> int:
        deadline = time.monotonic() + within_s
        while self.running:
            if time.monotonic() > deadline:
                raise Aborted(f"{self.name} did not stop within {within_s:g} s")
            time.sleep(POLL_S)
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return 0
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def others(self) -> list[psutil.Process]:
        """Living processes of its session beside the leader."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.pid != process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, ProcessLookupError):
                continue
        return found

    def clear(self) -> None:
        """End whatever is left of it. The leader is reaped last: until then its group's number is nobody else's."""
        if self._popen is None:
            return
        self.kill()
        self._popen.wait()
        self._popen = None

    def last_line(self) -> str:
        """The end of its log, for a message."""
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        written = [line.strip() for line in lines if line.strip()]
        return written[-1][:300] if written else "nothing was logged"


def accord_command() -> str:
    """The `accord` script of this environment.

    Raises:
        MissingExtra: there is none beside the interpreter.
    """
    script = Path(sys.executable).with_name("accord")
    if not script.exists():
        raise MissingExtra(f"the command accord is not installed beside {sys.executable}")
    return str(script)


def clean_environment(root: Path) -> dict[str, str]:
    """Of every process: nothing of the user's own federation, no network for models, one thread each."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCORD_", "FLWR_"))}
    return inherited | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(root / "flower"),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }


def free_ports(count: int) -> tuple[int, ...]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(one.getsockname()[1] for one in sockets)


def on_each(names: Iterable[T], action: Callable[[T], object]) -> None:
    """Do something for each name, two at a time; the first error is raised once all have ended."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        for done in [pool.submit(action, name) for name in names]:
            done.result()


@contextmanager
def new_root(keep: Path | None, prefix: str) -> Iterator[Path]:
    """A new folder, removed in the end unless it is the user's own; short, since sockets go into it.

    Raises:
        OutputError: the user's folder exists already.
    """
    if keep is not None:
        if keep.exists():
            raise OutputError(f"{keep} exists already and is not overwritten")
        keep.mkdir(parents=True, mode=0o700)
        yield keep.absolute()
        return
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Deployment:
    """A coordinator and its sites in folders under `root`, as an operator would have them on several machines.

    `settings` are changes to the coordinator's settings, table by table. Leaving the context ends every process that
    was started in it, on Ctrl-C too.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        *,
        federation: str = "demo",
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        environment: Mapping[str, str] | None = None,
        log_level: str = "INFO",
    ) -> None:
        self.root = root
        self.names = tuple(names)
        self.federation = federation
        self.server_folder = root / "server"
        self.logs = root / "logs"
        self.roster_key = root / "roster-key.pem"
        self.roster_file = root / "roster.json"
        self.environment = {**clean_environment(root), **(environment or {})}
        self._settings = {key: dict(value) for key, value in (settings or {}).items()}
        self._processes: list[Process] = []
        level = ("--log-level", log_level)
        self.coordinator = self.process("coordinator", "server", "up", "--folder", str(self.server_folder), *level)
        self.agents = {
            name: self.process(name, "site", "up", "--folder", str(self.site_folder(name)), *level)
            for name in self.names
        }

    def __enter__(self) -> Self:
        for folder in (self.root, self.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _uninterrupted():
            self.end()

    def site_folder(self, name: str) -> Path:
        """A site's folder."""
        return self.root / "sites" / name

    def process(self, name: str, *arguments: str, command: Sequence[str] | None = None) -> Process:
        """A process of this deployment that is not started yet; `command` stands in for that of `accord`."""
        made = Process(
            name, [*(command or [accord_command()]), *arguments], self.environment, self.logs / f"{name}.log"
        )
        self._processes.append(made)
        return made

    def end(self) -> None:
        """Tell all to stop, wait, and end what is left."""
        living = [process for process in self._processes if process.running]
        for process in reversed(living):  # sites first: they say goodbye to the coordinator
            process.signal(signal.SIGTERM)
            process.signal(signal.SIGCONT)
        deadline = time.monotonic() + STOP_S / 2
        while any(process.running for process in living) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for process in self._processes:
            process.clear()

    # --- commands

    def accord(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Run `accord … --json` to its end; the object that it prints.

        Raises:
            Aborted: it ends with another exit code, or not at all.
        """
        done = self.command(*arguments, "--json")
        said = done.stderr.strip().splitlines()
        if done.returncode != code:
            shown = " ".join(arguments[:3])
            raise Aborted(f"accord {shown} ended with {done.returncode}: {said[-1] if said else 'it said nothing'}")
        lines = done.stdout.strip().splitlines()
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return found

    def command(self, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run `accord …` to its end, whatever it is."""
        try:
            return subprocess.run(
                [accord_command(), *arguments],
                env=self.environment,
                cwd=self.root,
                input=given,
                stdin=subprocess.DEVNULL if given is None else None,
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise Aborted(f"accord {' '.join(arguments[:3])} did not end within {COMMAND_S:g} s") from None

    def server(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """`accord server …` on the coordinator's folder."""
        return self.accord("server", *arguments, "--folder", str(self.server_folder), code=code)

    def site(self, name: str, *arguments: str, code: int = 0) -> dict[str, Any]:
        """`accord site …` on a site's folder."""
        return self.accord("site", *arguments, "--folder", str(self.site_folder(name)), code=code)

    # --- from nothing to a federation

    def make_coordinator(self) -> None:
        """`accord server init`, with ports that are free here."""
        self.server("init", "--federation", self.federation)
        path = self.server_folder / "coordinator.toml"
        table = tomllib.loads(path.read_text())
        ports = dict(zip(("fleet", "api", "enrolment", "metrics"), free_ports(4), strict=True))
        for name, values in {"listen": ports, **self._settings}.items():
            table[name] = {**table.get(name, {}), **values}
        write_atomic(path, tomli_w.dumps(table).encode(), mode=0o600)

    def start_coordinator(self) -> None:
        """`accord server up`, until it commands its SuperLink."""
        self.coordinator.start()
        self.wait_for("the coordinator", lambda: self.status().superlink, self.coordinator, within_s=START_S)

    def enrol(self, name: str, *, site: str, policy: str) -> None:
        """Invite a site, let it enrol, and write what its operator decides: settings and policy, as TOML."""
        token = self.server("invite", name)["token"]
        self.site(name, "enrol", token)
        write_atomic(self.site_folder(name) / "site.toml", site.encode(), mode=0o600)
        write_atomic(self.site_folder(name) / "policy.toml", policy.encode(), mode=0o600)

    def make_roster(self, minimum: int, colluders: int, names: Sequence[str] | None = None) -> str:
        """Make the roster by a key of its own, away from the coordinator, and sign it; its hash."""
        folder = self.root / "members"
        self.server("sites", "export", str(folder))
        entries = [str(folder / f"{name}.json") for name in names or self.names]
        limits = ["--minimum", str(minimum), "--colluders", str(colluders)]
        key, file = str(self.roster_key), str(self.roster_file)
        self._done("roster", "init", "--federation", self.federation, *limits, "--key", key, "--out", file)
        self._done("roster", "add", file, *entries)
        return self.sign_roster()

    def sign_roster(self) -> str:
        """Sign the roster as it is; its hash, which operators compare."""
        self._done("roster", "sign", str(self.roster_file), "--key", str(self.roster_key))
        return str(self.accord("roster", "show", str(self.roster_file))["roster_hash"])

    def _done(self, *arguments: str) -> None:
        done = self.command(*arguments)
        if done.returncode:
            raise Aborted(f"accord {' '.join(arguments[:2])}: {done.stderr.strip()[-300:]}")

    def start_agents(self, names: Sequence[str] | None = None) -> None:
        """`accord site up` at sites, until each answers its operator."""
        for name in names or self.names:
            self.agents[name].start()
        for name in names or self.names:
            self.wait_for_agent(name, "to answer", lambda status: status.state != "", START_S)

    def wait_ready(self, names: Sequence[str] | None = None, within_s: float = START_S) -> None:
        """Wait until agents are connected and admitted."""
        for name in names or self.names:
            self.wait_for_agent(name, "to be ready", lambda status: status.state in ("ready", "training"), within_s)

    def wait_for_agent(
        self, name: str, what: str, condition: Callable[[pb.AgentStatus], bool], within_s: float = 60.0
    ) -> pb.AgentStatus:
        """Wait for an agent's state.

        Raises:
            Aborted: it does not come in time, or the agent ends.
        """

        def met() -> pb.AgentStatus | None:
            status = self.agent(name)
            return status if condition(status) else None

        return self.wait_for(f"{name} {what}", met, self.agents[name], within_s=within_s)

    # --- runs

    def submit(self, plan: Path) -> str:
        """`accord server run`: the run's name."""
        return str(self.server("run", str(plan))["run"])

    def approve_plan(self, plan_hash: str, names: Sequence[str] | None = None) -> None:
        """Each operator's yes, once the plan was offered."""
        for name in names or self.names:
            offered = partial(self._was_offered, name, plan_hash)
            self.wait_for(f"the plan at {name}", offered, self.agents[name])
        on_each(names or self.names, lambda name: self.site(name, "plan", "approve", plan_hash))

    def _was_offered(self, name: str, plan_hash: str) -> bool:
        return plan_hash in self.plans(name)

    def run(self, run: str) -> pb.RunInfo:
        """How a run stands.

        Raises:
            NotRunning: the coordinator is not.
        """
        with self.operator() as stub:
            runs: Sequence[pb.RunInfo] = stub.ListRuns(pb.Empty(), timeout=CALL_S).runs
        return next(info for info in runs if info.run == run)

    def wait_for_round(self, run: str, number: int, within_s: float = 120.0) -> pb.RunInfo:
        """Wait until a run has finished a round."""
        return self.wait_for_run(f"round {number}", run, lambda info: info.round >= number, within_s)

    def wait_finished(self, run: str, within_s: float = 180.0) -> pb.RunInfo:
        """Wait until a run is finished."""
        return self.wait_for_run("the run's end", run, lambda info: info.state == "finished", within_s)

    def wait_for_run(
        self, what: str, run: str, condition: Callable[[pb.RunInfo], bool], within_s: float = 120.0
    ) -> pb.RunInfo:
        """Wait for a run.

        Raises:
            Aborted: it ends otherwise, or the condition is not met in time.
        """

        def met() -> pb.RunInfo | None:
            info = self.run(run)
            if condition(info):
                return info
            if info.state in ("aborted", "stopped"):
                raise Aborted(f"run {run} is {info.state} after round {info.round}: {info.detail}")
            return None

        return self.wait_for(what, met, self.coordinator, within_s=within_s)

    # --- questions to the daemons, over their own sockets: a command each would take a second

    @contextmanager
    def operator(self) -> Iterator[Any]:
        """The coordinator's operator."""
        with local_channel(self.server_folder / "control", "coordinator", "the coordinator") as channel:
            yield rpcs.CoordinatorStub(channel)

    @contextmanager
    def at_site(self, name: str) -> Iterator[Any]:
        """A site's operator."""
        with local_channel(self.site_folder(name) / "control", "agent", f"the agent of {name}") as channel:
            yield rpcs.AgentStub(channel)

    def status(self) -> pb.StatusReply:
        """How the coordinator stands."""
        with self.operator() as stub:
            reply: pb.StatusReply = stub.Status(pb.Empty(), timeout=CALL_S)
            return reply

    def sites(self) -> dict[str, pb.SiteInfo]:
        """How the coordinator sees its sites."""
        with self.operator() as stub:
            return {site.name: site for site in stub.ListSites(pb.Empty(), timeout=CALL_S).sites}

    def agent(self, name: str) -> pb.AgentStatus:
        """How a site stands."""
        with self.at_site(name) as stub:
            reply: pb.AgentStatus = stub.Status(pb.Empty(), timeout=CALL_S)
            return reply

    def plans(self, name: str) -> dict[str, pb.PlanInfo]:
        """Plans that were offered to a site, by hash."""
        with self.at_site(name) as stub:
            return {plan.hash: plan for plan in stub.ListPlans(pb.Empty(), timeout=CALL_S).plans}

    def wait_for(self, what: str, condition: Callable[[], T | None], *watched: Process, within_s: float = 60.0) -> T:
        """Ask until the answer is true; daemons that are starting are waited for.

        Raises:
            Aborted: it takes too long, or a watched process ended.
        """
        deadline, problem = time.monotonic() + within_s, ""
        while True:
            try:
                answer = condition()
            except (NotRunning, Refused) as error:  # a daemon that starts has a new token before its socket, or after
                answer, problem = None, f": {error}"
            if answer:
                return answer
            for process in watched:
                if not process.running:
                    raise Aborted(f"{process.name} ended while waiting for {what}: {process.last_line()}")
            if time.monotonic() > deadline:
                logged = "; ".join(f"{process.name}: {process.last_line()}" for process in watched)
                raise Aborted(f"{what}: not within {within_s:g} s{problem} ({logged})")
            time.sleep(POLL_S)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ignore(number: int, frame: FrameType | None) -> None:
        del number, frame

    before = {number: signal.signal(number, ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
