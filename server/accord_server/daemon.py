"""`accord server up`: one process that supervises the SuperLink, serves its APIs, and drives the runs."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc

from accord_server.api import CoordinatorService, EnrolmentService, FederationService
from accord_server.audit import AuditLog
from accord_server.authority import Authority
from accord_server.database import Claim, Database
from accord_server.enrolment import Registrar
from accord_server.flower import SuperLink
from accord_server.metrics import Metrics
from accord_server.rosters import Rosters
from accord_server.runs import Runs
from accord_server.settings import CoordinatorFolder, CoordinatorSettings, database_password, host_port
from accord_server.sites import Sites
from accord_server.superlink import SuperLinkSettings
from accord_shared.errors import AccordError, Unreachable
from accord_shared.files import only_one
from accord_shared.service import logs, notify
from accord_shared.service.exposition import exposed
from accord_shared.service.keyfile import read_identity
from accord_shared.service.rpc import local_server, private_folder, secure_server

log = logging.getLogger(__name__)

START_S = 120.0
"""For the SuperLink to answer."""
DRAIN_S = 30.0
"""For rounds to come to their end."""
LOOK_S = 1.0
UPKEEP_S = 15.0
LOG_BYTES = 16 * 2**20


class SuperLinkProcess:
    """The child: started, watched, started again. It ends with its standard input, so by the coordinator's end too."""

    def __init__(self, settings: SuperLinkSettings, log_file: Path) -> None:
        self._settings, self._log = settings, log_file
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, commands: SuperLink, stopping: threading.Event) -> None:
        """Start it and wait until it answers.

        Raises:
            Unreachable: it ends, or does not answer in time: its log says why.
        """
        self.trim_log()
        self._settings.socket.unlink(missing_ok=True)
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "accord_server.superlink"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(self._log.parent)},
                process_group=0,  # a Ctrl-C at a terminal is for the coordinator, which ends the child when it is done
            )
        if self._process.stdin is not None:
            self._process.stdin.write(self._settings.to_line())
            self._process.stdin.flush()
        deadline = time.monotonic() + START_S
        while not commands.is_ready():
            if not self.is_alive() or time.monotonic() > deadline:
                raise Unreachable(f"the SuperLink did not start: see {self._log}")
            if stopping.wait(0.05):
                return

    def trim_log(self) -> None:
        """Put a long log aside, also while the process appends to it: a stranger's requests fill no disk."""
        with suppress(OSError):
            if self._log.stat().st_size > LOG_BYTES:
                with suppress(OSError):
                    shutil.copyfile(self._log, self._log.with_suffix(".log.1"))
                os.truncate(self._log, 0)

    def is_alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def read_certificate(self) -> None:
        """Make it read its certificate anew."""
        if self._process is not None and self.is_alive():
            self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """End it."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Daemon:
    """All parts of a running coordinator."""

    def __init__(self, folder: Path) -> None:
        paths, settings = CoordinatorFolder(folder), CoordinatorSettings.read(folder)
        self._paths, self._settings = paths, settings
        self.stopping = threading.Event()
        identity = read_identity(paths.identity)
        self._authority = Authority.load(folder, settings)
        self._database = Database(paths.database_url(settings), database_password())
        self._claim = Claim(self._database)
        self._audit = AuditLog(self._database)
        self._metrics = Metrics()
        link = SuperLinkSettings(
            host=settings.listen.host,
            port=settings.listen.fleet,
            certificate=paths.server_certificate,
            key=paths.server_key,
            socket=private_folder(paths.flower).resolve() / "link.sock",
            database=paths.flower.resolve() / "link.db" if settings.flower.state == "file" else None,
            control_token=SuperLinkSettings.new_secret(),
            superexec_secret=SuperLinkSettings.new_secret(),
        )
        self._superlink, self._process = SuperLink(link), SuperLinkProcess(link, paths.flower / "link.log")
        self._sites = Sites(self._database, self._audit, self._superlink, self._authority, settings)
        self._registrar = Registrar(self._database, self._authority, self._audit, settings, identity.keys)
        self._rosters = Rosters(paths.roster, settings.federation, self._audit)
        self._runs = Runs(
            self._database,
            self._audit,
            paths,
            settings,
            identity,
            self._superlink,
            self._sites,
            self._rosters,
            self._metrics,
            self._claim.check,
        )

    def serve(self) -> None:
        """Until `stopping` is set; then rounds come to their end, and nothing is left behind.

        Raises:
            AlreadyRunning: another coordinator drives the runs of the same database.
            Unreachable: a port is taken, or the SuperLink does not start.
        """
        with ExitStack() as stack:
            stack.callback(self._database.close)
            stack.callback(self._claim.close)
            self._claim.take()
            stack.callback(self._process.stop)
            self._audit.note("coordinator.started", self._settings.federation)
            stack.callback(self._audit.note, "coordinator.stopped", self._settings.federation)
            self._start_superlink()
            listen = self._settings.listen
            stack.enter_context(exposed(self._metrics.registry, listen.metrics_host, listen.metrics))
            self._runs.resume_all()  # before anybody can ask: what is shown as active is driven
            stack.callback(self._runs.drain, 0.0)
            for server in self._servers():
                server.start()
                stack.callback(_stop, server)
            stack.callback(self._runs.drain, DRAIN_S)
            log.info("the coordinator serves", extra={"federation": self._settings.federation, "pid": os.getpid()})
            notify.ready(f"federation {self._settings.federation}")
            self._watch()
            notify.stopping("rounds come to their end")
            log.info("the coordinator stops")

    def _servers(self) -> Iterator[grpc.Server]:
        listen, authority = self._settings.listen, self._authority
        federation = FederationService(self._sites, self._registrar, authority, self._rosters, self._runs)
        operator = CoordinatorService(
            self._settings, self._registrar, self._sites, self._rosters, self._runs, authority, self._superlink
        )
        yield secure_server(
            host_port(listen.host, listen.enrolment), authority.server_pair, EnrolmentService(self._registrar).add_to
        )
        yield secure_server(
            host_port(listen.host, listen.api),
            authority.server_pair,
            federation.add_to,
            clients_of=authority.authorities,
            workers=32,
        )
        yield local_server(self._paths.control, "coordinator", operator.add_to)

    def _start_superlink(self) -> None:
        with self._superlink.held():
            self._process.start(self._superlink, self.stopping)
            if not self.stopping.is_set():
                self._superlink.stop_runs()
                self._sites.admit_all()

    def _watch(self) -> None:
        """Look after everything until it is time to stop."""
        upkept = float("-inf")
        while not self.stopping.wait(LOOK_S):
            notify.alive()
            if not self._process.is_alive():
                log.error("the SuperLink ended: it is started again")
                with _logged("the SuperLink"):
                    self._start_superlink()
                with _logged("the audit log"):
                    self._audit.note("superlink.restarted", self._settings.federation)
            if time.monotonic() - upkept >= UPKEEP_S:
                upkept = time.monotonic()
                for what, look_after in (
                    ("upkeep", self._keep_up),
                    ("the SuperLink's keys", self._sites.admit_all),
                    ("metrics", self._show),
                ):
                    with _logged(what):  # one that fails keeps no other from its turn
                        look_after()

    def _keep_up(self) -> None:
        """Logs and certificates."""
        self._process.trim_log()
        if self._authority.renew_server_if_due():
            self._audit.note("certificate.renewed", "server")
        self._process.read_certificate()

    def _show(self) -> None:
        """What Prometheus reads; first what must be seen while the database is away."""
        self._metrics.superlink.set(self._superlink.is_ready())
        self._metrics.database.set(0)
        self._metrics.show_runs(info.state for info in self._runs.all())
        self._claim.check()
        self._metrics.show_sites(self._sites.list())
        self._metrics.show_certificates(
            int(self._authority.server_expiry().timestamp() * 1e6),
            int(self._authority.certificate().not_valid_after_utc.timestamp() * 1e6),
        )
        self._metrics.show_audit(self._audit.head()[0])
        self._metrics.database.set(1)


def _stop(server: grpc.Server) -> None:
    server.stop(1.0).wait(5.0)


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Upkeep that fails is told and tried again."""
    try:
        yield
    except AccordError as error:
        log.error("%s: %s: %s", what, type(error).__name__, error)
    except Exception:
        log.exception("%s failed", what)


def run(folder: Path, log_level: str = "INFO") -> None:
    """Run the coordinator of a folder until SIGTERM or SIGINT.

    Raises:
        AccordError: it cannot start.
    """
    os.umask(0o077)
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    CoordinatorSettings.read(folder)  # before anything is made
    private_folder(folder)
    logs.configure(log_level)
    with only_one(folder / "lock", f"the coordinator of {folder}"):
        daemon = Daemon(folder)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: daemon.stopping.set())
        daemon.serve()
