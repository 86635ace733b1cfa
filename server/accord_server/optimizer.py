"""Server optimisers on the mean update: FedAvg and the adaptive ones of Reddi et al. 2021 (Algorithm 2).

The mean update Δ plays the part of a negative gradient. State is float64 [dimension] and belongs to the
checkpoint. Everything here is post-processing of a private release: it costs no epsilon.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from accord_shared.plan import ServerSpec

State = dict[str, npt.NDArray[np.float64]]
Float64 = npt.NDArray[np.float64]


def initial_state(spec: ServerSpec, dimension: int) -> State:
    """Empty moments of the optimiser that the plan names."""
    if spec.optimizer == "fedavg":
        return {}
    first: State = {"first": np.zeros(dimension)}
    if spec.optimizer == "fedavgm":
        return first
    return {**first, "second": np.full(dimension, spec.adaptivity**2)}


def step(spec: ServerSpec, state: State, delta: Float64) -> tuple[Float64, State]:
    """The change of the weights [dimension] and the next state, for the mean update `delta` [dimension]."""
    if spec.optimizer == "fedavg":
        return spec.learning_rate * delta, state
    if spec.optimizer == "fedavgm":
        velocity = spec.momentum * state["first"] + delta
        return spec.learning_rate * velocity, {"first": velocity}
    first = spec.momentum * state["first"] + (1.0 - spec.momentum) * delta
    second = _SECOND_MOMENTS[spec.optimizer](spec, state["second"], delta**2)
    change = spec.learning_rate * first / (np.sqrt(second) + spec.adaptivity)
    return change, {"first": first, "second": second}


def _adam(spec: ServerSpec, second: Float64, square: Float64) -> Float64:
    return spec.second_moment * second + (1.0 - spec.second_moment) * square


def _yogi(spec: ServerSpec, second: Float64, square: Float64) -> Float64:
    return second - (1.0 - spec.second_moment) * square * np.sign(second - square)


def _adagrad(_: ServerSpec, second: Float64, square: Float64) -> Float64:
    return second + square


_SECOND_MOMENTS: dict[str, Callable[[ServerSpec, Float64, Float64], Float64]] = {
    "fedadam": _adam,
    "fedyogi": _yogi,
    "fedadagrad": _adagrad,
}
