"""Serves only what a trusted key has signed, and nothing older than what was served before.

Archives are copied into a private store first, and the copies are verified and served: what happens to the original
afterwards changes nothing.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from archiver import bom, pack, sign
from server.archive import Archive, ArchiveError, verify
from server.tokens import write_private
from server.torchserve import STORE
from training.errors import UserError

# The newest version of each model that was ever served from this folder.
VERSIONS = Path("run/versions.json")
# Of an archive and the files beside it.
SUFFIXES = (".mar", ".mar.sha256", bom.SUFFIX, sign.MANIFEST_SUFFIX, sign.SIGNATURE_SUFFIX)


def admit(archives: Sequence[Archive], key: Path, *, allow_downgrade: bool) -> list[Archive]:
    """Verified copies of archives in `STORE`, under the names that they are served under.

    key: the public key (PEM, P-256) that must have signed them. Raises ArchiveError, saying which archive and why, if
    one is not signed by it, is not what its manifest says, or is older than the one served last (unless
    `allow_downgrade`).
    """
    check_public_key(key)
    empty_store()
    return _newest([_admit(archive, key, archive.name) for archive in archives], allow_downgrade)


def admit_next(archive: Archive, key: Path, *, allow_downgrade: bool) -> Archive:
    """As `admit`, for an archive that shall follow one that is served: `NAME.next.mar` of the store."""
    check_public_key(key)
    return _newest([_admit(archive, key, f"{archive.name}.next")], allow_downgrade)[0]


def keep(archive: Archive, name: str) -> Archive:
    """An archive in the store under another name, where no key is trusted: a link, or a copy if that cannot be."""
    target = STORE / f"{name}.mar"
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(archive.path)
    except OSError:
        shutil.copyfile(archive.path, target)
    return Archive(archive.name, target)


def empty_store() -> None:
    """Makes the store anew."""
    shutil.rmtree(STORE, ignore_errors=True)
    STORE.mkdir(mode=0o700, parents=True)


def _newest(admitted: list[Archive], allow_downgrade: bool) -> list[Archive]:
    """The archives, if none is older than what was served before."""
    newest = _versions()
    for archive in admitted:
        model = pack.manifest(archive.path)["model"]
        last = newest.get(model["modelName"])
        if last is not None and _order(model["modelVersion"]) < _order(last) and not allow_downgrade:
            raise ArchiveError(
                f"{archive.name}: version {model['modelVersion']} of {model['modelName']!r} is older than {last}, "
                "which was served before; add --allow-downgrade if that is meant"
            )
    return admitted


def check(archives: Sequence[Archive], key: Path) -> None:
    """Raises ArchiveError as `admit` does, whatever was served before, and leaves nothing behind."""
    check_public_key(key)
    with tempfile.TemporaryDirectory(prefix="marble-") as folder:
        for archive in archives:
            _admit(archive, key, archive.name, Path(folder))


def fill(folder: Path, archives: Sequence[Path]) -> Path:
    """Copies archives and the files beside them, as many as there are, into a folder that holds nothing else after."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    empty(folder)
    for path in (file for archive in archives for file in sign.files(archive) if file.is_file()):
        _copy(path, folder / path.name)
    return folder


def empty(folder: Path) -> None:
    """Removes all files of archives from a folder."""
    for path in folder.iterdir():
        if path.name.endswith(SUFFIXES):
            path.unlink()


def remember(archives: Sequence[Archive]) -> None:
    """Writes down the versions that are served now."""
    models = (pack.manifest(archive.path)["model"] for archive in archives)
    versions = {**_versions(), **{model["modelName"]: model["modelVersion"] for model in models}}
    write_private(VERSIONS, json.dumps(versions, indent=2, sort_keys=True) + "\n")


def check_public_key(path: Path) -> None:
    """Raises ArchiveError if a file is not a public P-256 key in PEM."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArchiveError(
            f"--trust {path}: cannot be read ({error.strerror}); docs/trust.md: how to make a key"
        ) from None
    if b"PRIVATE KEY" in content:
        raise ArchiveError(f"--trust {path}: this is a private key, which belongs on no server; give the public one")
    try:
        key = load_pem_public_key(content)
    except Exception:
        raise ArchiveError(f"--trust {path}: no public key in PEM; docs/trust.md says how to make one") from None
    if not sign.is_p256(key):
        raise ArchiveError(f"--trust {path}: not an elliptic-curve key on P-256; docs/trust.md says how to make one")


def _admit(archive: Archive, key: Path, name: str, store: Path = STORE) -> Archive:
    """A private copy of one archive, `name` in the store, once it is known who signed it."""
    folder = store / f"{name}.signed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    *signed, signature = sign.files(archive.path)
    for path in (*signed, signature):
        if not path.is_file():
            raise ArchiveError(
                f"{path} is missing: --trust serves signed archives alone; copy it beside the archive, or sign: "
                "./build_mar.sh --sign KEY"
            )
    for path in signed:
        _copy(path, folder / path.name)
    # Not among the files that it covers.
    copied_signature = _copy(signature, store / f"{name}.sig")
    _verify_signature(archive, folder, copied_signature, key)
    copy = folder / archive.path.name
    _check_manifest(archive, copy)
    verify(archive.name, copy)
    return Archive(archive.name, copy.replace(store / f"{name}.mar"))


def _copy(source: Path, target: Path) -> Path:
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o400)
    return target


def _verify_signature(archive: Archive, folder: Path, signature: Path, key: Path) -> None:
    import model_signing.verifying

    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key)
    try:
        config.set_hashing_config(sign.hashing_config()).verify(folder, signature)
    except Exception as error:  # the library has no exception of its own for this
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArchiveError(
            f"{archive.path}: not signed by {key} as it is ({reason}); it was changed, or signed by another key: build "
            "and sign it again, or copy all of its files anew"
        ) from None


def _check_manifest(archive: Archive, copy: Path) -> None:
    """Raises ArchiveError if the signed manifest is that of another archive than the one beside it."""
    try:
        said = json.loads(copy.with_name(copy.stem + sign.MANIFEST_SUFFIX).read_text(encoding="utf-8"))
        model = pack.manifest(copy)["model"]
        claimed = (said["name"], said["name"], said["version"], said["sha256"][copy.name])
        found = (copy.stem, model["modelName"], model["modelVersion"], sign.checksum(copy).read_text()[:64])
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise ArchiveError(f"{archive.path}: its manifest is not readable ({error}); build it again") from None
    if claimed != found:
        raise ArchiveError(f"{archive.path}: its manifest names another archive; do not rename signed archives")


def _versions() -> Mapping[str, str]:
    try:
        value = json.loads(VERSIONS.read_text(encoding="utf-8"))
        return {str(name): str(version) for name, version in value.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise ArchiveError(f"{VERSIONS} is damaged ({error}); restore it, or remove it to begin anew") from None


def _order(version: str) -> tuple[int, ...]:
    """build_mar.sh takes numbers separated by dots alone."""
    try:
        parts = [int(part) for part in version.split(".")]
    except ValueError:
        raise ArchiveError(f"version {version!r} cannot be put in order: build it with build_mar.sh") from None
    while parts and parts[-1] == 0:  # 1.0 is 1
        parts.pop()
    return tuple(parts)
