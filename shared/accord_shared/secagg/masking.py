"""Masks: AES-256 keystreams added to a vector of words (PROTOCOL.md, section 7, "Masks").

A seed is the key of one keystream and masks one vector of one attempt; counter mode starts at zero since a key is
never used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from accord_shared.errors import ProtocolError

Words = npt.NDArray[Any]
"""Unsigned words [dimension] of the least width that holds the modulus' bits."""

SEED_BYTES = 32
_CHUNK_BYTES = 1 << 17  # a chunk of the vector, one of keystream and the zeros stay in a core's own cache
_BLOCK = 16
_PARALLEL_BYTES = 1 << 26  # below, starting threads costs more than it saves


def word_type(bits: int) -> np.dtype[Any]:
    """The least unsigned little-endian word with room for `bits`.

    Raises:
        ProtocolError: more than 64.
    """
    for width in (1, 2, 4, 8):
        if bits <= 8 * width:
            return np.dtype(f"<u{width}")
    raise ProtocolError(f"a modulus of {bits} bits")


def add_masks(vector: Words, plus: Sequence[bytes], minus: Sequence[bytes], *, threads: int = 1) -> None:
    """Add the keystreams of the seeds `plus` to `vector` [d] in place, subtract those of `minus`.

    Modulo 2^(word width), of which 2^b is a divisor: the caller reduces at the end.
    """
    if threads <= 1 or vector.nbytes * (len(plus) + len(minus)) < _PARALLEL_BYTES:
        _add_range(vector, 0, plus, minus)
        return
    step = -(-vector.nbytes // threads // _CHUNK_BYTES) * _CHUNK_BYTES // vector.itemsize
    with ThreadPoolExecutor(threads) as pool:  # AES and numpy both release the interpreter's lock
        parts = [pool.submit(_add_range, vector[i : i + step], i, plus, minus) for i in range(0, len(vector), step)]
        for part in parts:
            part.result()


def _add_range(part: Words, offset: int, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Mask `part`, which begins at word `offset` of the whole vector (a multiple of the cipher's block)."""
    counter = (offset * part.itemsize // _BLOCK).to_bytes(_BLOCK, "big")
    streams = [(Cipher(algorithms.AES256(seed), modes.CTR(counter)).encryptor(), True) for seed in plus]
    streams += [(Cipher(algorithms.AES256(seed), modes.CTR(counter)).encryptor(), False) for seed in minus]
    zeros = bytes(_CHUNK_BYTES)
    scratch = bytearray(_CHUNK_BYTES)
    keystream = np.frombuffer(scratch, dtype=part.dtype)
    size = _CHUNK_BYTES // part.itemsize
    for start in range(0, len(part), size):
        words = part[start : start + size]
        source = memoryview(zeros)[: words.nbytes]
        stream = keystream[: len(words)]
        for encryptor, adds in streams:
            encryptor.update_into(source, scratch)
            (np.add if adds else np.subtract)(words, stream, out=words)


def reduce_words(vector: Words, bits: int) -> None:
    """Reduce `vector` [d] modulo 2^`bits` in place."""
    if bits < 8 * vector.itemsize:
        np.bitwise_and(vector, vector.dtype.type((1 << bits) - 1), out=vector)
