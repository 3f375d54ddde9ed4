"""Signatures by a local key, held against openssl and sha256sum."""

import shutil
import subprocess
from pathlib import Path

import pytest

from potstill.pipeline.lineage.signing import SIGNATURE, SUMS, check, sign, signed_by
from potstill.validate.errors import GateFailed, InputError

NEEDS = ("openssl", "sha256sum")
pytestmark = pytest.mark.skipif(not all(map(shutil.which, NEEDS)), reason=f"needs {' and '.join(NEEDS)}")


def ran(*words: object, cwd: Path | None = None, code: int = 0) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout


def keys(folder: Path, name: str = "key", kind: tuple[str, ...] = ("ed25519",)) -> tuple[Path, Path]:
    """A key by openssl, and its public half."""
    folder.mkdir(exist_ok=True)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    ran("openssl", "genpkey", "-algorithm", *kind, "-out", private)
    ran("openssl", "pkey", "-in", private, "-pubout", "-out", public)
    return private, public


def unasked() -> str:
    raise AssertionError("no password was to be asked for")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files to sign, in a folder and below it."""
    (tmp_path / "made" / "golden").mkdir(parents=True)
    (tmp_path / "made" / "model.onnx").write_bytes(b"weights")
    (tmp_path / "made" / "golden" / "0 1.bin").write_bytes(b"sample")
    return tmp_path / "made"


def test_openssl_and_sha256sum_agree(folder: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path / "keys")
    name = sign(folder, private, unasked)
    assert check(folder, public) == signed_by(folder) == name
    ran("sha256sum", "--check", "--strict", SUMS, cwd=folder)
    words = ("openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-sigfile", SIGNATURE, "-in", SUMS)
    assert "Verified Successfully" in ran(*words, cwd=folder)
    ran("openssl", "pkey", "-pubin", "-in", public, "-outform", "DER", "-out", tmp_path / "public.der")
    assert ran("sha256sum", tmp_path / "public.der").split()[0] == name
    ran("openssl", "pkeyutl", "-sign", "-inkey", private, "-rawin", "-in", SUMS, "-out", tmp_path / "sig", cwd=folder)
    assert (tmp_path / "sig").read_bytes() == (folder / SIGNATURE).read_bytes()  # Ed25519 is deterministic


def test_the_key_goes_nowhere(folder: Path, tmp_path: Path) -> None:
    private, _ = keys(tmp_path / "keys")
    sign(folder, private, unasked)
    secret = "".join(private.read_text().splitlines()[1:-1])[-43:].encode()
    assert all(secret not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    inside = Path(shutil.copy(private, folder / "key.pem"))
    with pytest.raises(InputError, match="lies in .* and would be given away with it"):
        sign(folder, inside, unasked)


def test_another_key_no_signature_and_changes_are_found(folder: Path, tmp_path: Path) -> None:
    (private, public), (others, _) = keys(tmp_path / "keys"), keys(tmp_path / "keys", "other")
    with pytest.raises(
        GateFailed, match=r"has no signature \(SHA256SUMS and SHA256SUMS.sig\), expected one by the key"
    ):
        check(folder, public)
    assert signed_by(folder) is None
    theirs = sign(folder, others, unasked)
    with pytest.raises(
        GateFailed, match=f"signed by another key: expected SHA256:[0-9a-f]{{64}}, found SHA256:{theirs}"
    ):
        check(folder, public)
    name = sign(folder, private, unasked)
    (folder / "model.onnx").write_bytes(b"other weights")
    with pytest.raises(GateFailed, match="model.onnx is not what was signed: expected SHA-256 .*, found SHA-256 "):
        check(folder, public)
    (folder / "model.onnx").unlink()
    with pytest.raises(GateFailed, match="model.onnx is not what was signed: expected SHA-256 .*, found no such file"):
        check(folder, public)
    (folder / "model.onnx").write_bytes(b"weights")
    assert check(folder, public) == name
    (folder / "more.txt").write_text("more")
    with pytest.raises(GateFailed, match="more.txt is not what was signed: expected no such file, found SHA-256 "):
        check(folder, public)


def test_a_list_that_was_changed_or_relabelled_is_found(folder: Path, tmp_path: Path) -> None:
    (private, public), (others, _) = keys(tmp_path / "keys"), keys(tmp_path / "keys", "other")
    name = sign(folder, private, unasked)
    with (folder / SUMS).open("a") as file:
        file.write(f"{'0' * 64}  more.txt\n")
    with pytest.raises(GateFailed, match="is no signature of SHA256SUMS by the key .*: one of the two was changed"):
        check(folder, public)
    by_others = sign(folder, others, unasked)  # and it is said to be by the first key
    (folder / SUMS).write_text((folder / SUMS).read_text().replace(by_others, name))
    with pytest.raises(GateFailed, match="is no signature of SHA256SUMS"):
        check(folder, public)
    (folder / SUMS).write_text("".join((folder / SUMS).read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(GateFailed, match="found SHA256:not named"):
        check(folder, public)


def test_a_locked_key_is_opened_by_its_password(folder: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path / "keys")
    locked = tmp_path / "keys" / "locked.pem"
    ran("openssl", "pkey", "-in", private, "-aes256", "-passout", "pass:word", "-out", locked)
    assert sign(folder, locked, lambda: "word") == check(folder, public)
    with pytest.raises(InputError, match="or its password is another one"):
        sign(folder, locked, lambda: "another")


def test_keys_that_are_none_are_told_without_their_content(folder: Path, tmp_path: Path) -> None:
    private, _ = keys(tmp_path / "keys")
    elliptic, its_public = keys(tmp_path / "keys", "ec", ("EC", "-pkeyopt", "ec_paramgen_curve:P-256"))
    (tmp_path / "text.pem").write_text("a secret word")
    with pytest.raises(InputError, match="is no private key in PEM that can be opened.*openssl genpkey") as told:
        sign(folder, tmp_path / "text.pem", unasked)
    assert "a secret word" not in str(told.value)
    with pytest.raises(InputError, match="ec.pem is a key of another kind than Ed25519"):
        sign(folder, elliptic, unasked)
    with pytest.raises(InputError, match="cannot read the key .*none.pem: No such file"):
        sign(folder, tmp_path / "none.pem", unasked)
    sign(folder, private, unasked)
    with pytest.raises(InputError, match="ec.pub.pem is a key of another kind than Ed25519"):
        check(folder, its_public)
    with pytest.raises(InputError, match="key.pem is no public key in PEM; write it of the private one"):
        check(folder, private)


def test_a_name_that_the_list_cannot_hold_is_told(folder: Path, tmp_path: Path) -> None:
    private, _ = keys(tmp_path / "keys")
    (folder / "two\nlines").write_text("")
    with pytest.raises(InputError, match="which SHA256SUMS cannot list; rename it"):
        sign(folder, private, unasked)
