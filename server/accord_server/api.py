"""What the coordinator answers over gRPC: to invited sites, to enrolled ones, and to its operator."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from accord_server.authority import Authority
from accord_server.database import Site
from accord_server.enrolment import Registrar
from accord_server.flower import SuperLink
from accord_server.rosters import Rosters
from accord_server.runs import ACTIVE, Runs
from accord_server.settings import CoordinatorSettings
from accord_server.sites import Sites
from accord_shared import __version__
from accord_shared.errors import OutputError, Refused
from accord_shared.service.actor import act_as
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc as services
from accord_shared.service.rpc import add_health_and_reflection, chunks, peer_certificate

DAY_S = 86400.0
MOST_FETCHES = 2
"""Models that a site fetches at one time."""


class EnrolmentService(services.EnrolmentServicer):
    """For whoever shows a token."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar

    def Enrol(self, request: pb.EnrolRequest, context: grpc.ServicerContext) -> pb.EnrolReply:  # noqa: N802
        """Use up a token."""
        act_as(f"site {request.name}")  # noted only if the token is of this name
        return self._registrar.enrol(request)

    def add_to(self, server: grpc.Server) -> None:
        """Serve it."""
        services.add_EnrolmentServicer_to_server(self, server)
        add_health_and_reflection(server, "accord.v1.Enrolment")


