"""A second implementation of what PROTOCOL.md derives, from the page alone: it imports nothing of Accord.

Plain and slow on purpose: numbers are Python's integers, fractions and decimals. Numbers in brackets are sections.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
from collections.abc import Iterator, Sequence
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from fractions import Fraction
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

Json = dict[str, Any]


class Refused(Exception):
    """What the page refuses."""


# --- numbers and bytes [2]


def decimal_text(value: float) -> str:
    """The shortest decimal that reads back as the double, without exponent, trailing zeros or a sign of zero."""
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    if not isinstance(exponent, int):
        raise Refused("not finite")
    text = "".join(map(str, digits))
    text = text + "0" * exponent if exponent >= 0 else text.rjust(1 - exponent, "0")
    if exponent < 0:
        text = f"{text[:exponent]}.{text[exponent:]}".rstrip("0").rstrip(".")
    text = text.lstrip("0") or "0"
    text = "0" + text if text.startswith(".") else text
    return "-" + text if sign and text != "0" else text


def canonical(value: Any) -> str:
    """Canonical JSON."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, float):
        return f'"{decimal_text(value)}"'
    return json.dumps(value, ensure_ascii=False)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def u64(value: int) -> bytes:
    if not 0 <= value < 2**64:
        raise Refused("u64")
    return value.to_bytes(8, "big")


def frame(label: str, *parts: Any) -> bytes:
    out = b""
    for part in (label, *parts):
        data: bytes
        if isinstance(part, str):
            data = part.encode()
        elif isinstance(part, int):
            data = u64(part)
        elif isinstance(part, list | tuple):
            data = frame("list", *part)
        else:
            data = part
        out += u64(len(data)) + data
    return out


