"""What `accord plan check` tells about the model of a plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from accord_shared import PROTOCOL_VERSION
from accord_shared.messages import TrainReply, TrainRequest
from accord_shared.plan import Plan
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
    return {
        "trainable_parameters": dimension,
        "upload_bytes_per_site_round": payload_bytes(TrainReply(run_id, rounds, 1, vector)),
        "download_bytes_per_site_round": payload_bytes(request),
    }


def trainable_parameters(plan: Plan) -> int:
    """P of a plan, from its model's shapes."""
    import torch

    from accord_client.models import Encoder, EncoderModel, LabelFrame, verified

    encoder = Encoder(verified(plan.model), plan.task.max_tokens, plan.model.layer)
    classes = len(plan.task.labels)
    if plan.adapter.depth == "head":
        return classes * encoder.hidden_size
    frame = LabelFrame(torch.ones(classes, encoder.hidden_size), plan.adapter)
    return EncoderModel(encoder, frame, plan, "cpu").layout.dimension
