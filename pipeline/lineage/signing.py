"""A folder's signature: `SHA256SUMS` lists its files, `SHA256SUMS.sig` signs that list (Ed25519, RFC 8032).

Both are what `sha256sum -c` and `openssl pkeyutl -verify -rawin` read, so a signature is checked without Potstill, too.
A key is read and never written anywhere.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.validate.errors import GateFailed, InputError
from potstill.validate.files import sha256_each, whole_file, write_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
_BY = "# Ed25519 key SHA256:"  # a line that sha256sum passes over
_MAKE = "make one: openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out public.pem"


def sign(folder: Path, key: Path, password: Callable[[], str]) -> str:
    """Sign all files of a folder; an older signature is replaced.

    Args:
        folder: of a package or a checkpoint.
        key: a private Ed25519 key in PEM (PKCS #8).
        password: asked for a key that is locked.

    Returns:
        The fingerprint of the key: SHA-256 of its public half (SubjectPublicKeyInfo, DER), in hex.

    Raises:
        InputError: the key cannot be read, is of another kind, or lies in the folder and would go along.
    """
    if key.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"the key {key} lies in {folder} and would be given away with it; keep it elsewhere")
    private = _private(key, password)
    name = fingerprint(private.public_key())
    sums = f"{_BY}{name}\n" + "".join(f"{found}  {one}\n" for one, found in _files(folder).items())
    write_text(folder / SUMS, sums)
    with whole_file(folder / SIGNATURE) as aside:
        aside.write_bytes(private.sign(sums.encode()))
    return name


def signed_by(folder: Path) -> str | None:
    """The fingerprint that a folder's signature names, which proves nothing; None where it has no signature."""
    if not (folder / SUMS).is_file() or not (folder / SIGNATURE).is_file():
        return None
    first = (folder / SUMS).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first.removeprefix(_BY) if first.startswith(_BY) else "not named"


def check(folder: Path, public: Path) -> str:
    """The fingerprint of a key that a folder is signed by, with all its files as they were then.

    Args:
        folder: of a package or a checkpoint.
        public: an Ed25519 public key in PEM.

    Raises:
        GateFailed: there is no signature, it is by another key, or what was signed was changed.
        InputError: the key cannot be read.
    """
    from cryptography.exceptions import InvalidSignature

    key = _public(public)
    name, said = fingerprint(key), signed_by(folder)
    if said is None:
        raise GateFailed(
            f"{folder} has no signature ({SUMS} and {SIGNATURE}), expected one by the key SHA256:{name}; ask who gave "
            "it for a signed one"
        )
    if said != name:
        raise GateFailed(f"{folder} is signed by another key: expected SHA256:{name}, found SHA256:{said}")
    sums = (folder / SUMS).read_bytes()
    try:
        key.verify((folder / SIGNATURE).read_bytes(), sums)
    except InvalidSignature:
        raise GateFailed(
            f"{folder / SIGNATURE} is no signature of {SUMS} by the key SHA256:{name}: one of the two was changed "
            "after it was signed"
        ) from None
    _compare(folder, sums.decode())
    return name


def _compare(folder: Path, sums: str) -> None:
    """Refuse a folder whose files are not those of a list."""
    lines = [line.partition("  ") for line in sums.splitlines() if not line.startswith("#")]
    signed, found = {name: sha256 for sha256, _, name in lines}, _files(folder)
    for name in sorted({*signed, *found}):
        if signed.get(name) != found.get(name):
            was, now = (f"SHA-256 {one[name]}" if name in one else "no such file" for one in (signed, found))
            raise GateFailed(f"{folder / name} is not what was signed: expected {was}, found {now}")


def _files(folder: Path) -> dict[str, str]:
    found = {name: sha256 for name, sha256 in sha256_each(folder).items() if name not in (SUMS, SIGNATURE)}
    for name in found:
        if "\n" in name or "\\" in name:
            raise InputError(f"{folder} holds a file named {name!r}, which {SUMS} cannot list; rename it")
    return found


def fingerprint(key: "Ed25519PublicKey") -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo, DER), in hex: `openssl pkey -pubin -outform DER | sha256sum`."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _private(file: Path, password: Callable[[], str]) -> "Ed25519PrivateKey":
    """A private key; what cannot be read is told without what is in it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read(file)
    try:
        try:
            key = load_pem_private_key(content, None)
        except TypeError:  # it is locked
            key = load_pem_private_key(content, password().encode())
    except Exception:  # of several kinds, by what is wrong with it
        raise InputError(
            f"{file} is no private key in PEM that can be opened, or its password is another one; {_MAKE}"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{file} is a key of another kind than Ed25519; {_MAKE}")
    return key


def _public(file: Path) -> "Ed25519PublicKey":
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _read(file)
    try:
        key = load_pem_public_key(content)
    except Exception:
        raise InputError(
            f"{file} is no public key in PEM; write it of the private one: openssl pkey -in key.pem -pubout"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{file} is a key of another kind than Ed25519; {_MAKE}")
    return key


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the key {file}: {error.strerror}") from None
