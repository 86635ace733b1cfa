"""Every typed refusal of Accord, in one place.

The command line maps them to exit codes: `BadInput` and `Refused` end with 2, `Aborted` with 3
(the run can be resumed), `Interrupted` with 130. Messages are one line and never hold a secret.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line, without what would steer a terminal: it may be a stranger's."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


class AccordError(Exception):
    """Base of all errors that Accord raises on purpose."""

    exit_code = 2


class BadInput(AccordError):
    """Something that the user gave cannot be used: the message names it."""


class PlanError(BadInput):
    """A plan or scenario is malformed or contradicts itself."""


class DataError(BadInput):
    """A data set is missing, malformed, or does not fit the plan."""


class ModelError(BadInput):
    """A pretrained model cannot be loaded, or is not the one that the plan names."""


class OutputError(BadInput):
    """The output folder is not ours, belongs to another plan, or cannot be written."""


class CheckpointError(BadInput):
    """A checkpoint is damaged or belongs to another plan."""


class RosterError(BadInput):
    """A roster or a member's public entry is malformed, contradicts itself, or its signature does not verify."""


class IdentityError(BadInput):
    """A private key file cannot be read or written as asked; the message never tells what is in it."""


class SettingsError(BadInput):
    """A file of settings or a policy is malformed or contradicts itself."""


class NotRunning(BadInput):
    """The daemon or agent that a command speaks to is not there."""


class AlreadyRunning(BadInput):
    """Another process holds the folder."""


class MissingExtra(BadInput):
    """A command needs an optional dependency that is not installed."""


class Refused(AccordError):
    """A check that protects a participant said no."""


class PrivacyError(Refused):
    """A privacy rule would be broken: nothing was trained or released."""


class BudgetExhausted(PrivacyError):
    """The step would cost more than the plan's privacy budget."""


class LimitReached(PrivacyError):
    """The step or plan would cost more than the site's operator allows for a data set or a run."""


class LedgerDamaged(PrivacyError):
    """The privacy ledger is not what was written, so what was spent is unknown."""


class LedgerRolledBack(PrivacyError):
    """The privacy ledger is an old copy, or continued from one: a witness saw entries that it lacks."""


class PolicyRefused(Refused):
    """The site's policy does not allow what a plan asks."""


class PlanNotApproved(Refused):
    """The site's operator has not approved this plan yet."""


class SitePaused(Refused):
    """The site's operator has paused it."""


class SitePreparing(Refused):
    """The site still prepares its records for this plan."""


class ClockSkew(Refused):
    """The clocks of site and coordinator differ too much."""


class EnrolmentRefused(Refused):
    """A token is wrong, used, expired, or not for this site."""


class NotAdmitted(Refused):
    """The coordinator does not know this site, has not approved it yet, or has revoked it."""


class ImpostorError(Refused):
    """A peer is not who it should be: certificate, fingerprint or signature do not fit."""


class AuditDamaged(Refused):
    """The audit log is not what was written."""


class UnknownMechanism(PrivacyError):
    """An accountant met an event that it has no proof for; it never guesses."""


class UnsupportedLayer(PrivacyError):
    """Per-sample gradients of a trainable layer are not defined or not implemented."""


class ProtocolError(Refused):
    """A message does not follow the protocol: wrong version, plan, round, shape or key."""


class SessionLost(ProtocolError):
    """This process has no secrets of the run (it restarted): the site has to join again."""


class LedgerBehind(ProtocolError):
    """What a peer signed of its privacy ledger is older than what this site saw of it, or another past."""


class RoundOpened(ProtocolError):
    """This site helped to open a sum of this round: a second one would tell more than a sum."""


class NonFinite(Refused):
    """NaN or infinity in data, weights or an update."""


class Withheld(AccordError):
    """A site could not use its records. What it says is for the site alone; the coordinator learns the kind."""


class Aborted(AccordError):
    """The run stopped before its end and can be resumed."""

    exit_code = 3


class RoundAborted(Aborted):
    """Too few participants finished a round; nothing of it was used."""


class Unreachable(Aborted):
    """Nobody answers at an address; trying again may help."""


class UntrustedPeer(Unreachable):
    """Somebody answers, with a certificate of an authority that is not trusted here."""


class Interrupted(AccordError):
    """The user or the system asked to stop; the run can be resumed."""

    exit_code = 130


REFUSALS: dict[str, type[AccordError]] = {
    kind.__name__: kind
    for kind in (
        Withheld,
        PrivacyError,
        BudgetExhausted,
        LimitReached,
        LedgerDamaged,
        LedgerRolledBack,
        UnknownMechanism,
        ProtocolError,
        SessionLost,
        LedgerBehind,
        RoundOpened,
        NonFinite,
        ModelError,
        OutputError,
        MissingExtra,
        PlanError,
        ImpostorError,
        PolicyRefused,
        PlanNotApproved,
        SitePaused,
        SitePreparing,
        ClockSkew,
    )
}
"""Refusals that a site may send to the coordinator by name: they follow from plan, messages, ledger and machine. Any
other travels as `Withheld`."""

REFUSALS_IN_WORDS = (
    ProtocolError,
    BudgetExhausted,
    PlanError,
    ImpostorError,
    PolicyRefused,
    PlanNotApproved,
    SitePaused,
    SitePreparing,
    ClockSkew,
)
"""Those whose one line speaks of public things alone and may go with the name."""
