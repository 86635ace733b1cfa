"""Identities: published answers, refusals, and secrets that stay inside."""

from __future__ import annotations

import copy
import hashlib
import pickle
import shutil
import subprocess
import traceback

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from accord_shared import identity as module
from accord_shared.errors import IdentityError, ProtocolError, RosterError
from accord_shared.identity import (
    BOTH_SIGNATURES,
    ED25519_SIGNATURE,
    Identity,
    Member,
    verify,
    verify_both,
)

RFC_8032_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_8032_PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
RFC_8032_SIGNATURE = (
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
    "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
)
# (seed, first and last 32 bytes of the public key): NIST ACVP-Server, ML-DSA-keyGen-FIPS204 (commit 203f667c),
# tcId 26; C2SP Wycheproof, mldsa_65_sign_seed_test.json (commit 022eeaff), first group
ML_DSA_65 = [
    (
        "8ab6448bf58f897d528a8de9f8e59329ac929a9cde7edf3e27e01bc9ef128a67",
        "49de190622b0681761a9db044015bf812760429001fdff5fc897166546277e84",
        "95b29744763675bbabebdce1b816769d66f9bc72de319e1ec39e8f979e49b61c",
    ),
    (
        "2a" * 32,
        "f5408337d0fee65c28851226a5fa81b58464632c78e2a9bef70d330f2e3a5f74",
        "f47c4f219d3a2cb0176bc2236455123c1c5da714ad29d580fb194f87173a18dc",
    ),
]
SEEDS = RFC_8032_SEED, bytes.fromhex(ML_DSA_65[0][0])
ME = Identity.from_seeds(*SEEDS)
MEMBER = ME.public("Bank 01 (Nordkap)")
OTHER = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32).public("other")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def secrets() -> list[str]:
    """Every spelling of the private seeds that could turn up in a text."""
    return [spelling for seed in SEEDS for spelling in (seed.hex(), repr(seed)[2:-1])]


def test_rfc_8032_test_1() -> None:
    assert MEMBER.ed25519 == RFC_8032_PUBLIC
    assert ME.sign(b"").hex() == RFC_8032_SIGNATURE
    verify(MEMBER, b"", bytes.fromhex(RFC_8032_SIGNATURE))


@pytest.mark.parametrize(("seed", "head", "tail"), ML_DSA_65)
def test_published_ml_dsa_65_keys(seed: str, head: str, tail: str) -> None:
    public = Identity.from_seeds(bytes(32), bytes.fromhex(seed)).public("x").ml_dsa_65
    assert (public[:64], public[-64:], len(public)) == (head, tail, 2 * 1952)


def test_frozen_keys_and_fingerprint() -> None:
    digest = hashlib.sha256(bytes.fromhex(MEMBER.ml_dsa_65)).hexdigest()
    assert digest == "b0cc1d6464e1528a478108d4be94be4aca4c7ae69d9595b1e6b752713442022a"
    assert MEMBER.fingerprint == "46db89d6e686f1d44271b620ecb730531b00714b7bccfc4bbc559d9a969f255f"
    assert ME.keys.fingerprint == MEMBER.fingerprint != OTHER.fingerprint


def test_both_signatures_have_their_sizes_and_verify() -> None:
    both = ME.sign_both(b"message")
    assert len(both) == BOTH_SIGNATURES == 64 + 3309
    assert both[:ED25519_SIGNATURE] == ME.sign(b"message")
    verify_both(MEMBER, b"message", both)


@pytest.mark.parametrize("at", [0, 63, 64, 2000, BOTH_SIGNATURES - 1])
def test_each_signature_alone_refuses(at: int) -> None:
    both = ME.sign_both(b"message")
    with pytest.raises(ProtocolError, match=r"Bank 01 \(Nordkap\)"):
        verify_both(MEMBER, b"message", flipped(both, at))


def test_another_message_member_or_length_is_refused() -> None:
    both = ME.sign_both(b"message")
    for member, message, signatures in (
        (MEMBER, b"massage", both),
        (OTHER, b"message", both),
        (MEMBER, b"message", both[:-1]),
        (MEMBER, b"message", both + b"\0"),
        (MEMBER, b"message", both[:64]),
        (MEMBER, b"message", b""),
    ):
        with pytest.raises(ProtocolError, match=member.name.replace("(", r"\(").replace(")", r"\)")):
            verify_both(member, message, signatures)
    for signature in (b"", both, both[:63], flipped(both[:64], 10)):
        with pytest.raises(ProtocolError, match="Ed25519 signature of 'Bank 01"):
            verify(MEMBER, b"message", signature)


def test_a_mixed_pair_of_signatures_is_refused() -> None:
    other = Identity.from_seeds(b"\x01" * 32, SEEDS[1])
    with pytest.raises(ProtocolError, match="Ed25519"):
        verify_both(MEMBER, b"m", other.sign_both(b"m"))
    other = Identity.from_seeds(SEEDS[0], b"\x02" * 32)
    with pytest.raises(ProtocolError, match="ML-DSA-65"):
        verify_both(MEMBER, b"m", other.sign_both(b"m"))


def test_public_keys_are_parsed_once() -> None:
    module._ed25519_key.cache_clear()
    signature = ME.sign(b"m")
    for _ in range(5):
        verify(MEMBER, b"m", signature)
    assert module._ed25519_key.cache_info().misses == 1


def test_generated_identities_differ() -> None:
    one, two = Identity.generate(), Identity.generate()
    assert one.keys != two.keys
    verify_both(one.public("x"), b"m", one.sign_both(b"m"))


