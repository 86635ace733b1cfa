"""The enrolment token: one line that survives a paste, and refuses everything else."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from accord_shared.errors import EnrolmentRefused
from accord_shared.service.keyfile import new_tls_key
from accord_shared.service.token import Invitation, entity_name

SECRET = "ab" * 32


def authority() -> str:
    from datetime import UTC, datetime

    key, name = new_tls_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2036, 1, 1, tzinfo=UTC))
    )
    return base64.b64encode(built.sign(key, SHA256()).public_bytes(Encoding.DER)).decode()


AUTHORITY = authority()


def invitation(**changes: Any) -> Invitation:
    fields: dict[str, Any] = {
        "address": "coordinator.example.org:9402",
        "name": "Bank 01 (Nordkap)",
        "secret": SecretStr(SECRET),
        "authority": AUTHORITY,
        "federation": "Nord",
        "expires_us": 1_800_000_000_000_000,
    }
    return Invitation(**(fields | changes))


def packed(value: object) -> str:
    body = base64.urlsafe_b64encode(zlib.compress(json.dumps(value).encode())).rstrip(b"=")
    return "accord1." + body.decode()


def test_it_comes_back_also_from_a_paste_with_line_breaks() -> None:
    token = invitation().encode()
    broken = " \n".join(token[at : at + 40] for at in range(0, len(token), 40)) + "\r\n"
    for text in (token, broken):
        found = Invitation.decode(text)
        assert found == invitation()
        assert found.secret.get_secret_value() == SECRET
    assert x509.load_pem_x509_certificate(found.authority_pem).subject.rfc4514_string() == "CN=authority"


def test_it_does_not_print_its_secret() -> None:
    made = invitation()
    for text in (repr(made), str(made), made.model_dump_json(), str(made.model_dump())):
        assert SECRET not in text


@given(st.text(max_size=200))
def test_no_other_text_is_one(text: str) -> None:
    for token in (text, f"accord1.{text}"):
        with pytest.raises(EnrolmentRefused):
            Invitation.decode(token)


def test_a_cut_or_changed_token_is_refused_without_repeating_it() -> None:
    token = invitation().encode()
    for wrong in (
        token[:-1],
        token[:-40],
        token[:60] + token[61:],
        token + "AAAA",
        token.replace("accord1", "accord2"),
    ):
        with pytest.raises(EnrolmentRefused) as refusal:
            Invitation.decode(wrong)
        assert token[8:40] not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../etc/passwd"},
        {"name": ".ssh"},
        {"name": "a/b"},
        {"name": "two\nlines"},
        {"federation": "a\\b"},
        {"secret": "short"},
        {"address": "no port"},
        {"address": "host:9402/path"},
        {"authority": "AAAA"},
        {"authority": "not base64!"},
        {"expires_us": -1},
        {"expires_us": "soon"},
        {"more": 1},
    ],
)
def test_what_it_says_is_checked(changes: dict[str, Any]) -> None:
    fields = invitation().model_dump(mode="json") | {"secret": SECRET}
    assert Invitation.decode(packed(fields)) == invitation()
    with pytest.raises(EnrolmentRefused, match="damaged"):
        Invitation.decode(packed(fields | changes))


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = packed("0" * 10_000_000)
    assert len(bomb) < 16_000
    tracemalloc.start()
    try:
        with pytest.raises(EnrolmentRefused):
            Invitation.decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # bytes
    finally:
        tracemalloc.stop()
    with pytest.raises(EnrolmentRefused):
        Invitation.decode("accord1." + "A" * 1_000_000)


@pytest.mark.parametrize("name", ["", " x", "a/b", "..", "a\\b", "-x", "a:b", "a\0b", "x" * 65, "ü" * 33, "a|b", "a*"])
def test_names_that_no_file_or_certificate_may_have(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        entity_name(name)


@pytest.mark.parametrize("name", ["Bank 01 (Nordkap)", "bank-1", "Sparkasse Südkap", "x" * 64])
def test_names_that_are_fine(name: str) -> None:
    assert entity_name(name) == name
