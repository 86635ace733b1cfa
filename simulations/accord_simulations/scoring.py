"""The harness' own scores on held-out data. The protocol releases none of them."""

from __future__ import annotations

from accord_client.data import Examples
from accord_client.shapes import Indices
from accord_client.tasks.classification import score
from accord_client.trainer import predict
from accord_client.workspace import Workspace
from accord_shared.vectors import Vector


class Scorer:
    """Scores joint weights on fixed records with a model of its own."""

    def __init__(self, workspace: Workspace, examples: Examples) -> None:
        self._workspace = workspace
        self._examples = examples
        self._batches = workspace.batches(examples)

    def predictions(self, weights: Vector) -> Indices:
        """Predicted class [n] of each record under `weights` [P]."""
        self._workspace.model.load(weights)
        return predict(self._workspace.model, self._batches, self._workspace.runtime)

    def score(self, weights: Vector) -> dict[str, float]:
        """The plan's metrics under `weights` [P]."""
        return self.score_predictions(self.predictions(weights))

    def score_predictions(self, predicted: Indices) -> dict[str, float]:
        """The plan's metrics of predicted classes [n]."""
        plan = self._workspace.plan
        return score(predicted, self._examples.labels, len(plan.task.labels), plan.evaluation.metrics)
