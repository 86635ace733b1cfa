from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("name", "secret", "certificate_request", "member", "member_signature", "clock_us")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    MEMBER_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_US_FIELD_NUMBER: _ClassVar[int]
    name: str
    secret: str
    certificate_request: bytes
    member: str
    member_signature: bytes
    clock_us: int
    def __init__(self, name: _Optional[str] = ..., secret: _Optional[str] = ..., certificate_request: _Optional[bytes] = ..., member: _Optional[str] = ..., member_signature: _Optional[bytes] = ..., clock_us: _Optional[int] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("certificate", "authorities", "coordinator", "fleet_address", "api_address", "federation")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITIES_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    FLEET_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    API_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    authorities: bytes
    coordinator: str
    fleet_address: str
    api_address: str
    federation: str
    def __init__(self, certificate: _Optional[bytes] = ..., authorities: _Optional[bytes] = ..., coordinator: _Optional[str] = ..., fleet_address: _Optional[str] = ..., api_address: _Optional[str] = ..., federation: _Optional[str] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("boot", "version", "protocol", "clock_us", "state", "roster")
    BOOT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLOCK_US_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    boot: str
    version: str
    protocol: int
    clock_us: int
    state: str
    roster: str
    def __init__(self, boot: _Optional[str] = ..., version: _Optional[str] = ..., protocol: _Optional[int] = ..., clock_us: _Optional[int] = ..., state: _Optional[str] = ..., roster: _Optional[str] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("clock_us", "state", "authorities", "certificate_expires_us", "renew", "roster", "models")
    CLOCK_US_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITIES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_EXPIRES_US_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    clock_us: int
    state: str
    authorities: bytes
    certificate_expires_us: int
    renew: bool
    roster: str
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, clock_us: _Optional[int] = ..., state: _Optional[str] = ..., authorities: _Optional[bytes] = ..., certificate_expires_us: _Optional[int] = ..., renew: _Optional[bool] = ..., roster: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("certificate_request", "member_signature", "name")
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MEMBER_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    certificate_request: bytes
    member_signature: bytes
    name: str
    def __init__(self, certificate_request: _Optional[bytes] = ..., member_signature: _Optional[bytes] = ..., name: _Optional[str] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate", "authorities")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITIES_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    authorities: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., authorities: _Optional[bytes] = ...) -> None: ...

class RosterReply(_message.Message):
    __slots__ = ("roster", "endorsements")
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    ENDORSEMENTS_FIELD_NUMBER: _ClassVar[int]
    roster: str
    endorsements: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, roster: _Optional[str] = ..., endorsements: _Optional[_Iterable[str]] = ...) -> None: ...

class EndorseRequest(_message.Message):
    __slots__ = ("endorsement",)
    ENDORSEMENT_FIELD_NUMBER: _ClassVar[int]
    endorsement: str
    def __init__(self, endorsement: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("run", "name", "plan_hash", "digest", "finished_us")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FINISHED_US_FIELD_NUMBER: _ClassVar[int]
    run: str
    name: str
    plan_hash: str
    digest: str
    finished_us: int
    def __init__(self, run: _Optional[str] = ..., name: _Optional[str] = ..., plan_hash: _Optional[str] = ..., digest: _Optional[str] = ..., finished_us: _Optional[int] = ...) -> None: ...

class ModelList(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ModelRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("document", "data")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    document: str
    data: bytes
    def __init__(self, document: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("federation", "version", "superlink", "roster", "certificate_expires_us", "authority_expires_us", "warnings", "sites_online", "runs_active", "process_id")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SUPERLINK_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_EXPIRES_US_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_EXPIRES_US_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    SITES_ONLINE_FIELD_NUMBER: _ClassVar[int]
    RUNS_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    federation: str
    version: str
    superlink: bool
    roster: str
    certificate_expires_us: int
    authority_expires_us: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    sites_online: int
    runs_active: int
    process_id: int
    def __init__(self, federation: _Optional[str] = ..., version: _Optional[str] = ..., superlink: _Optional[bool] = ..., roster: _Optional[str] = ..., certificate_expires_us: _Optional[int] = ..., authority_expires_us: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ..., sites_online: _Optional[int] = ..., runs_active: _Optional[int] = ..., process_id: _Optional[int] = ...) -> None: ...

class InviteRequest(_message.Message):
    __slots__ = ("name", "valid_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALID_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    valid_s: int
    def __init__(self, name: _Optional[str] = ..., valid_s: _Optional[int] = ...) -> None: ...

class InviteReply(_message.Message):
    __slots__ = ("token", "expires_us")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_US_FIELD_NUMBER: _ClassVar[int]
    token: str
    expires_us: int
    def __init__(self, token: _Optional[str] = ..., expires_us: _Optional[int] = ...) -> None: ...

class SiteName(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SiteInfo(_message.Message):
    __slots__ = ("name", "state", "fingerprint", "member", "enrolled_us", "seen_us", "certificate_expires_us", "online", "roster", "skew_s", "version", "paused", "says")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_US_FIELD_NUMBER: _ClassVar[int]
    SEEN_US_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_EXPIRES_US_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    SKEW_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    SAYS_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    fingerprint: str
    member: str
    enrolled_us: int
    seen_us: int
    certificate_expires_us: int
    online: bool
    roster: str
    skew_s: float
    version: str
    paused: bool
    says: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., fingerprint: _Optional[str] = ..., member: _Optional[str] = ..., enrolled_us: _Optional[int] = ..., seen_us: _Optional[int] = ..., certificate_expires_us: _Optional[int] = ..., online: _Optional[bool] = ..., roster: _Optional[str] = ..., skew_s: _Optional[float] = ..., version: _Optional[str] = ..., paused: _Optional[bool] = ..., says: _Optional[str] = ...) -> None: ...

class SiteList(_message.Message):
    __slots__ = ("sites",)
    SITES_FIELD_NUMBER: _ClassVar[int]
    sites: _containers.RepeatedCompositeFieldContainer[SiteInfo]
    def __init__(self, sites: _Optional[_Iterable[_Union[SiteInfo, _Mapping]]] = ...) -> None: ...

class RosterInfo(_message.Message):
    __slots__ = ("hash", "serial", "members", "endorsements", "quorum")
    HASH_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    ENDORSEMENTS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    hash: str
    serial: int
    members: int
    endorsements: int
    quorum: int
    def __init__(self, hash: _Optional[str] = ..., serial: _Optional[int] = ..., members: _Optional[int] = ..., endorsements: _Optional[int] = ..., quorum: _Optional[int] = ...) -> None: ...

class StartRunRequest(_message.Message):
    __slots__ = ("plan", "signature", "initial")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    plan: str
    signature: str
    initial: bytes
    def __init__(self, plan: _Optional[str] = ..., signature: _Optional[str] = ..., initial: _Optional[bytes] = ...) -> None: ...

class RunName(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class RunInfo(_message.Message):
    __slots__ = ("run", "name", "plan_hash", "state", "round", "rounds", "detail", "started_us", "changed_us", "metrics", "absent")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    STARTED_US_FIELD_NUMBER: _ClassVar[int]
    CHANGED_US_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    run: str
    name: str
    plan_hash: str
    state: str
    round: int
    rounds: int
    detail: str
    started_us: int
    changed_us: int
    metrics: str
    absent: _containers.RepeatedCompositeFieldContainer[AbsentSite]
    def __init__(self, run: _Optional[str] = ..., name: _Optional[str] = ..., plan_hash: _Optional[str] = ..., state: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., detail: _Optional[str] = ..., started_us: _Optional[int] = ..., changed_us: _Optional[int] = ..., metrics: _Optional[str] = ..., absent: _Optional[_Iterable[_Union[AbsentSite, _Mapping]]] = ...) -> None: ...

class AbsentSite(_message.Message):
    __slots__ = ("site", "why")
    SITE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    site: str
    why: str
    def __init__(self, site: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class RunList(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunInfo]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunInfo, _Mapping]]] = ...) -> None: ...

class RunEvent(_message.Message):
    __slots__ = ("info", "report")
    INFO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    info: RunInfo
    report: str
    def __init__(self, info: _Optional[_Union[RunInfo, _Mapping]] = ..., report: _Optional[str] = ...) -> None: ...

class AgentStatus(_message.Message):
    __slots__ = ("name", "state", "detail", "coordinator", "skew_s", "certificate_expires_us", "roster", "roster_offered", "warnings", "runs", "process_id", "preparations", "refusals")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    SKEW_S_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_EXPIRES_US_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    ROSTER_OFFERED_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    PREPARATIONS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    detail: str
    coordinator: str
    skew_s: float
    certificate_expires_us: int
    roster: str
    roster_offered: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    runs: _containers.RepeatedCompositeFieldContainer[SiteRun]
    process_id: int
    preparations: _containers.RepeatedCompositeFieldContainer[PlanPreparation]
    refusals: _containers.RepeatedCompositeFieldContainer[PlanRefusal]
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ..., coordinator: _Optional[str] = ..., skew_s: _Optional[float] = ..., certificate_expires_us: _Optional[int] = ..., roster: _Optional[str] = ..., roster_offered: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., runs: _Optional[_Iterable[_Union[SiteRun, _Mapping]]] = ..., process_id: _Optional[int] = ..., preparations: _Optional[_Iterable[_Union[PlanPreparation, _Mapping]]] = ..., refusals: _Optional[_Iterable[_Union[PlanRefusal, _Mapping]]] = ...) -> None: ...

class PlanPreparation(_message.Message):
    __slots__ = ("plan_hash", "state", "done", "total", "left_s", "problem")
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    plan_hash: str
    state: str
    done: int
    total: int
    left_s: float
    problem: str
    def __init__(self, plan_hash: _Optional[str] = ..., state: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., left_s: _Optional[float] = ..., problem: _Optional[str] = ...) -> None: ...

class PlanRefusal(_message.Message):
    __slots__ = ("plan_hash", "reason", "time_us")
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    plan_hash: str
    reason: str
    time_us: int
    def __init__(self, plan_hash: _Optional[str] = ..., reason: _Optional[str] = ..., time_us: _Optional[int] = ...) -> None: ...

class SiteRun(_message.Message):
    __slots__ = ("run", "plan_hash", "last_round", "releases")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_FIELD_NUMBER: _ClassVar[int]
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    run: str
    plan_hash: str
    last_round: int
    releases: int
    def __init__(self, run: _Optional[str] = ..., plan_hash: _Optional[str] = ..., last_round: _Optional[int] = ..., releases: _Optional[int] = ...) -> None: ...

class PlanHash(_message.Message):
    __slots__ = ("hash",)
    HASH_FIELD_NUMBER: _ClassVar[int]
    hash: str
    def __init__(self, hash: _Optional[str] = ...) -> None: ...

class PlanInfo(_message.Message):
    __slots__ = ("hash", "plan", "state", "detail", "seen_us", "signer", "cost")
    HASH_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    SEEN_US_FIELD_NUMBER: _ClassVar[int]
    SIGNER_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    hash: str
    plan: str
    state: str
    detail: str
    seen_us: int
    signer: str
    cost: str
    def __init__(self, hash: _Optional[str] = ..., plan: _Optional[str] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ..., seen_us: _Optional[int] = ..., signer: _Optional[str] = ..., cost: _Optional[str] = ...) -> None: ...

class PlanList(_message.Message):
    __slots__ = ("plans",)
    PLANS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[PlanInfo]
    def __init__(self, plans: _Optional[_Iterable[_Union[PlanInfo, _Mapping]]] = ...) -> None: ...
