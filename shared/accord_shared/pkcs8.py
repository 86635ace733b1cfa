"""Encrypted PKCS #8 with scrypt (RFC 5958, RFC 8018, RFC 7914), as `openssl pkcs8 -topk8 -scrypt` writes it.

Written out because `cryptography` encrypts PKCS #8 with 2048 rounds of PBKDF2 only, far too few for a passphrase; it
reads this form.
"""

from __future__ import annotations

import base64

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.padding import PKCS7

SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**14, 8, 5
"""16 MiB and a tenth of a second; OWASP's equivalent of N = 2^17, p = 1 within OpenSSL's 32 MiB limit."""

_SEQUENCE, _INTEGER, _OCTETS = 0x30, 0x02, 0x04
_PBES2 = bytes.fromhex("06092a864886f70d01050d")
_SCRYPT = bytes.fromhex("06092b06010401da47040b")
_AES_256_CBC = bytes.fromhex("060960864801650304012a")


def _der(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8 or 1, "big")
    return bytes([tag]) + (size if len(body) < 128 else bytes([0x80 | len(size)]) + size) + body


def _integer(value: int) -> bytes:
    return _der(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _encrypted(key_info: bytes, key: bytes, iv: bytes) -> bytes:
    padder, cipher = PKCS7(128).padder(), Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return cipher.update(padder.update(key_info) + padder.finalize()) + cipher.finalize()


def encrypt_pkcs8(key_info: bytes, passphrase: bytes) -> bytes:
    """A PEM block `ENCRYPTED PRIVATE KEY` of a DER PrivateKeyInfo, under a fresh salt."""
    fresh = AESGCM.generate_key(256)  # 32 bytes of the operating system's generator
    salt, iv = fresh[:16], fresh[16:]
    key = Scrypt(salt=salt, length=32, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P).derive(passphrase)
    costs = _der(_SEQUENCE, _der(_OCTETS, salt), _integer(SCRYPT_N), _integer(SCRYPT_R), _integer(SCRYPT_P))
    kdf = _der(_SEQUENCE, _SCRYPT, costs)
    cipher = _der(_SEQUENCE, _AES_256_CBC, _der(_OCTETS, iv))
    algorithm = _der(_SEQUENCE, _PBES2, _der(_SEQUENCE, kdf, cipher))
    return _pem(_der(_SEQUENCE, algorithm, _der(_OCTETS, _encrypted(key_info, key, iv))))


def _pem(der: bytes) -> bytes:
    text = base64.b64encode(der)
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join((b"-----BEGIN ENCRYPTED PRIVATE KEY-----", *lines, b"-----END ENCRYPTED PRIVATE KEY-----", b""))
