"""What `accord plan check` tells about the model of a plan."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.accounting import epsilon, noise_multiplier, round_event
from accord_shared.dp.sharing import WRAP_BITS, NoiseShares
from accord_shared.identity import ED25519_SIGNATURE
from accord_shared.messages import TrainReply, TrainRequest
from accord_shared.plan import Plan
from accord_shared.quantize import packed_bytes
from accord_shared.secagg.dealing import map_bytes
from accord_shared.secagg.keys import BUNDLE_BYTES, TAG_BYTES, RunTerms
from accord_shared.secagg.shamir import SHARE_BYTES
from accord_shared.vectors import Vector
from accord_shared.wire import payload_bytes


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Trainable parameters, and bytes of the messages that carry them, per site and round.

    Raises:
        ModelError, PlanError: the plan's model is not there or does not have what the plan names.
    """
    dimension = trainable_parameters(plan)
    vector = np.broadcast_to(np.float32(0), (dimension,))
    run_id, rounds = "0" * 16, plan.run.rounds
    request = TrainRequest(PROTOCOL_VERSION, run_id, plan.hash, rounds, 1, vector)
    facts: dict[str, Any] = {
        "trainable_parameters": dimension,
        "upload_bytes_per_site_round": payload_bytes(TrainReply(run_id, rounds, 1, vector)),
        "download_bytes_per_site_round": payload_bytes(request),
    }
    return facts if plan.secure_aggregation.mode == "off" else facts | secure_facts(plan, dimension)


def secure_facts(plan: Plan, dimension: int) -> dict[str, Any]:
    """What secure aggregation makes of a plan whose model has `dimension` trainable parameters, `cohort.size` members.

    Bytes are those of PROTOCOL.md, section 12, for a whole cohort of which `cohort.minimum` sites survive; in a sparse
    graph with twice the degree of mask partners, as is expected; without the receipt of the site's ledger (about 4 kB).
    """
    cohort = plan.cohort.size
    terms = RunTerms.of(plan, "0" * 16, "0" * 64, cohort, dimension, noise_multiplier(plan))
    rule = terms.thresholds(cohort)
    holders, choices = rule.degree or cohort - 1, cohort * map_bytes(cohort) if terms.sparse else 0
    partners = min(2 * (rule.degree or cohort), cohort - 1)
    blob = map_bytes(cohort) + SHARE_BYTES * (1 + partners + terms.components) + TAG_BYTES
    opened = SHARE_BYTES * (holders + 1) * (1 + partners * (cohort - plan.cohort.minimum) // cohort)
    up = packed_bytes(terms.bits, terms.dimension) + TAG_BYTES + BUNDLE_BYTES + holders * blob + opened
    signers = cohort if terms.counts_signers else rule.sign
    certificate = (4 + ED25519_SIGNATURE) * signers if terms.mode == "malicious" else 0
    down = 4 * dimension + 32 + BUNDLE_BYTES * cohort + choices + 8 * cohort + certificate + holders * blob
    facts: dict[str, Any] = {} if terms.noise is None else noise_facts(plan, terms.noise)
    return facts | {
        "upload_bytes_per_site_round": up,
        "download_bytes_per_site_round": down,
        "signatures_needed": rule.sign if terms.mode == "malicious" else None,
        "shares_needed": rule.share,
        "neighbours": rule.degree or "all",
        "coordinate_bound": terms.bound,
        # Section 11: clamped coordinates of all sites fit into the modulus; section 13: noise after the clamp may not.
        "wrap_probability": 0.0 if terms.noise is None else 2.0**-WRAP_BITS,
    }


def noise_facts(plan: Plan, shares: NoiseShares) -> dict[str, Any]:
    """How the sites of a plan share its noise (PROTOCOL.md, section 13), and the second ε."""
    event = round_event(plan, shares.multiplier, shares.own_multiplier)
    all_collude = epsilon(
        [event] * plan.releases if event else [], plan.privacy.delta, plan.privacy.accountant, colluding=True
    )
    return {
        "epsilon_all_collude": all_collude,
        "own_noise_multiplier": shares.own_multiplier,
        "noise_components": len(shares.components),
        "grid_steps_per_clip_norm": shares.steps,
        "modulus_bits": shares.bits,
        "noise_excess": shares.excess,
    }


def trainable_parameters(plan: Plan) -> int:
    """P of a plan, from its model, which is loaded and checked for that.

    Raises:
        ModelError, PlanError: the plan's model is not there, is not sound, or does not have what the plan names.
        UnsupportedLayer: the plan clips gradients of a layer that has no exact one per record.
    """
    import torch

    from accord_client.gradients import GradientTape
    from accord_client.models import Encoder, EncoderModel, LabelFrame, verified

    encoder = Encoder(verified(plan.model), plan.task.max_tokens, plan.model.layer)
    classes = len(plan.task.labels)
    if plan.adapter.depth == "head":
        return classes * encoder.hidden_size
    frame = LabelFrame(torch.ones(classes, encoder.hidden_size), plan.adapter)
    model = EncoderModel(encoder, frame, plan, "cpu")
    if plan.local.clip_norm is not None:
        GradientTape(model.module)
    return model.layout.dimension


def initial_weights(plan: Plan) -> Vector:
    """The public weights [P] that a run of the plan starts from; its model is loaded for that.

    Raises:
        ModelError, PlanError: the plan's model is not there or does not have what the plan names.
    """
    from accord_client.features import FeatureCache
    from accord_client.trainer import Runtime
    from accord_client.workspace import Workspace

    with tempfile.TemporaryDirectory() as cache:
        return Workspace(plan, FeatureCache(Path(cache)), Runtime()).initial()