@pytest.mark.parametrize("seeds", [(b"", SEEDS[1]), (SEEDS[0], b"\0" * 33), (b"\0" * 31, b"\0" * 33)])
def test_seeds_of_another_length_are_refused(seeds: tuple[bytes, bytes]) -> None:
    with pytest.raises(IdentityError):
        Identity.from_seeds(*seeds)


# --- names and public entries


@pytest.mark.parametrize(
    "name",
    ["a", "bank-01", "Bank 01 (Nordkap)", "Wood Bank & Söhne", "site+2", "01-x/y", "O'Hara, 銀行", "x" * 64, "#1: A_b"],
)
def test_names_in_use_are_accepted(name: str) -> None:
    assert Member.from_json(ME.public(name).to_json()).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        " a",
        "a ",
        "a  b",
        "x" * 65,
        "a\nb",
        "a\tb",
        "a\x00",
        "a\x1b[2J",
        "a\u200bb",
        "a\u202eb",
        "a\u00a0b",
        "a\u0308",
        "\ud800",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RosterError, match="name") as caught:
        ME.public(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"ed25519": RFC_8032_PUBLIC.upper()},
        {"ed25519": RFC_8032_PUBLIC[:-2]},
        {"ed25519": RFC_8032_PUBLIC + "00"},
        {"ed25519": RFC_8032_PUBLIC + "\n"},
        {"ed25519": "g" * 64},
        {"ed25519": 5},
        {"ml_dsa_65": MEMBER.ml_dsa_65[:-1]},
        {"ml_dsa_65": MEMBER.ml_dsa_65 + "00"},
        {"extra": 1},
        {"name": 1},
    ],
)
def test_malformed_entries_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(RosterError):
        Member.made({**dict(MEMBER), **change})


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "{", b"\xff", '{"name": "x"}'])
def test_what_is_no_entry_is_refused(text: str | bytes) -> None:
    with pytest.raises(RosterError):
        Member.from_json(text)


# --- secrets


def test_an_identity_shows_and_gives_nothing() -> None:
    for text in (repr(ME), str(ME), f"{ME}", repr([ME]), str(dir(ME))):
        assert not [secret for secret in secrets() if secret in text]
    assert repr(ME) == "Identity(...)"
    for action in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither pickled nor copied"):
            action(ME)
    with pytest.raises(TypeError):
        vars(ME)


def test_errors_hold_no_secret() -> None:
    pem, sealed = ME.to_pem(None), ME.to_pem(b"correct horse")
    body = pem.split(b"\n")[1].decode()
    for data, passphrase in ((pem, b"correct horse"), (sealed, b"battery"), (pem[:-40], None), (sealed, None)):
        with pytest.raises(IdentityError) as caught:
            Identity.from_pem(data, passphrase)
        text = "".join(traceback.format_exception(caught.value))
        assert not [word for word in (*secrets(), body, "correct horse", "battery") if word in text]
        assert caught.value.__cause__ is None


# --- the key file


@pytest.mark.parametrize("passphrase", [None, b"correct horse", "pässword".encode(), b"\x00\xff"])
def test_a_key_file_reads_back(passphrase: bytes | None) -> None:
    pem = ME.to_pem(passphrase)
    assert Identity.from_pem(pem, passphrase).keys == ME.keys
    assert Identity.from_pem(pem.replace(b"\n", b"\r\n"), passphrase).keys == ME.keys
    assert pem.count(b"-----BEGIN ") == 2
    assert pem.count(b"ENCRYPTED") == (4 if passphrase else 0)
    assert not [word for word in (*SEEDS, passphrase) if word and word in pem]


def test_a_passphrase_is_salted() -> None:
    assert ME.to_pem(b"p") != ME.to_pem(b"p")


def test_plain_blocks_are_ordinary_pkcs8() -> None:
    first = ME.to_pem(None).partition(b"-----END PRIVATE KEY-----\n")
    key = load_pem_private_key(first[0] + first[1], None)
    assert isinstance(key, Ed25519PrivateKey)
    assert key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()) == RFC_8032_SEED


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_reads_the_encrypted_block() -> None:
    block = ME.to_pem(b"correct horse").partition(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    first = block[1] + block[2].partition(b"-----BEGIN")[0]
    command = ["openssl", "pkey", "-pubout", "-outform", "DER", "-passin", "pass:correct horse"]
    done = subprocess.run(command, input=first, capture_output=True, check=True)
    assert done.stdout[-32:].hex() == RFC_8032_PUBLIC


def blocks() -> list[bytes]:
    return [part + b"-----END PRIVATE KEY-----\n" for part in ME.to_pem(None).split(b"-----END PRIVATE KEY-----\n")[:2]]


def test_other_key_files_are_refused() -> None:
    ed25519, ml_dsa_65 = blocks()
    for data in (b"", b"hello", ed25519, ml_dsa_65, ml_dsa_65 + ed25519, ed25519 * 2, ed25519 + ml_dsa_65 * 2):
        with pytest.raises(IdentityError, match="not an identity"):
            Identity.from_pem(data, None)


def test_a_wrong_missing_needless_or_empty_passphrase_is_refused() -> None:
    plain, sealed = ME.to_pem(None), ME.to_pem(b"right")
    with pytest.raises(IdentityError, match="wrong"):
        Identity.from_pem(sealed, b"left")
    with pytest.raises(IdentityError, match="no passphrase"):
        Identity.from_pem(sealed, None)
    with pytest.raises(IdentityError, match="not encrypted"):
        Identity.from_pem(plain, b"right")
    with pytest.raises(IdentityError, match="empty"):
        ME.to_pem(b"")
