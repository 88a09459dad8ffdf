"""Signs an archive and what belongs to it with OpenSSF model-signing, by a key and with no network.

What is signed is a folder of four files, so that the signature covers their names, too: a file signed alone could be
given the name of another model. They lie in the store beside the archive:

N.mar   N.mar.sha256   N.cdx.json (bill of materials)   N.manifest.json (name, version, digests)   N.sig (the signature)
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from archiver import bom, pack
from handler.digests import sha256
from training.errors import UserError

MANIFEST_SUFFIX = ".manifest.json"
SIGNATURE_SUFFIX = ".sig"


def files(archive: Path) -> list[Path]:
    """The archive and the files beside it: the four that are signed, and last the signature."""
    suffixes = (bom.SUFFIX, MANIFEST_SUFFIX, SIGNATURE_SUFFIX)
    return [archive, checksum(archive), *(archive.with_name(archive.stem + suffix) for suffix in suffixes)]


def checksum(archive: Path) -> Path:
    """Where the archive's SHA-256 is written."""
    return archive.with_name(f"{archive.name}.sha256")


def write_checksum(archive: Path) -> None:
    """Writes the `.sha256` of an archive, as `sha256sum --check` reads it."""
    checksum(archive).write_text(f"{sha256(archive)}  {archive.name}\n", encoding="ascii")


def sign(archive: Path, key: Path) -> None:
    """Writes the manifest and the signature beside an archive that has its checksum and bill of materials.

    key: a private key that `check_private_key` takes.
    """
    import model_signing.signing

    *signed, signature = files(archive)
    signed[-1].write_text(_manifest(archive), encoding="utf-8")
    # On the archive's own disk, so that links will do.
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".signing-") as folder:
        for path in signed:
            os.link(path, Path(folder, path.name))
        config = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(hashing_config()).sign(folder, signature)


def hashing_config() -> Any:
    """How the folder is hashed, by signer and verifier: every file of it. By default `.git` would be left out."""
    import model_signing.hashing

    return model_signing.hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def check_private_key(path: Path) -> None:
    """Raises UserError if a file is not an unencrypted private P-256 key in PEM."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--sign {path}: cannot be read ({error.strerror}); docs/trust.md: how to make a key") from None
    if b"PUBLIC KEY" in content:
        raise UserError(f"--sign {path}: this is a public key, for scripts/serve --trust; give the private one")
    try:
        key = load_pem_private_key(content, None)
    except TypeError:
        raise UserError(f"--sign {path}: the key has a password; write it without: openssl pkey -in {path}") from None
    except Exception:
        raise UserError(f"--sign {path}: no private key in PEM; make one as docs/trust.md says") from None
    if not is_p256(key):
        raise UserError(f"--sign {path}: not an elliptic-curve key on P-256; make one as docs/trust.md says")


def is_p256(key: Any) -> bool:
    """Whether a key of `cryptography`, private or public, is on the curve P-256."""
    return getattr(getattr(key, "curve", None), "name", None) == "secp256r1"


def _manifest(archive: Path) -> str:
    model = pack.manifest(archive)["model"]
    digests = {path.name: sha256(path) for path in (archive, archive.with_name(archive.stem + bom.SUFFIX))}
    value = {"name": model["modelName"], "version": model["modelVersion"], "sha256": digests}
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
