"""`noise`: what a site's share of noise costs under `noise = "cohort"`, beside numpy's Skellam sampler.

- **Noise**: everything that is random about one update of `dim` values: the coin to the grid, Gaussian rounding, the
  base and all removable components, added to the words. CPU milliseconds a million values, median of `repeats`.
- **Peer**: one Skellam vector of the variance that a site adds in all, as the difference of two of numpy's Poisson
  samples: neither cryptographic nor removable by a seed, and before any rounding.
- **Client**: trip 1 and the opening of the real `Member` on the real encoding: noise, rounding, masks with all other
  sites, packing, shares, signatures.
- **Randomness**: bytes of keystream that the noise takes (cells decide with 2 bytes; few values take 16 more).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field

from accord_shared.dp.accounting import noise_multiplier
from accord_shared.dp.noise import SecureGenerator
from accord_shared.dp.sharing import NoiseShares
from accord_shared.plan import make_plan
from accord_shared.quantize import encode
from accord_shared.secagg.thresholds import COMPLETE_MAX
from accord_simulations.bench._settings import BenchSettings
from accord_simulations.bench.secagg import CpuMeter, Federation, SecaggSettings
from accord_simulations.resources import versions


class NoiseSettings(BenchSettings):
    """Settings of `noise`."""

    clients: int = Field(default=10, ge=5, le=COMPLETE_MAX)
    dim: int = Field(default=1_000_000, ge=1, le=10**9)
    epsilon: float = Field(default=1.0, gt=0)
    rounds: int = Field(default=10, ge=1)
    repeats: int = Field(default=9, ge=1, le=1000)


def measure(settings: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Raises:
        PlanError: a setting is unknown or out of range.
    """
    chosen = NoiseSettings.read(settings)
    shares = _shares(chosen)
    progress(f"noise: {chosen.repeats} times {chosen.dim} values, {1 + len(shares.components)} parts")
    site = _Site(shares)
    noise_ms = _median_ms(site.add_noise, chosen.repeats)
    progress("noise: numpy's Skellam")
    peer_ms = _median_ms(site.add_skellam, chosen.repeats)
    progress(f"noise: a client's whole round among {chosen.clients}")
    federation = Federation(SecaggSettings(clients=chosen.clients, dim=chosen.dim, peer="none"), shares)
    attempts = [federation.attempt(CpuMeter()) for _ in range(1 + chosen.repeats)][1:]
    million = 1e6 / chosen.dim
    return {
        "noise_ms_per_million": round(noise_ms * million, 3),
        "peer_numpy_skellam_ms": round(peer_ms * million, 3),
        "speedup": round(peer_ms / noise_ms, 2),
        "bytes_of_randomness": site.bytes_of_randomness(),
        "client_ms": round(1e3 * statistics.median(attempt.client_cpu_s for attempt in attempts), 3),
        "server_ms": round(1e3 * statistics.median(attempt.server_cpu_s for attempt in attempts), 3),
        "exact": all(attempt.exact for attempt in attempts),
        "upload_bytes_per_parameter": attempts[-1].upload_bytes / chosen.dim,
        "bits": shares.bits,
        "components": len(shares.components),
        "deviations": [round(float(part) ** 0.5, 2) for part in (shares.base, *shares.components)],
        "excess_over_real_numbers": shares.excess,
        "n": chosen.clients,
        "d": chosen.dim,
        **chosen.model_dump(include={"epsilon", "rounds", "repeats"}),
        "versions": versions(),
    }


def _shares(settings: NoiseSettings) -> NoiseShares:
    """Of a plan with the default survivors."""
    plan = make_plan(
        {
            "run": {"name": "bench", "rounds": settings.rounds, "max_extra_attempts": 0},
            "model": {"source": "package:none"},
            "task": {"labels": ["a", "b"]},
            "local": {"expected_records": 1000, "clip_norm": 1.0},
            "privacy": {"noise": "cohort", "epsilon": settings.epsilon},
            "cohort": {"size": settings.clients},
        }
    )
    return NoiseShares.of(plan, settings.dim, noise_multiplier(plan))


class _Counting(SecureGenerator):
    """A generator that counts what it gives."""

    words = 0

    def uint64(self, count: int) -> Any:
        self.words += count
        return super().uint64(count)


class _Site:
    """A site's noise alone, and the peer's."""

    def __init__(self, shares: NoiseShares) -> None:
        self._shares, self._generator = shares, _Counting()
        self._zeros = np.zeros(shares.dimension)
        self._peer = np.random.default_rng(1)

    def add_noise(self) -> object:
        """Round a vector of zeros and add every part."""
        words = encode(self._zeros, self._shares, self._generator)
        for noise in self._shares.component_noise:
            noise.add(words, self._generator.uint64(4).tobytes())
        return words

    def add_skellam(self) -> object:
        """The same variance by numpy."""
        mean = float(self._shares.share(self._shares.minimum)) / 2
        count = self._shares.dimension
        return self._peer.poisson(mean, count) - self._peer.poisson(mean, count)

    def bytes_of_randomness(self) -> int:
        """Keystream of one update's noise: the generator's, and of each seed."""
        self._generator.words = 0
        encode(self._zeros, self._shares, self._generator)
        parts = (self._shares.base_noise, *self._shares.component_noise)
        return 8 * self._generator.words + sum(part.keystream_bytes(self._shares.dimension) for part in parts)


def _median_ms(work: Callable[[], object], repeats: int) -> float:
    times = []
    for repeat in range(repeats + 1):
        meter = CpuMeter()
        with meter.running():
            work()
        if repeat:
            times.append(meter.cpu_s)
    return 1e3 * statistics.median(times)
