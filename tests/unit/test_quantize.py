"""Updates as integers: no sum wraps, rounding has no bias, planes are right to the bit, bounds do not clamp."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import NonFinite, PlanError, ProtocolError
from accord_shared.exact import fifty_digits
from accord_shared.plan import Plan, make_plan
from accord_shared.quantize import (
    Encoding,
    _adam_steps,
    _sgd_steps,
    add_packed,
    decode,
    default_bound,
    encode,
    pack,
    packed_bytes,
    unpack,
)

KEY = bytes(range(32))
MANY = 200_000
WIDTHS = [8, 13, 16, 17, 24, 32, 33, 40, 47, 48, 62]


def generator() -> SecureGenerator:
    return SecureGenerator(KEY)


def signed(words: npt.NDArray[Any], bits: int) -> list[int]:
    """The integers that words mod 2^bits stand for, one by one."""
    reduced = (int(word) % (1 << bits) for word in words)
    return [word - (word >> (bits - 1) << bits) for word in reduced]


# The scale.


@pytest.mark.parametrize(
    ("encoding", "scale", "limit"),
    [
        (Encoding(24, 30, 1.0), 34952 * 2.0**3, 30 * (34952 * 8 + 1)),
        (Encoding(8, 3, 0.1), 52906 * 2.0**-7, 3 * 42),
        (Encoding(62, 1, 1.0), 65535 * 2.0**45, 65535 * 2**45 + 1),
    ],
)
def test_scales_are_the_same_everywhere(encoding: Encoding, scale: float, limit: int) -> None:
    assert encoding.scale == scale
    assert encoding.limit == limit


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sites", [1, 3, 100])
@pytest.mark.parametrize("bound", [1.0, 0.1, 7.5, 1e-30, 1e30])
def test_scales_are_the_largest_of_sixteen_bits(bits: int, sites: int, bound: float) -> None:
    encoding = Encoding(bits, sites, bound)
    exact = Fraction((1 << (bits - 1)) - 1 - sites) / (sites * Fraction(str(bound)))
    mantissa, exponent = encoding._parts
    assert 2**15 <= mantissa < 2**16
    assert Fraction(encoding.scale) == mantissa * Fraction(2) ** exponent
    assert mantissa * Fraction(2) ** exponent <= exact < (mantissa + 1) * Fraction(2) ** exponent


@pytest.mark.parametrize("bits", range(8, 63))
def test_words_are_the_least_that_hold_the_bits(bits: int) -> None:
    width = Encoding(bits, 2, 1.0).word.itemsize * 8
    assert width >= bits
    assert width == 8 or width // 2 < bits


@pytest.mark.parametrize(
    ("bits", "sites", "bound"),
    [
        (7, 1, 1.0),
        (63, 1, 1.0),
        (24, 0, 1.0),
        (24, -1, 1.0),
        (24, 3, 0.0),
        (24, 3, -1.0),
        (24, 3, math.inf),
        (24, 3, math.nan),
        (8, 127, 1.0),
        (24, 2**23 - 1, 1.0),
        (24, 3, 5e-324),
        (24, 3, 1e308),
    ],
)
def test_impossible_encodings_are_refused(bits: int, sites: int, bound: float) -> None:
    with pytest.raises(PlanError):
        Encoding(bits, sites, bound)


def test_the_most_sites_still_have_a_scale() -> None:
    encoding = Encoding(8, 126, 1.0)
    assert 0 < encoding.scale <= 1 / 126
    assert encoding.limit == 126


# Sums.


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sites", [1, 2, 30, 101])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_at_the_bound_do_not_wrap(bits: int, sites: int, sign: int) -> None:
    for bound in (1.0, 0.1, 3.3e7, 1e-9, 65535 / 7):
        encoding = Encoding(bits, sites, bound)
        vector = np.full(5, sign * bound, dtype=np.float64)
        vectors = [encode(vector, encoding, generator()) for _ in range(sites)]
        total = np.sum(vectors, axis=0, dtype=encoding.word)
        exact = np.sum([signed(words, bits) for words in vectors], axis=0, dtype=object)
        assert signed(total, bits) == exact.tolist()
        assert max(abs(value) for value in exact) <= encoding.limit < 1 << (bits - 1)
        decoded = decode(total, encoding, sites)
        assert decoded.tolist() == [float(value) / encoding.scale for value in exact]
        assert np.abs(decoded - sign * sites * bound).max() <= sites / encoding.scale + 1e-9 * sites * bound


def test_sums_modulo_the_wider_word_decode_alike() -> None:
    encoding = Encoding(20, 3, 1.0)
    vectors = [np.array([0.5, -0.25, -1.0, 1.0]) * sign for sign in (1, -1, 1)]
    words = np.stack([encode(v, encoding, generator()) for v in vectors])
    total: npt.NDArray[np.uint32] = np.add.reduce(words, axis=0, dtype=np.uint32)
    assert (total >= 1 << 20).any()
    assert (decode(total, encoding, 3) == decode(total & np.uint32(2**20 - 1), encoding, 3)).all()
    assert np.abs(decode(total, encoding, 3) - vectors[0]).max() <= 3 / encoding.scale


def test_sums_beyond_what_the_survivors_reach_are_refused() -> None:
    encoding = Encoding(24, 10, 1.0)
    for survivors in (1, 7, 10):
        edge = survivors * encoding.reach
        total = np.array([edge, -edge % 2**24, 0], dtype=np.uint32)
        assert np.abs(decode(total, encoding, survivors)).max() == edge / encoding.scale
        beyond = np.tile(np.array([edge + 1, (-edge - 1) % 2**24, 2**23, 0], dtype=np.uint32), 20_000)
        with pytest.raises(ProtocolError, match="60000 of 80000"):
            decode(beyond, encoding, survivors)


def test_the_lowest_byte_is_out_of_range_too() -> None:
    with pytest.raises(ProtocolError, match="1 of 1"):
        decode(np.array([0x80], dtype=np.uint8), Encoding(8, 1, 1.0), 1)


def test_sums_of_another_form_are_refused() -> None:
    encoding = Encoding(24, 3, 1.0)
    for total in (np.zeros(3, dtype=np.uint16), np.zeros(3, dtype=np.int32), np.zeros((3, 1), dtype=np.uint32)):
        with pytest.raises(ProtocolError, match="is not of this encoding"):
            decode(total, encoding, 3)
    for survivors in (0, 4, -1):
        with pytest.raises(ProtocolError, match="sum over"):
            decode(np.zeros(3, dtype=np.uint32), encoding, survivors)


# Rounding.


def is_unbiased(rounded: npt.NDArray[np.float64], value: float) -> bool:
    """Whether the mean is `value` steps, to within five standard deviations of a fair rounding and 2^-16 of a step."""
    fraction = value - math.floor(value)
    return abs(float(np.mean(rounded - value))) < 5 * math.sqrt(fraction * (1 - fraction) / len(rounded)) + 2.0**-16


@pytest.mark.parametrize("bits", [16, 24, 40, 47, 48, 62])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.5, 7.9, -0.1, -0.6, -12.25, 0.004])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_rounding_is_unbiased(bits: int, value: float, kind: type) -> None:
    encoding = Encoding(bits, 3, 2.0)
    vector: npt.NDArray[Any] = np.full(MANY, value / encoding.scale, dtype=kind)
    value = float(vector[0]) * encoding.scale  # what single precision has left of it
    rounded = np.array(signed(encode(vector, encoding, generator()), bits), dtype=np.float64)
    assert set(rounded.tolist()) == {math.floor(value), math.ceil(value)}
    assert is_unbiased(rounded, value)


@pytest.mark.parametrize("value", [0.1, 0.3, 7.9, -0.1, -0.6, -12.25, 0.004])
def test_the_test_of_rounding_rejects_other_roundings(value: float) -> None:
    assert not is_unbiased(np.full(MANY, math.floor(value)), value)
    assert not is_unbiased(np.full(MANY, round(value)), value)
    coins = np.random.default_rng(1).random(MANY)
    assert is_unbiased(np.floor(value + coins), value)
    assert not is_unbiased(np.floor(value + 0.9 * coins), value)


@pytest.mark.parametrize("bits", [24, 48])
def test_coordinates_round_independently(bits: int) -> None:
    encoding = Encoding(bits, 3, 2.0)
    words = encode(np.full(MANY, 0.5 / encoding.scale), encoding, generator()).astype(np.float64) - 0.5
    for lag in (1, 2, 4, 1 << 15):
        assert abs(float(np.mean(words[lag:] * words[:-lag]))) < 5 * 0.25 / math.sqrt(MANY - lag)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", [0, 1, 3, (1 << 15) - 1, (1 << 15) + 5])
def test_every_coordinate_is_within_a_step(bits: int, size: int) -> None:
    encoding = Encoding(bits, 4, 5.0)
    vector = np.random.default_rng(bits).normal(size=size).astype(np.float32)
    words = encode(vector, encoding, generator())
    assert words.dtype == encoding.word
    assert words.shape == (size,)
    assert (words.astype(np.uint64) < 1 << bits).all()
    assert (np.abs(decode(words, encoding, 1) - vector) <= (1 + 1e-9) / encoding.scale + 1e-15 * np.abs(vector)).all()


@pytest.mark.parametrize("bits", [24, 40, 47, 48, 62])
def test_whole_steps_stay_what_they_are(bits: int) -> None:
    encoding = Encoding(bits, 1, 1.0)
    mantissa, exponent = encoding._parts
    multiples = np.arange(-100, 101)
    words = encode(multiples * 2.0**-exponent, encoding, generator())
    assert signed(words, bits) == (multiples * mantissa).tolist()


# Clamping and refusals.


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_what_exceeds_the_bound_is_clamped(bits: int, kind: type) -> None:
    encoding = Encoding(bits, 3, 0.7)
    far: npt.NDArray[Any] = np.array([0.7001, 1e9, np.finfo(kind).max], dtype=kind)
    vector = np.concatenate([far, -far])
    with np.errstate(all="raise"):
        values = signed(encode(vector, encoding, generator()), bits)
    edge = math.floor(encoding.clamp)
    assert all(edge <= abs(value) <= encoding.reach for value in values)
    assert [value > 0 for value in values] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 40_000])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_only_numbers_are_encoded(bad: float, where: int, kind: type) -> None:
    vector: npt.NDArray[Any] = np.zeros(50_000, dtype=kind)
    vector[where] = bad
    with pytest.raises(NonFinite, match="NaN or infinity"):
        encode(vector, Encoding(24, 3, 1.0), generator())


def test_only_vectors_are_encoded() -> None:
    with pytest.raises(ProtocolError, match="shape"):
        encode(np.zeros((2, 2), dtype=np.float32), Encoding(24, 3, 1.0), generator())


# Planes.


def planes_by_bits(words: npt.NDArray[Any], bits: int) -> bytes:
    """The packing as the specification has it, bit by bit."""
    values, packed, low = [int(word) for word in words], b"", 0
    while bits - low >= 16:
        packed += b"".join((value >> low & 0xFFFF).to_bytes(2, "little") for value in values)
        low += 16
    if bits - low >= 8:
        packed += bytes(value >> low & 0xFF for value in values)
        low += 8
    for bit in range(low, bits):
        ones = "".join(str(value >> bit & 1) for value in values)
        packed += bytes(int(ones[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(ones), 8))
    return packed


def words_of(bits: int, size: int) -> npt.NDArray[Any]:
    full = np.random.default_rng(bits).integers(0, 1 << bits, size, dtype=np.uint64)
    return full.astype(Encoding(bits, 1, 1.0).word)


@pytest.mark.parametrize("bits", range(8, 63))
def test_planes_are_those_of_the_specification(bits: int) -> None:
    for size in (0, 1, 7, 8, 21):
        words = words_of(bits, size)
        data = pack(words, bits)
        assert data.tobytes() == planes_by_bits(words, bits)
        assert len(data) == packed_bytes(bits, size)
        for form in (data, data.tobytes(), bytearray(data), memoryview(b"?" + data.tobytes())[1:]):
            again = unpack(form, bits, size)
            assert again.dtype == words.dtype
            assert (again == words).all()


def test_known_packing() -> None:
    words = np.array([0x5ABCDEF, 0x2000001], dtype=np.uint32)
    assert pack(words, 27).tobytes().hex() == "efcd0100" + "ab00" + "80" + "40" + "80"
    assert packed_bytes(24, 1_000_000) == 3_000_000
    assert packed_bytes(20, 1_000_000) == 2_500_000


@pytest.mark.parametrize("bits", WIDTHS)
def test_long_vectors_pack_like_short_ones(bits: int) -> None:
    size = 3 * (1 << 15) + 11
    words = words_of(bits, size)
    data = pack(words, bits)
    assert (unpack(data, bits, size) == words).all()
    total = words.copy()
    for _ in range(3):
        add_packed(total, data, bits)
    assert (total == 4 * words).all()


def test_words_are_packed_modulo_the_modulus() -> None:
    words = np.array([2**32 - 1, 2**20, 2**20 + 5], dtype=np.uint32)
    assert unpack(pack(words, 20), 20, 3).tolist() == [2**20 - 1, 0, 5]


@pytest.mark.parametrize("bits", WIDTHS)
def test_other_lengths_are_refused(bits: int) -> None:
    data = pack(words_of(bits, 20), bits).tobytes()
    total = np.zeros(20, dtype=Encoding(bits, 1, 1.0).word)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ProtocolError, match="bytes came"):
            unpack(wrong, bits, 20)
        with pytest.raises(ProtocolError, match="bytes came"):
            add_packed(total, wrong, bits)
    assert not total.any()


@pytest.mark.parametrize(("bits", "size"), [(9, 1), (20, 13), (27, 7), (62, 9)])
def test_padding_is_zero(bits: int, size: int) -> None:
    good = pack(words_of(bits, size), bits)
    plane, total = -(-size // 8), np.zeros(size, dtype=Encoding(bits, 1, 1.0).word)
    for last in range(1, bits % 8 + 1):
        for bit in range(-size % 8):
            data = good.copy()
            data[len(data) - 1 - (last - 1) * plane] |= 1 << bit
            with pytest.raises(ProtocolError, match="padding"):
                add_packed(total, data, bits)
    assert not total.any()


def test_sums_need_room_for_the_bits() -> None:
    with pytest.raises(ProtocolError, match="do not hold"):
        add_packed(np.zeros(1, dtype=np.uint16), bytes(3), 24)


# The bound on an update.

ROUNDING = 1 + 2.0**-8


def plan_with(changes: dict[str, Any]) -> Plan:
    """A private plan with what the bound depends on written out."""
    table = {
        "run": {"name": "test", "rounds": 4},
        "model": {"source": "package:some_model"},
        "task": {"labels": ["lost card", "top up", "exchange rate"]},
        "local": {"expected_records": 16, "clip_norm": 0.3},
        "privacy": {"noise": "site", "epsilon": 8.0},
        "cohort": {"size": 3, "minimum": 2},
        "secure_aggregation": {"mode": "off"},
    }
    return make_plan(table).revised(changes)


def sgd_moves(gradients: torch.Tensor, rate: float, momentum: float) -> npt.NDArray[np.float64]:
    """Where SGD, as the trainer sets it up, comes with one gradient [steps, d] after the other."""
    weights = torch.nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    optimizer = torch.optim.SGD([weights], lr=rate, momentum=momentum)
    return _moves(weights, optimizer, gradients)


def _moves(
    weights: torch.nn.Parameter, optimizer: torch.optim.Optimizer, gradients: torch.Tensor
) -> npt.NDArray[np.float64]:
    for gradient in gradients:
        weights.grad = gradient.clone()
        optimizer.step()
    moved: npt.NDArray[np.float64] = weights.detach().numpy()
    return moved


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (7, 0.0), (12, 0.9), (30, 0.5)])
def test_bound_follows_the_steps_of_sgd(steps: int, momentum: float) -> None:
    local = {"local.steps_per_round": steps, "local.momentum": momentum, "local.learning_rate": 0.25}
    plan = plan_with({**local, "local.sampling_rate": 0.5})
    clip = plan.local.clip_norm or 0.0
    signal = default_bound(plan, 0.0)
    furthest = sgd_moves(torch.full((steps, 1), clip, dtype=torch.float64), 0.25, momentum)
    assert signal * 0.99 < abs(float(furthest[0])) * 2 * ROUNDING <= signal * (1 + 1e-9)

    noise = torch.from_numpy(generator().gaussian(steps * 20_000, 1.5 * clip / 8)).reshape(steps, -1)
    spread = float(sgd_moves(noise, 0.25, momentum).std())
    with fifty_digits():
        deviations = float(_sgd_steps(plan, 1.5) - _sgd_steps(plan, 0.0)) * 0.25 / spread
    assert 10.0 < deviations < 12.0
    values = 10**9 * plan.cohort.size * plan.run.rounds
    assert math.log2(2 * values) - (0.97 * deviations) ** 2 / 2 / math.log(2) < -35  # 3 % for the measured spread


def test_bound_of_adam_holds_and_is_nearly_reached() -> None:
    steps, rate = 60, 0.01
    bound = default_bound(plan_with({"local.optimizer": "adam", "local.learning_rate": rate}), 1.0)
    assert bound == 0.0101  # rate · ROUNDING = 0.0100390625, up to three digits
    worst = torch.tensor([[(0.999 / 0.9) ** t, 1.0, float(t == steps - 1)] for t in range(steps)], dtype=torch.float64)
    wild = torch.from_numpy(np.random.default_rng(1).standard_cauchy((steps, 500)))
    gradients = torch.cat([worst, wild], dim=1)
    with fifty_digits():
        limits = [float(_adam_steps(k)) * rate * ROUNDING for k in range(1, steps + 1)]
    weights = torch.nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    optimizer = torch.optim.Adam([weights], lr=rate)
    before, last = 0.0, 0.0
    for gradient, limit in zip(gradients, limits, strict=True):
        old = weights.detach().clone()
        _moves(weights, optimizer, gradient[None])
        step = (weights.detach() - old).abs()
        assert float(step.max()) <= limit - before
        assert float(weights.detach().abs().max()) <= limit
        before, last = limit, float(step[0]) / (limit - before)
    assert last > 0.99


def test_bound_without_clipping_covers_a_head_on_unit_features() -> None:
    plain = {"privacy.noise": "none", "privacy.epsilon": None, "local.clip_norm": None, "local.learning_rate": 0.5}
    assert default_bound(plan_with(plain), 0.0) == 4.02  # 0.5 · 8 · ROUNDING = 4.015625
    clipped = default_bound(plan_with({**plain, "local.clip_norm": 0.3}), 0.0)
    assert clipped == 0.302  # 0.5 · 0.6 · ROUNDING = 0.301171875


def test_bounds_are_the_same_on_every_machine() -> None:
    assert default_bound(plan_with({}), 1.0) == 0.795
    steps = {"local.steps_per_round": 10, "local.momentum": 0.9}
    assert default_bound(plan_with(steps), 1.0) == 27.7
    assert default_bound(plan_with({"local.optimizer": "adam", "local.steps_per_round": 1000}), 0.0) == 4250.0
    # a bound that is a number of three digits stays what it is: nothing is rounded twice
    plain = {"privacy.noise": "none", "privacy.epsilon": None, "local.clip_norm": None}
    assert default_bound(plan_with({**plain, "local.learning_rate": 0.32}), 0.0) == 2.57


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_impossible_noise_has_no_bound(sigma: float) -> None:
    with pytest.raises(PlanError, match="noise multiplier"):
        default_bound(plan_with({}), sigma)


def test_an_infinite_bound_is_refused() -> None:
    with pytest.raises(PlanError, match="no finite bound"):
        default_bound(plan_with({"local.learning_rate": 1e308, "local.clip_norm": 1e6}), 1.0)
