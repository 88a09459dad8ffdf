"""An archive as the server sees it: verified before TorchServe may load it."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

from handler import golden
from handler.digests import sha256


class ArchiveError(Exception):
    """An archive that must not be served. The message says why and how to mend it."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A verified archive and the name it is served under."""

    name: str
    path: Path


def verify(name: str, path: Path) -> Archive:
    """The archive at `path`, after its checksum has been found right.

    Raises ArchiveError if it is missing, has no checksum or another one, or is not a whole Marble archive.
    """
    if not path.is_file():
        raise ArchiveError(f"{path}: there is no such archive; build it: ./build_mar.sh --bundle artifacts/{name}")
    checksum = path.with_name(path.name + ".sha256")
    if not checksum.is_file():
        raise ArchiveError(f"{checksum} is missing: an archive without its checksum is not served; copy it beside it")
    expected = checksum.read_text(encoding="ascii", errors="replace").split()[:1]
    if expected != [sha256(path)]:
        raise ArchiveError(
            f"{path}: its SHA-256 is not the one in {checksum.name}; it is incomplete or was changed: "
            "copy or build it again"
        )
    try:
        with zipfile.ZipFile(path) as file:
            missing = {"MAR-INF/MANIFEST.json", "model-config.yaml", golden.FILE_NAME} - set(file.namelist())
    except zipfile.BadZipFile as error:
        raise ArchiveError(f"{path}: not a model archive ({error}); build it again") from None
    if missing:
        raise ArchiveError(f"{path}: has no {', '.join(sorted(missing))}; build it with build_mar.sh")
    return Archive(name, path)
