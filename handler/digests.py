"""SHA-256 digests of an archive's files: written when it is packed, checked when a worker loads it."""

import hashlib
import json
from pathlib import Path

FILE_NAME = "digests.json"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def render(files: dict[str, Path]) -> str:
    """The text of `digests.json` for archive members by name: sorted, so equal files give equal bytes."""
    return json.dumps({name: sha256(path) for name, path in sorted(files.items())}, indent=1) + "\n"


def verify(model_dir: Path) -> None:
    """Raises ValueError, naming the file, if one listed in `digests.json` is missing or has other content.

    A bundle has no such list, so there is nothing to check.
    """
    listing = model_dir / FILE_NAME
    if not listing.exists():
        return
    for name, expected in json.loads(listing.read_text(encoding="utf-8")).items():
        path = model_dir / name
        if not path.is_file():
            raise ValueError(f"{name} is missing from the archive: build or copy it again")
        if sha256(path) != expected:
            raise ValueError(f"{name} does not have the digest in {FILE_NAME}: build or copy the archive again")


def model_digest(model_dir: Path) -> str:
    """One SHA-256 for the whole model: that of `digests.json`, or of a bundle's weights."""
    listing = model_dir / FILE_NAME
    return sha256(listing if listing.exists() else model_dir / "model.safetensors")
