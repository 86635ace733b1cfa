"""One cryptographic generator for everything private: Poisson selection and noise.

AES-256 in counter mode under a key from the operating system (NIST SP 800-90A's CTR generator without
reseeding; a key serves one release in one process and far fewer than 2^64 blocks). Whoever could predict it could
subtract the noise, so neither plan nor command line reaches the key: tests pass one to the constructor.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from accord_shared.errors import PrivacyError

_CHUNK = 1 << 16


def fresh_bytes(count: int, context: bytes = b"") -> bytes:
    """`count` secret random bytes, of the operating system's generator and of what no two machines share.

    A snapshot of a running machine has the state of that generator too, and two machines that go on from one snapshot
    would draw the same. Their clocks, boot ids, or what they are asked (`context`) set them apart.
    """
    facts = (os.urandom(32), time.time_ns(), time.monotonic_ns(), os.getpid(), _boot_id(), context)
    parts = [part if isinstance(part, bytes) else part.to_bytes(16, "big", signed=True) for part in facts]
    lengths = b"".join(len(part).to_bytes(8, "big") for part in parts)
    return hashlib.shake_256(b"accord fresh bytes" + lengths + b"".join(parts)).digest(count)


@lru_cache(maxsize=1)
def _boot_id() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return b""


class SecureGenerator:
    """A stream of cryptographic random numbers. Not shared over a fork: the child draws a new key."""

    def __init__(self, key: bytes | None = None) -> None:
        self._given = key is not None
        self._start(fresh_bytes(32) if key is None else key)

    def renew(self, context: bytes) -> None:
        """A new key, before every release. `context` is what is asked, whose nonces are not this machine's.

        A key that a test gave stays.
        """
        if not self._given:
            self._start(fresh_bytes(32, context))

    def __repr__(self) -> str:
        return "SecureGenerator(…)"

    def __reduce__(self) -> tuple[type[SecureGenerator], tuple[()]]:
        return (SecureGenerator, ())  # a copy elsewhere must never repeat this stream

    def _start(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        self._process = os.getpid()

    def uint64(self, count: int) -> npt.NDArray[np.uint64]:
        """Uniform 64-bit words [count]."""
        if os.getpid() != self._process:
            self._start(fresh_bytes(32))
        # Counter mode over zeros is the keystream itself.
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    def bernoulli(self, rate: float, count: int) -> npt.NDArray[np.bool_]:
        """Independent coins [count], each true with probability `rate` to within 2^-64.

        Raises:
            PrivacyError: `rate` is outside [0, 1].
        """
        if not 0.0 <= rate <= 1.0:
            raise PrivacyError(f"sampling rate {rate} is outside [0, 1]")
        if rate == 1.0:
            return np.ones(count, dtype=np.bool_)
        numerator, denominator = rate.as_integer_ratio()
        threshold = (numerator << 64) // denominator
        return self.uint64(count) < np.uint64(threshold)

    def gaussian(self, count: int, scale: float = 1.0) -> npt.NDArray[np.float64]:
        """Independent N(0, `scale`²) [count] in double precision (Box and Muller 1958).

        Uniforms have 53 bits, so values end at ±8.57 standard deviations: the tail left out weighs 1e-17.

        Raises:
            PrivacyError: `scale` is negative or not finite.
        """
        if not (scale >= 0.0 and math.isfinite(scale)):
            raise PrivacyError(f"noise scale {scale} is not a finite number ≥ 0")
        values = np.empty(count, dtype=np.float64)
        for start in range(0, count, _CHUNK):  # chunks stay in cache
            part = values[start : start + _CHUNK]
            half = (len(part) + 1) // 2
            bits = self.uint64(2 * half)
            uniform = ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53  # (0, 1]
            radius = np.sqrt(np.log(uniform[:half]) * -2.0)
            radius *= scale
            angle = uniform[half:] * (2.0 * math.pi)
            part[:half] = radius * np.cos(angle)
            part[half:] = (radius * np.sin(angle))[: len(part) - half]
        return values


def snap(values: npt.NDArray[np.float64], scale: float) -> npt.NDArray[np.float64]:
    """Round noised values to a public grid of 2^-20 `scale`: post-processing that costs no privacy.

    A double that carries noise betrays low-order bits of what it was added to (Mironov 2012); on a grid of
    which each cell holds > 2^30 reachable doubles, neighbouring inputs reach the same points.
    """
    if scale <= 0.0:
        return values
    grid = 2.0 ** (math.floor(math.log2(scale)) - 20)
    return np.round(values / grid) * grid
