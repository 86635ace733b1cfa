"""Secret sharing: against big integers, what t - 1 holders see, and what is refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import ProtocolError
from accord_shared.secagg import shamir
from accord_shared.secagg.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, Shares, deal, from_bytes, rebuild, to_bytes

Random = Callable[[int], bytes]


def stream(label: bytes) -> Random:
    """SHA-256 of `label` and a counter, however it is cut."""
    buffer, counter = bytearray(), 0

    def draw(count: int) -> bytes:
        nonlocal counter
        while len(buffer) < count:
            buffer.extend(hashlib.sha256(label + counter.to_bytes(4, "big")).digest())
            counter += 1
        taken = bytes(buffer[:count])
        del buffer[:count]
        return taken

    return draw


def keystream(key: int) -> Random:
    generator = SecureGenerator(key.to_bytes(32, "big"))
    return lambda count: generator.uint64((count + 7) // 8).tobytes()[:count]


def by_big_integers(secrets: bytes, holders: Sequence[int], threshold: int, random: Random) -> list[list[list[int]]]:
    """The specification, word for word, without vectors. No redraw: `random` must not give p."""
    rows = [secrets[i : i + 32] for i in range(0, len(secrets), 32)]
    digits = [[int.from_bytes(row, "little") >> (30 * i) & (2**30 - 1) for i in range(9)] for row in rows]
    words = [
        [[int.from_bytes(random(4), "little") & PRIME for _ in range(9)] for _ in rows] for _ in range(threshold - 1)
    ]
    polynomials = [
        [[digits[s][i], *(words[k][s][i] for k in range(threshold - 1))] for i in range(9)] for s in range(len(rows))
    ]
    return [
        [[sum(c * (holder + 1) ** k for k, c in enumerate(poly)) % PRIME for poly in row] for row in polynomials]
        for holder in holders
    ]


KNOWN = {
    0: "a5bbd03a8aeae32b8b23581ed6d39b5757977d13a59b5e007d53515f5b3eb45053782426"
    "c6073a062e471b617a78570e63af721a86026a1ff96854157476fe715a189460262f4d77",
    1: "1010f51a03df9c1adb7b707b0282dd4b2f1e3c44788d4e1132528f49b976e17ac91c2b6c"
    "f4ab46206a2c17016329c313ce04b444abf866080d9e4936a601fd5e5048887a85f1ea4e",
    4: "f0a7632d667056207124fe2e913c99691ab06372cf498039435a3e138924e93db4cd8c7d"
    "ec425c6563904e5ab48e7f6e3ee94f22cd90cf7ce905ee5ea71ff907d565a520eaabad17",
    127: "798c31082ba97b6a4e80e14c903f2f29cddbc63359a8df18b86884278fb7fb0d6c110263"
    "50bee93b59943d2977efbb2de5236f5a3e1eb86e17c9841b549acd013ba5f9345a9e1a44",
}


def test_known_answer() -> None:
    secrets = bytes(range(32)) + bytes([255]) * 32
    shares = deal(secrets, list(KNOWN), 3, stream(b"shamir"))
    assert shares.shape == (4, 2, 9)
    assert shares.dtype == np.uint32
    assert [to_bytes(row).hex() for row in shares] == list(KNOWN.values())


@pytest.mark.parametrize(("count", "secrets", "threshold"), [(1, 1, 1), (4, 3, 4), (7, 2, 3), (30, 5, 21), (20, 1, 1)])
def test_shares_are_those_of_big_integers(count: int, secrets: int, threshold: int) -> None:
    content, holders = stream(b"content")(32 * secrets), [3 * i + i % 2 for i in range(count)]
    shares = deal(content, holders, threshold, stream(b"coins"))
    assert shares.tolist() == by_big_integers(content, holders, threshold, stream(b"coins"))
    assert rebuild(shares[-threshold:], holders[-threshold:]).tobytes() == content


def test_the_largest_factors_lose_no_bit() -> None:
    """Sums of more terms than one product holds, at points and coefficients as large as they get."""

    def largest(count: int) -> bytes:
        return (PRIME - 1).to_bytes(4, "little") * (count // 4)

    threshold, content = 300, bytes([255]) * SECRET_BYTES
    for holders in ([*range(300)], [*range(PRIME - 301, PRIME - 1)]):
        shares = deal(content, holders, threshold, largest)
        some = [0, 1, 127, 128, 299]
        expected = by_big_integers(content, [holders[i] for i in some], threshold, largest)
        assert shares[some].tolist() == expected
        assert rebuild(shares, holders).tobytes() == content


def test_a_product_at_the_edge_of_double_precision_is_exact() -> None:
    for terms in (127, 128, 129, 257):
        for left in (2**15 << 16 | 2**15, (2**15 - 1) << 16 | (2**15 - 1), PRIME - 1, 2**30 + 2**15):
            value = left % PRIME
            matrix = np.full((3, terms), value, dtype=np.int64)
            right = np.full((terms, 5), PRIME - 1, dtype=np.uint32)
            right[-1] = PRIME - 2
            expected = value * ((terms - 1) * (PRIME - 1) + PRIME - 2) % PRIME
            assert (shamir._product(matrix, right) == expected).all()


def test_words_outside_the_field_are_drawn_again() -> None:
    served: list[int] = []

    def random(count: int) -> bytes:
        served.append(count)
        words = np.full(count // 4, 5, dtype="<u4")
        if len(served) < 3:
            words[1] = 0xFFFFFFFF if len(served) == 1 else 6
            words[0] = 0x7FFFFFFF if len(served) == 1 else 0xFFFFFFFF
        else:
            words[0] = 0x80000007
        return words.tobytes()

    shares = deal(bytes(32), [0, 1], 2, random)
    assert served == [36, 8, 4]
    assert shares[0, 0].tolist() == [7, 6, 5, 5, 5, 5, 5, 5, 5]


def test_any_threshold_of_shares_rebuilds_and_more_do_too() -> None:
    rng, content = np.random.default_rng(1), os.urandom(32 * 30)
    shares = deal(np.frombuffer(content, dtype=np.uint8).reshape(30, 32), range(30), 21, os.urandom)
    for count in (21, 21, 21, 22, 30):
        rows = rng.permutation(30)[:count].tolist()
        assert rebuild(shares[rows], rows).tobytes() == content


# What t - 1 holders see of one digit: uniform pairs, whatever the secret is. The test is shown to tell biased dealers.


def _pairs_look_uniform(shares: Shares, cells: int = 8) -> bool:
    """χ² over the grid of two holders' values of the lowest digit; false alarms once in 10^6."""
    left, right = (shares[row, :, 0].astype(np.int64) * cells // PRIME for row in (0, 1))
    counts = np.bincount(left * cells + right, minlength=cells * cells)
    return float(stats.chisquare(counts).pvalue) > 1e-6


@pytest.mark.parametrize("content", [bytes(32), bytes([255]) * 32])
def test_fewer_shares_are_uniform(content: bytes) -> None:
    many = 20_000 * content
    assert _pairs_look_uniform(deal(many, [0, 1, 2], 3, keystream(1)))
    assert _pairs_look_uniform(deal(many, [9, 100, 2], 3, keystream(2)))


def test_the_test_of_uniformity_rejects_biased_dealers() -> None:
    many = 20_000 * bytes(32)
    fair = keystream(3)

    def half(count: int) -> bytes:
        return (np.frombuffer(fair(count), dtype="<u4") & np.uint32(2**30 - 1)).tobytes()

    def repeating(count: int) -> bytes:
        return fair(count // 2) * 2  # both coefficients are the same

    assert not _pairs_look_uniform(deal(many, [0, 1, 2], 2, fair))  # one holder less would do
    assert not _pairs_look_uniform(deal(many, [0, 1, 2], 3, half))
    assert not _pairs_look_uniform(deal(many, [0, 1, 2], 3, repeating))
    assert not _pairs_look_uniform(deal(many, [0, 1, 2], 1, fair))


# Refusals.


def _shares() -> Shares:
    return deal(stream(b"content")(96), range(5), 3, stream(b"coins"))


def test_wrong_shares_do_not_rebuild() -> None:
    shares = _shares()
    tampered = shares.copy()
    tampered[1] = (tampered[1] + 12345) % PRIME
    for rows, holders in (
        (tampered[:3], [0, 1, 2]),
        (shares[:3], [0, 1, 3]),
        (shares[[1, 0, 2]], [0, 1, 2]),
        (shares[:2], [0, 1]),
    ):
        with pytest.raises(ProtocolError, match="do not belong together"):
            rebuild(rows, holders)


@pytest.mark.parametrize(("digit", "value"), [(0, 2**30), (7, 2**31 - 2), (8, 2**16)])
def test_digits_out_of_range_are_refused(digit: int, value: int) -> None:
    shares = np.zeros((1, 2, 9), dtype=np.uint32)
    shares[0, 1, digit] = value - 1 if digit != 7 else 2**30 - 1
    rebuild(shares, [4])
    shares[0, 1, digit] = value
    with pytest.raises(ProtocolError, match="out of range"):
        rebuild(shares, [4])


@pytest.mark.parametrize("value", [PRIME, 2**31, 2**32 - 1])
def test_values_outside_the_field_are_refused(value: int) -> None:
    shares = _shares()
    shares[2, 1, 4] = value
    with pytest.raises(ProtocolError, match="outside the field"):
        rebuild(shares[:3], [0, 1, 2])
    with pytest.raises(ProtocolError, match="outside the field"):
        from_bytes(to_bytes(shares[2]))


@pytest.mark.parametrize("holders", [[0, 1, 1], [0, 1, -1], [0, 1, PRIME - 1], []])
def test_holders_are_distinct_indices(holders: list[int]) -> None:
    with pytest.raises(ProtocolError, match="holder"):
        rebuild(_shares()[: len(holders)], holders)
    with pytest.raises(ProtocolError, match="holder"):
        deal(bytes(32), holders, 1, os.urandom)


@pytest.mark.parametrize("threshold", [-1, 0, 4])
def test_thresholds_fit_the_holders(threshold: int) -> None:
    with pytest.raises(ProtocolError, match="threshold"):
        deal(bytes(32), [0, 1, 2], threshold, os.urandom)


@pytest.mark.parametrize(
    "secrets",
    [bytes(31), bytes(33), np.zeros(32, dtype=np.uint8), np.zeros((2, 31), np.uint8), np.zeros((2, 32), np.int64)],
)
def test_secrets_are_rows_of_32_bytes(secrets: bytes) -> None:
    with pytest.raises(ProtocolError, match="rows of 32"):
        deal(secrets, [0, 1], 2, os.urandom)


def test_shares_of_another_shape_are_refused() -> None:
    shares = _shares()
    for rows, holders in ((shares[:3], [0, 1]), (shares[:3, :, :8], [0, 1, 2]), (shares[:3, 0], [0, 1, 2])):
        with pytest.raises(ProtocolError, match="of shape"):
            rebuild(rows, holders)


def test_bytes_are_little_endian_words() -> None:
    shares = _shares()
    data = to_bytes(shares[1])
    assert len(data) == 3 * SHARE_BYTES
    assert int.from_bytes(data[4:8], "little") == shares[1, 0, 1]
    assert (from_bytes(data) == shares[1]).all()
    assert (from_bytes(data, 3) == shares[1]).all()
    for wrong, secrets in ((data[:-1], None), (data + b"\0", None), (data, 2), (data, 4), (b"", 1), (data[:35], 0)):
        with pytest.raises(ProtocolError, match="bytes came"):
            from_bytes(wrong, secrets)