def hkdf(ikm: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869."""
    key = hmac.digest(salt or bytes(32), ikm, "sha256")
    block, out, count = b"", b"", 0
    while len(out) < length:
        count += 1
        block = hmac.digest(key, block + info + bytes([count]), "sha256")
        out += block
    return out[:length]


FIFTY = Context(prec=50)


def number(value: float) -> Decimal:
    """A number of a plan: the decimal that it is written as."""
    return Decimal(decimal_text(value))


def rounded_up(value: Decimal, digits: int) -> float:
    return float(Context(prec=digits, rounding=ROUND_CEILING).plus(value))


# --- the plan [3]

REQUIRED: Any = object()
PLAN: dict[str, dict[str, tuple[Any, type]]] = {
    "run": {
        "name": (REQUIRED, str),
        "rounds": (REQUIRED, int),
        "rounds_per_site": (None, int),
        "seed": (0, int),
        "max_extra_attempts": (3, int),
    },
    "model": {"source": (REQUIRED, str), "digest": (None, str), "layer": (-1, int)},
    "task": {
        "kind": ("classification", str),
        "labels": (REQUIRED, list),
        "label_texts": (None, list),
        "prompts": (None, list),
        "max_tokens": (64, int),
        "unit": ("row", str),
    },
    "adapter": {
        "depth": ("head", str),
        "rank": (None, int),
        "alpha": (None, float),
        "targets": (None, list),
        "freeze_a": (None, bool),
        "layers": ("all", str),
        "init": ("label-names", str),
        "features": ("label-centered", str),
        "init_scale": (1.0, float),
    },
    "local": {
        "optimizer": ("sgd", str),
        "learning_rate": (1.0, float),
        "momentum": (0.0, float),
        "sampling_rate": (1.0, float),
        "steps_per_round": (1, int),
        "expected_records": (REQUIRED, int),
        "clip_norm": (None, float),
    },
    "server": {
        "optimizer": ("fedavg", str),
        "learning_rate": (1.0, float),
        "momentum": (0.9, float),
        "second_moment": (0.99, float),
        "adaptivity": (0.001, float),
        "average_last": (0.0, float),
    },
    "privacy": {
        "noise": ("site", str),
        "epsilon": (None, float),
        "delta": (0.00001, float),
        "accountant": ("pld", str),
        "noise_multiplier": (None, float),
    },
    "cohort": {"size": (REQUIRED, int), "minimum": (1, int), "colluders": (0, int)},
    "secure_aggregation": {"mode": ("malicious", str), "bits": (None, int), "bound": (None, float)},
    "evaluation": {
        "validation_fraction": (0.0, float),
        "released_fraction": (0.0, float),
        "metrics": (["accuracy", "macro_f1"], list),
    },
}
LORA = {"rank": 8, "alpha": 16.0, "targets": ["query", "value"], "freeze_a": False}


def whole_plan(given: Json) -> Json:
    """A plan with its defaults, without its nulls, numbers of the kind that the table says."""
    if given.get("version", 1) != 1 or set(given) - {"version", *PLAN}:
        raise Refused("unknown key or version")
    plan: Json = {"version": 1}
    for table, keys in PLAN.items():
        have = {key: value for key, value in given.get(table, {}).items() if value is not None}
        if set(have) - set(keys):
            raise Refused(f"unknown key of {table}")
        if table == "adapter" and have.get("depth") == "lora":
            have = {**LORA, **have}
        if table == "cohort" and "minimum" not in have and given.get("secure_aggregation", {}).get("mode") != "off":
            have["minimum"] = default_minimum(have["size"], have.get("colluders", 0))
        plan[table] = {}
        for key, (default, kind) in keys.items():
            value = have.get(key, default)
            if value is REQUIRED:
                raise Refused(f"{table}.{key} is missing")
            if value is not None:
                plan[table][key] = float(value) if kind is float else value
    return plan


def default_minimum(size: int, colluders: int) -> int:
    if size <= 4:
        return max(1, size)
    needed = max(2 * size // 3 + 1, (size + colluders) // 2 + 1)
    return min(size, needed if size <= 128 else max(needed, -(-4 * size // 5)))


def plan_canonical(given: Json) -> str:
    return canonical(whole_plan(given))


# --- documents [3, 16]


def fingerprint(ed25519: bytes, ml_dsa: bytes) -> bytes:
    return sha256(frame("accord/1/fingerprint", ed25519, ml_dsa))


def both_verify(ed25519: bytes, ml_dsa: bytes, message: bytes, signatures: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(ed25519).verify(signatures[:64], message)
        MLDSA65PublicKey.from_public_bytes(ml_dsa).verify(signatures[64:], message)
    except Exception:
        return False
    return len(signatures) == 64 + 3309


def document_bytes(label: str, fields: Json) -> bytes:
    """What is signed of a plan's, a model's or an endorsement's document."""
    return frame(label, canonical({k: v for k, v in fields.items() if k != "signature"}).encode())


def derived_key(ed25519_seed: bytes, label: bytes) -> bytes:
    return hkdf(ed25519_seed, b"accord/1/identity/derive", label, 32)


# --- thresholds [4]


def thresholds(n: int, minimum: int, colluders: int, mode: str, size: int, *, own_noise: bool) -> tuple[int, int]:
    """(t_sign, t_share) of the complete graph."""
    if n < 2 or not 1 <= minimum <= n or not 0 <= colluders < n:
        raise Refused("counts")
    sign = max(2 * n // 3 + 1, (n + colluders) // 2 + 1)
    share = max(n // 2 + 1 if mode == "malicious" else sign, colluders + 2, size + colluders - minimum + 1)
    if n <= 4:
        sign = share = n
        if not own_noise and n < max(colluders, 1) + 2:
            raise Refused("a single update")
    if share > minimum or sign > n:
        raise Refused("thresholds")
    return sign, share


# --- keys [6, 7]


def terms_parts(terms: Json) -> list[str]:
    return [terms["run_id"], terms["roster_hash"], terms["plan_hash"]]


def credential_bytes(terms: Json, name: str, session: bytes, kem_public: bytes) -> bytes:
    return frame("accord/1/credential", *terms_parts(terms), name, session, kem_public)


def head_bytes(seq: int, digest: bytes) -> bytes:
    return u64(seq) + digest


def bundle_bytes(terms: Json, name: str, session: bytes, generation: int, public: bytes, head: bytes) -> bytes:
    return frame("accord/1/bundle", *terms_parts(terms), name, session, generation, public, head)


def bundle(terms: Json, name: str, session: bytes, generation: int, public: bytes, head: bytes, seed: bytes) -> bytes:
    signed = bundle_bytes(terms, name, session, generation, public, head)
    body = session + generation.to_bytes(4, "big") + public + head
    return body + Ed25519PrivateKey.from_private_bytes(seed).sign(signed)


def introduction_bytes(terms: Json, parties: Sequence[Any], ciphertext: bytes) -> bytes:
    return frame("accord/1/introduction", *terms_parts(terms), *parties, ciphertext)


def kem_secret(run_id: str, parties: Sequence[Any], ciphertext: bytes, kem_seed: bytes) -> bytes:
    """From the receiver's seed, d ‖ z."""
    shared = MLKEM768PrivateKey.from_seed_bytes(kem_seed).decapsulate(ciphertext)
    return hkdf(shared, b"", frame("accord/1/kem", run_id, *parties, sha256(ciphertext)), 32)


def context(terms: Json, shown: Json) -> bytes:
    parts: list[Any] = [1, terms["run_id"], shown["round"], shown["attempt"], terms["roster_hash"], terms["plan_hash"]]
    parts += [terms["mode"], terms["bits"], terms["bound"], terms["dimension"], shown["model_hash"]]
    parts += [bytes.fromhex(shown["coordinator"]), [bytes.fromhex(item) for item in shown["choices"]], shown["cohort"]]
    parts += [[bytes.fromhex(item) for item in shown["bundles"]]]
    if terms["noise"] is not None:
        parts.append(terms["noise"])
    return sha256(frame("accord/1/context", *parts))


# --- sparse graphs [9]


def choice(ed25519_seed: bytes, roster_hash: str, plan_hash: str, own: int, members: int, degree: int) -> bytes:
    """The bit map of the member at place `own`."""
    key = derived_key(ed25519_seed, frame("accord/1/neighbours", roster_hash, plan_hash))
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def below(bound: int) -> int:
        while True:
            word = int.from_bytes(stream.update(bytes(8)), "little")
            if word < 2**64 - 2**64 % bound:
                return word % bound

    taken: list[int] = []
    for last in range(members - 1 - degree, members - 1):
        drawn = below(last + 1)
        taken.append(last if drawn in taken else drawn)
    bits = ["0"] * (-(-members // 8) * 8)
    for index in taken:
        bits[index if index < own else index + 1] = "1"
    return int("".join(bits), 2).to_bytes(len(bits) // 8, "big")


def has(bit_map: bytes, place: int) -> bool:
    return bit_map[place // 8] & (128 >> place % 8) != 0


def edges(choices: Sequence[bytes], places: Sequence[int], own: int) -> tuple[list[int], list[int]]:
    """Mask partners and holders of one of the cohort."""
    chosen = [index for index, place in enumerate(places) if has(choices[own], place)]
    choosers = [index for index, theirs in enumerate(choices) if has(theirs, places[own])]
    return sorted({*chosen, *choosers}), sorted({*chosen, own})


def exchange(private: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Refused("low order") from None


def pair_keys(private: bytes, public: bytes, kem: bytes, ctx: bytes, low: str, high: str) -> tuple[bytes, bytes, bytes]:
    """Mask seed, key that seals upwards, key that seals downwards."""
    okm = hkdf(exchange(private, public) + kem, ctx, frame("accord/1/pair", low, high), 96)
    return okm[:32], okm[32:64], okm[64:]


def upload_key(private: bytes, public: bytes, ctx: bytes, name: str) -> bytes:
    return hkdf(exchange(private, public), ctx, frame("accord/1/upload", name), 32)


def upload_tag(key: bytes, payload: bytes, sealed: Sequence[bytes], next_bundle: bytes) -> bytes:
    """GMAC: AES-GCM of nothing."""
    data = frame("accord/1/tag", len(payload), list(sealed), next_bundle) + payload
    return AESGCM(key).encrypt(bytes(12), b"", data)


def survivors_bytes(ctx: bytes, survivors: Sequence[int]) -> bytes:
    return frame("accord/1/survivors", ctx, b"".join(index.to_bytes(4, "big") for index in survivors))


def shares_data(ctx: bytes, sender: int, receiver: int) -> bytes:
    return frame("accord/1/shares", ctx, sender, receiver)


def seal(key: bytes, plain: bytes, data: bytes) -> bytes:
    return AESGCM(key).encrypt(bytes(12), plain, data)


def unseal(key: bytes, sealed: bytes, data: bytes) -> bytes:
    try:
        return AESGCM(key).decrypt(bytes(12), sealed, data)
    except InvalidTag:
        raise Refused("seal") from None


# --- masks and packing [7, 11]


def keystream(key: bytes, count: int, counter: bytes = bytes(16)) -> bytes:
    return Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(bytes(count))


def word_bytes(bits: int) -> int:
    return next(width for width in (1, 2, 4, 8) if bits <= 8 * width)


def prg(seed: bytes, bits: int, count: int) -> list[int]:
    width = word_bytes(bits)
    stream = keystream(seed, count * width)
    return [int.from_bytes(stream[i : i + width], "little") % (1 << bits) for i in range(0, len(stream), width)]


def masked(words: Sequence[int], bits: int, plus: Sequence[bytes], minus: Sequence[bytes]) -> list[int]:
    total = list(words)
    for sign, seeds in ((1, plus), (-1, minus)):
        for seed in seeds:
            total = [(a + sign * b) % (1 << bits) for a, b in zip(total, prg(seed, bits, len(words)), strict=True)]
    return total


def plane_widths(bits: int) -> list[int]:
    return [16] * (bits // 16) + [8] * (bits % 16 // 8) + [1] * (bits % 8)


def pack(words: Sequence[int], bits: int) -> bytes:
    out, shift = b"", 0
    for width in plane_widths(bits):
        values = [(word >> shift) & ((1 << width) - 1) for word in words]
        if width > 1:
            out += b"".join(value.to_bytes(width // 8, "little") for value in values)
        else:
            text = "".join(map(str, values))
            text += "0" * (-len(text) % 8)
            out += bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
        shift += width
    return out


def unpack(data: bytes, bits: int, count: int) -> list[int]:
    words, place, shift = [0] * count, 0, 0
    for width in plane_widths(bits):
        size = -(-width * count // 8)
        plane, place = data[place : place + size], place + size
        if len(plane) != size:
            raise Refused("length")
        if width > 1:
            step = width // 8
            values = [int.from_bytes(plane[i : i + step], "little") for i in range(0, size, step)]
        else:
            text = "".join(f"{byte:08b}" for byte in plane)
            if "1" in text[count:]:
                raise Refused("padding")
            values = [int(bit) for bit in text[:count]]
        words = [word | value << shift for word, value in zip(words, values, strict=True)]
        shift += width
    if place != len(data):
        raise Refused("length")
    return words


# --- sharing [7]

P = 2**31 - 1


def field_elements(random: Iterator[int], count: int) -> list[int]:
    """`random` gives the words of 31 bits; those that are p are drawn again after all others."""
    values = [next(random) for _ in range(count)]
    while again := [place for place, value in enumerate(values) if value == P]:
        for place in again:
            values[place] = next(random)
    return values


def words_of(data: bytes) -> Iterator[int]:
    for i in range(0, len(data), 4):
        yield int.from_bytes(data[i : i + 4], "little") & P


def digits_of(secret: bytes) -> list[int]:
    value = int.from_bytes(secret, "little")
    return [value >> 30 * i & (2**30 - 1) for i in range(9)]


def deal(secrets: Sequence[bytes], holders: Sequence[int], threshold: int, random: bytes) -> list[bytes]:
    """Of each holder its shares of all secrets, 36 bytes each."""
    constants = [digit for secret in secrets for digit in digits_of(secret)]
    drawn = field_elements(words_of(random), (threshold - 1) * len(constants))
    rows = [constants, *(drawn[i : i + len(constants)] for i in range(0, len(drawn), len(constants)))]
    out = []
    for holder in holders:
        values = [
            sum(row[place] * pow(holder + 1, power, P) for power, row in enumerate(rows)) % P
            for place in range(len(constants))
        ]
        out.append(b"".join(value.to_bytes(4, "little") for value in values))
    return out


def rebuild(shares: Sequence[bytes], holders: Sequence[int]) -> list[bytes]:
    """The secrets, by Lagrange at 0."""
    points = [holder + 1 for holder in holders]
    rows = [[int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)] for data in shares]
    if any(value >= P for row in rows for value in row):
        raise Refused("field")
    digits = [0] * len(rows[0])
    for x, row in zip(points, rows, strict=True):
        weight = 1
        for other in points:
            weight = weight * (other * pow(other - x, -1, P) if other != x else 1) % P
        digits = [(total + weight * value) % P for total, value in zip(digits, row, strict=True)]
    secrets = []
    for start in range(0, len(digits), 9):
        value = 0
        for place, digit in enumerate(digits[start : start + 9]):
            if digit >= (2**30 if place < 8 else 2**16):
                raise Refused("digit")
            value |= digit << 30 * place
        secrets.append(value.to_bytes(32, "little"))
    return secrets


def dealt(partners: Sequence[int], cohort: int, shares: bytes) -> bytes:
    bits = "".join("1" if index in partners else "0" for index in range(cohort)).ljust(-(-cohort // 8) * 8, "0")
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)) + shares


def opened(plain: bytes, cohort: int, survivors: Sequence[int], components: int, removed: Sequence[int]) -> bytes:
    head = -(-cohort // 8)
    bits = "".join(f"{byte:08b}" for byte in plain[:head])
    partners = [index for index, bit in enumerate(bits) if bit == "1"]
    if len(bits) != 8 * head or any(index >= cohort for index in partners):
        return b""
    shares = [plain[i : i + 36] for i in range(head, len(plain), 36)]
    if len(plain) - head != 36 * (1 + len(partners) + components):
        return b""
    places = [0, *(1 + place for place, index in enumerate(partners) if index not in survivors)]
    places += [1 + len(partners) + index for index in removed]
    return b"".join(shares[place] for place in places)


# --- the bound and the scale [11]

LN_2 = Decimal("0.6931471805599454")


def site_bound(given: Json, sigma: float) -> float:
    """A where each site adds its own noise, or none."""
    plan = whole_plan(given)
    local = plan["local"]
    with localcontext(FIFTY):
        if local["optimizer"] == "adam":
            unit = adam_steps(local["steps_per_round"])
        else:
            weight, total, squares = Decimal(0), Decimal(0), Decimal(0)
            for _ in range(local["steps_per_round"]):
                weight = number(local["momentum"]) * weight + 1
                total = total + weight
                squares = squares + weight * weight
            if "clip_norm" not in local:
                unit = 8 * total
            else:
                clip = number(local["clip_norm"])
                batch = number(local["sampling_rate"]) * local["expected_records"]
                values = 10**9 * plan["cohort"]["size"] * plan["run"]["rounds"]
                far = (2 * LN_2 * (41 + values.bit_length())).sqrt()
                unit = 2 * clip * total + far * (number(sigma) * clip / batch) * squares.sqrt()
        return rounded_up(number(local["learning_rate"]) * unit * Decimal("1.00390625"), 3)


def adam_steps(steps: int) -> Decimal:
    one, two = Decimal("0.9"), Decimal("0.999")
    total, series, power_1, power_2 = Decimal(0), Decimal(0), Decimal(1), Decimal(1)
    for _ in range(steps):
        power_1, power_2 = power_1 * one, power_2 * two
        series = one * one / two * series + 1
        total = total + (1 - one) / (1 - power_1) * ((1 - power_2) / (1 - two) * series).sqrt()
    return total


def clip_unit(given: Json) -> float:
    """Γ."""
    plan = whole_plan(given)
    local = plan["local"]
    unit = Fraction(number(local["clip_norm"]))
    if plan["privacy"]["noise"] == "cohort":
        batch = Fraction(number(local["sampling_rate"])) * local["expected_records"]
        unit = unit * Fraction(number(local["learning_rate"])) / batch
    return float(unit)


def shared_bound(given: Json) -> float:
    """A under shared noise."""
    plan = whole_plan(given)
    local = plan["local"]
    with localcontext(FIFTY):
        batch = number(local["sampling_rate"]) * local["expected_records"]
        if plan["privacy"]["noise"] == "participant":
            return rounded_up(number(local["clip_norm"]), 3)
        gamma = Fraction(number(local["clip_norm"])) * Fraction(number(local["learning_rate"]))
        gamma /= Fraction(number(local["sampling_rate"])) * local["expected_records"]
        unit = Decimal(gamma.numerator) / Decimal(gamma.denominator)
        counted = Decimal("1.5") * number(plan["evaluation"]["released_fraction"]) * batch
        return rounded_up(max(4 * batch.sqrt() + 4, counted) * unit, 3)


def scale_of(bits: int, sites: int, bound: float) -> tuple[int, int]:
    """(m, e) of s = m·2^e."""
    room = (1 << (bits - 1)) - 1 - sites
    if not 8 <= bits <= 62 or sites < 1 or not 0 < bound < math.inf or room < 1:
        raise Refused("encoding")
    value, exponent = Fraction(room) / (sites * Fraction(number(bound))), 0
    while value >= 2**16:
        value, exponent = value / 2, exponent + 1
    while value < 2**15:
        value, exponent = value * 2, exponent - 1
    if not -1000 <= exponent <= 900:
        raise Refused("exponent")
    return math.floor(value), exponent


def reach_of(bits: int, sites: int, bound: float) -> int:
    mantissa, exponent = scale_of(bits, sites, bound)
    return math.floor(Fraction(number(bound)) * mantissa * Fraction(2) ** exponent) + 1


def encode(vector: Sequence[float], bits: int, sites: int, bound: float, coins: Sequence[int]) -> list[int]:
    """Words of b ≤ 47 bits. Exact: the products of the page are exact for float32 values."""
    mantissa, exponent = scale_of(bits, sites, bound)
    scale, words = Fraction(mantissa) * Fraction(2) ** exponent, []
    largest = Fraction(number(bound)) * scale
    clamp = Fraction(float(largest)) if Fraction(float(largest)) <= largest else None
    if clamp is None:
        clamp = Fraction(math.nextafter(float(largest), 0.0))
    for x, coin in zip(vector, coins, strict=True):
        fixed = max(-clamp, min(clamp, Fraction(x) * scale)) * 2**16
        words.append(((math.trunc(fixed) + coin) >> 16) % (1 << bits))
    return words


def coins_of(key: bytes, count: int) -> list[int]:
    """16-bit coins from a generator that is AES-256-CTR under `key`."""
    stream = keystream(key, -(-count // 4) * 8)
    return [int.from_bytes(stream[2 * i : 2 * i + 2], "little") for i in range(count)]


# --- shared noise [13]


def sixteenth_up(value: Fraction) -> Fraction:
    return Fraction(math.ceil(value * 16), 16)


def sensitivity(steps: int, dimension: int) -> float:
    """Δ."""
    with localcontext(FIFTY):
        root = Decimal(dimension).sqrt()
        moved = 256 * steps * (1 + Decimal(2) ** -16) + root * Decimal(2) ** -16
        luck = (120 * LN_2).sqrt()
        likely = moved * moved + Decimal(dimension) / 4 + luck * (moved + root / 2)
        return rounded_up(min(likely, (moved + root) * (moved + root)).sqrt() / 256, 12)


class Shares:
    """How noise is divided, on a grid of k steps; refused where the page refuses it."""

    def __init__(self, given: Json, dimension: int, sigma: float, steps: int, colluders: int) -> None:
        plan = whole_plan(given)
        self.sites, self.minimum = plan["cohort"]["size"], plan["cohort"]["minimum"]
        self.dimension, self.steps, self.colluders = dimension, steps, colluders
        self.sigma = Fraction(number(sigma))
        self.clip, bound = clip_unit(plan), plan["secure_aggregation"].get("bound") or shared_bound(plan)
        self.draws = plan["run"]["rounds"] * (1 + plan["run"]["max_extra_attempts"])
        lost = self.sites - self.minimum
        self.nested = self.sites > 128 or lost <= 9
        self.counts = (
            [self.sites - j * lost // 9 for j in range(10)]
            if lost > 9
            else list(range(self.sites, self.minimum - 1, -1))
        )
        self.variance = sixteenth_up(self.sigma**2 * Fraction(number(sensitivity(steps, dimension))) ** 2) + 4
        self.base = self.share(self.sites) - 9
        self.components = self._components()
        self.reach = math.ceil(Fraction(number(bound)) * steps / Fraction(number(self.clip))) + 1
        whole = self.sites * (self.share(self.sites) + sum(self.components))
        chance = 2 * Fraction(LN_2) * whole * (41 + (dimension * self.draws).bit_length())
        self.tail = math.isqrt(math.ceil(chance) - 1) + 1
        self.limit = self.sites * self.reach + self.tail

    def share(self, survivors: int) -> Fraction:
        """V(u)."""
        return sixteenth_up(self.variance / (survivors - self.colluders))

    def _components(self) -> list[Fraction]:
        if self.nested:
            return [self.share(self.counts[j]) - self.share(self.counts[j - 1]) for j in range(1, len(self.counts))]
        excess = self.share(self.minimum) - self.share(self.sites)
        return [sixteenth_up(excess / 2 ** min(j, 8)) for j in range(1, 10)]

    def removed(self, survivors: int) -> list[int]:
        """Which are opened."""
        if self.nested:
            return [j for j in range(len(self.components)) if self.counts[j] <= survivors]
        missing, out = self.share(survivors) - self.share(self.sites), []
        for index, variance in enumerate(self.components):
            if missing > 0 and sum(self.components[index + 1 :]) < missing:
                missing -= variance
            else:
                out.append(index)
        return out

    def sound(self, bits: int) -> bool:
        """The refusals of a grid that depend on more than the plan."""
        samples = self.dimension * self.sites * (2 + len(self.components))
        return (
            min([self.base, *self.components]) >= 9
            and self.reach < 2**38
            and self.limit < 2 ** (bits - 1)
            and samples <= 2**40
            and samples * self.draws <= 2**51
        )

    def costs_at_most(self, part: int) -> bool:
        return self.variance <= (self.sigma * self.steps * (1 + Fraction(1, part))) ** 2

    def facts(self, bits: int) -> list[int]:
        return [self.steps, bits, *(int(16 * variance) for variance in [self.base, *self.components])]


def grid_of(given: Json, dimension: int, sigma: float, colluders: int) -> tuple[Shares, int]:
    """The grid and the modulus that the page chooses."""

    def at(steps: int) -> Shares:
        return Shares(given, dimension, sigma, steps, colluders)

    def least(part: int) -> int:
        def fits(steps: int) -> bool:
            shares = at(steps)
            return shares.sound(62) and shares.costs_at_most(part)

        high = 1
        while not fits(high):
            high *= 2
            if high > 2**40:
                raise Refused("no grid")
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    finest = least(1024)
    bits = whole_plan(given)["secure_aggregation"].get("bits")
    if bits is None:
        bits = max(8, -(-(at(least(256)).limit.bit_length() + 1) // 4) * 4)
    low, high = 0, finest + 1
    while high - low > 1:
        middle = (low + high) // 2
        tried = at(middle)
        low, high = (middle, high) if not tried.sound(62) or tried.limit < 2 ** (bits - 1) else (low, middle)
    shares = at(max(1, low))
    if not shares.sound(bits) or not shares.costs_at_most(100):
        raise Refused("too narrow")
    return shares, bits


def table(centre: Fraction, variance: Fraction, first: int, last: int) -> list[int]:
    """2^144·P(outcome ≤ j) for first ≤ j < last, of D(centre, variance) on [first, last]; with 120 digits."""
    with localcontext(Context(prec=120)):

        def decimal(value: Fraction) -> Decimal:
            return Decimal(value.numerator) / Decimal(value.denominator)

        c, v = decimal(centre), decimal(variance)
        weights = [(-((j - c) ** 2) / (2 * v)).exp() for j in range(first, last + 1)]
        total, partial, out = sum(weights), Decimal(0), []
        for weight in weights[:-1]:
            partial += weight
            out.append(int((partial / total * 2**144).to_integral_value()))
        return out


def table_reach(variance: Fraction) -> int:
    with localcontext(FIFTY):
        exact = Decimal("13.6") * (Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt()
        return math.ceil(exact) + 1


def table_digest(thresholds: Sequence[int]) -> str:
    """Of the thresholds as 18 bytes each, big-endian; one may be 2^144, which takes a 19th."""
    return sha256(b"".join(value.to_bytes(19, "big") for value in thresholds)).hex()


def outcome(thresholds: Sequence[int], first: int, places: int, cell_bits: int, more: Iterator[int]) -> int:
    """The least outcome whose threshold is above the number that begins with the bits `places`."""
    cut = [threshold >> (16 - cell_bits) for threshold in thresholds]
    value = places << 128
    if any(threshold >> 128 == places for threshold in cut):
        value |= next(more)
    return first + sum(threshold <= value for threshold in cut)


def further(stream: bytes) -> Iterator[int]:
    """Numbers of 128 bits: two little-endian words of 64, the higher first."""
    for i in range(0, len(stream), 16):
        yield int.from_bytes(stream[i : i + 8], "little") << 64 | int.from_bytes(stream[i + 8 : i + 16], "little")


def levels(variance: Fraction) -> list[tuple[int, Fraction]]:
    if variance <= 256**2:
        return [(1, variance)]
    m = math.isqrt(math.ceil(variance)) // 100 + 1
    low = Fraction(25 * m * m, 4)
    return [*levels(low), *((m * step, part) for step, part in levels((variance - low) / m**2))]


def noise(variance: Fraction, seed: bytes, count: int) -> list[int]:
    """The sample of D(0, variance) of a seed."""
    total = [0] * count
    for level, (step, part) in enumerate(levels(variance)):
        reach = table_reach(part)
        thresholds = table(Fraction(0), part, -reach, reach)
        cells = keystream(seed, 2 * count, bytes([level, 0]) + bytes(14))
        more = further(keystream(seed, 16 * count, bytes([level, 1]) + bytes(14)))
        for i in range(count):
            places = int.from_bytes(cells[2 * i : 2 * i + 2], "little")
            total[i] += step * outcome(thresholds, -reach, places, 16, more)
    return total


def rounded(fixed: Sequence[int], key: bytes) -> list[int]:
    """D(f/256, 9) of each centre, by a generator that is AES-256-CTR under `key`."""
    reach, cells = table_reach(Fraction(9)), -(-2 * len(fixed) // 8) * 8
    stream = keystream(key, cells + 16 * len(fixed))
    more, out = further(stream[cells:]), []
    for i, f in enumerate(fixed):
        places = int.from_bytes(stream[2 * i : 2 * i + 2], "little") % 1024
        row = table(Fraction(f % 256, 256), Fraction(9), -reach, reach + 1)
        out.append(f // 256 + outcome(row, -reach, places, 10, more))
    return out


# --- ledgers [15]


def ledger_entry(previous: bytes, seq: int, at: int, nonce: bytes, kind: str, body: str) -> bytes:
    return sha256(frame("accord/1/ledger/entry", previous, seq, at, nonce, kind, body))


def receipt_bytes(receipt: Json) -> bytes:
    sealed = base64.b64decode(receipt["sealed"], validate=True)
    head = [receipt["seq"], bytes.fromhex(receipt["hash"])]
    return frame("accord/1/ledger/receipt", receipt["site"], bytes.fromhex(receipt["ledger"]), *head, sealed)


def open_receipt(receipt: Json, ed25519_seed: bytes) -> bytes:
    """The padded zlib stream."""
    sealed = base64.b64decode(receipt["sealed"], validate=True)
    head = [receipt["seq"], bytes.fromhex(receipt["hash"])]
    ledger = bytes.fromhex(receipt["ledger"])
    data = frame("accord/1/ledger/receipt/sealed", receipt["site"], ledger, *head)
    key = derived_key(ed25519_seed, b"accord/1/ledger/receipt/key")
    return AESGCM(key).decrypt(sealed[:12], sealed[12:], data)