class FederationService(services.FederationServicer):
    """For sites: every call is of the site whose certificate TLS has checked, unless it was revoked."""

    def __init__(self, sites: Sites, registrar: Registrar, authority: Authority, rosters: Rosters, runs: Runs) -> None:
        self._sites, self._registrar, self._authority = sites, registrar, authority
        self._rosters, self._runs = rosters, runs
        self._lock = threading.Lock()
        self._fetchers: Counter[str] = Counter()

    def add_to(self, server: grpc.Server) -> None:
        """Serve it."""
        services.add_FederationServicer_to_server(self, server)
        add_health_and_reflection(server, "accord.v1.Federation")

    def _site(self, context: grpc.ServicerContext) -> Site:
        return self._sites.of_certificate(peer_certificate(context))

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloReply:  # noqa: N802
        """A sign of life, and what is new."""
        try:
            site = self._site(context)
            reply = self._sites.hello(site, request)
        except OutputError:
            self._sites.hear(peer_certificate(context), request)
            raise
        reply.authorities = self._authority.authorities()
        if site.state == "approved":
            reply.roster = self._rosters.hash
            reply.models.extend(self._runs.models(site.name))
        return reply

    def RenewCertificate(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewReply:  # noqa: N802
        """A certificate for the key that a site has now, or for a new one."""
        return self._registrar.renew(self._site(context), request)

    def GetRoster(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.RosterReply:  # noqa: N802
        """The roster and its endorsements."""
        self._site(context)
        return self._rosters.reply()

    def EndorseRoster(self, request: pb.EndorseRequest, context: grpc.ServicerContext) -> pb.RosterReply:  # noqa: N802
        """Keep an endorsement."""
        self._rosters.endorse(self._site(context).name, request.endorsement)
        return self._rosters.reply()

    def ListModels(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.ModelList:  # noqa: N802
        """Finished models that the site took part in."""
        return pb.ModelList(models=self._runs.models(self._site(context).name))

    def GetModel(self, request: pb.ModelRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:  # noqa: N802
        """One of them: its document, then its tensors in pieces."""
        site = self._site(context).name
        with self._fetching(site):
            signed, data = self._runs.model(site, request.run)
            yield pb.Chunk(document=signed.to_json())
            for piece in chunks(data):
                yield pb.Chunk(data=piece)

    @contextmanager
    def _fetching(self, site: str) -> Iterator[None]:
        """Few at a time: whoever reads slowly keeps a thread and the model's memory."""
        with self._lock:
            if self._fetchers[site] >= MOST_FETCHES:
                raise Refused(f"site {site!r} fetches {MOST_FETCHES} models already")
            self._fetchers[site] += 1
        try:
            yield
        finally:
            with self._lock:
                self._fetchers[site] -= 1


class CoordinatorService(services.CoordinatorServicer):
    """For the operator, over the local socket."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        registrar: Registrar,
        sites: Sites,
        rosters: Rosters,
        runs: Runs,
        authority: Authority,
        superlink: SuperLink,
    ) -> None:
        self._settings, self._registrar, self._sites = settings, registrar, sites
        self._rosters, self._runs, self._authority, self._superlink = rosters, runs, authority, superlink

    def add_to(self, server: grpc.Server) -> None:
        """Serve it."""
        services.add_CoordinatorServicer_to_server(self, server)
        add_health_and_reflection(server, "accord.v1.Coordinator")

    def Status(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.StatusReply:  # noqa: N802
        """How the coordinator fares."""
        sites = self._sites.list()
        server, authority = self._authority.server_expiry(), self._authority.certificate().not_valid_after_utc
        up = self._superlink.is_ready()
        return pb.StatusReply(
            federation=self._settings.federation,
            version=__version__,
            superlink=up,
            roster=self._rosters.hash,
            certificate_expires_us=int(server.timestamp() * 1e6),
            authority_expires_us=int(authority.timestamp() * 1e6),
            warnings=list(self._warnings(sites, up=up)),
            sites_online=sum(site.online for site in sites),
            runs_active=sum(info.state in ACTIVE for info in self._runs.all()),
            process_id=os.getpid(),
        )

    def _warnings(self, sites: tuple[pb.SiteInfo, ...], *, up: bool) -> Iterator[str]:
        before = time.time() + self._settings.certificates.warn_days * DAY_S
        if not up:
            yield "the SuperLink does not answer"
        if not self._rosters.hash:
            yield "there is no roster yet"
        # A server's or site's certificate is renewed long before: if not, something keeps it from it.
        ends = {"the server's certificate": self._authority.server_expiry().timestamp()}
        ends["the authority"] = self._authority.certificate().not_valid_after_utc.timestamp()
        ends |= {f"the certificate of {site.name}": site.certificate_expires_us / 1e6 for site in sites}
        for subject, end in ends.items():
            if 0 < end < before:
                yield f"{subject} ends within {max(0.0, (end - time.time()) / DAY_S):.0f} days"
        for site in sites:
            if site.online and abs(site.skew_s) > self._settings.clock.most_skew_s:
                yield f"the clock of {site.name} is off by {site.skew_s:.0f} s"

    def Invite(self, request: pb.InviteRequest, context: grpc.ServicerContext) -> pb.InviteReply:  # noqa: N802
        """A token."""
        token, expires_us = self._registrar.invite(request.name, request.valid_s)
        return pb.InviteReply(token=token, expires_us=expires_us)

    def ListSites(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.SiteList:  # noqa: N802
        """All sites."""
        return pb.SiteList(sites=self._sites.list())

    def ApproveSite(self, request: pb.SiteName, context: grpc.ServicerContext) -> pb.SiteInfo:  # noqa: N802
        """Let a site take part."""
        return self._sites.approve(request.name)

    def RevokeSite(self, request: pb.SiteName, context: grpc.ServicerContext) -> pb.SiteInfo:  # noqa: N802
        """Refuse a site from now on."""
        return self._sites.revoke(request.name)

    def RotateSite(self, request: pb.SiteName, context: grpc.ServicerContext) -> pb.SiteInfo:  # noqa: N802
        """Ask a site for a new key."""
        return self._sites.rotate(request.name)

    def SetRoster(self, request: pb.RosterReply, context: grpc.ServicerContext) -> pb.RosterInfo:  # noqa: N802
        """Serve a roster; with an empty one: tell of the present one."""
        return self._rosters.set(request.roster) if request.roster else self._rosters.info()

    def StartRun(self, request: pb.StartRunRequest, context: grpc.ServicerContext) -> pb.RunInfo:  # noqa: N802
        """Begin a run."""
        return self._runs.start(request)

    def ListRuns(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.RunList:  # noqa: N802
        """All runs."""
        return pb.RunList(runs=self._runs.all())

    def WatchRun(self, request: pb.RunName, context: grpc.ServicerContext) -> Iterator[pb.RunEvent]:  # noqa: N802
        """A run's changes until it is not active."""
        is_heard: Callable[[], bool] = context.is_active
        return self._runs.watch(request.run, is_heard)

    def StopRun(self, request: pb.RunName, context: grpc.ServicerContext) -> pb.RunInfo:  # noqa: N802
        """Stop a run."""
        return self._runs.stop(request.run)

    def ResumeRun(self, request: pb.RunName, context: grpc.ServicerContext) -> pb.RunInfo:  # noqa: N802
        """Continue a run."""
        return self._runs.resume(request.run)

    def GiveUpRun(self, request: pb.RunName, context: grpc.ServicerContext) -> pb.RunInfo:  # noqa: N802
        """End a run for good."""
        return self._runs.give_up(request.run)
