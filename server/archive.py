"""An archive as the server sees it: verified before TorchServe may load it."""

import re
import stat
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from handler import golden
from handler.digests import sha256

_MOST_MEMBERS = 10_000
# Of a member's path: no "..", no leading dot, no backslash, nothing empty.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# What build_mar.sh writes, and no pickle among it.
_TEXTS = {".jinja", ".json", ".jsonl", ".md", ".model", ".py", ".spm", ".txt", ".xml", ".yaml"}
_WEIGHTS = ".safetensors"
_NAMES = {"LICENSE", "openvino_model.bin"}
# How a pickle and a zip begin, in which torch.save hides pickles.
_FORBIDDEN = (b"\x80", b"PK\x03\x04")
# Signature, flags and method, CRC, both sizes, and the lengths of the name and the extra field, of a local header of a
# zip: sections 4.3.7 and 4.4 of https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
_LOCAL_HEADER = struct.Struct("<4s2xHH4x4xIIHH")
_DATA_DESCRIPTOR = 1 << 3
_ZIP64 = 0xFFFFFFFF


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
            check_members(path, file.infolist())
            check_contents(path, file)
    except zipfile.BadZipFile as error:
        raise ArchiveError(f"{path}: not a model archive ({error}); build it again") from None
    if missing:
        raise ArchiveError(f"{path}: has no {', '.join(sorted(missing))}; build it with build_mar.sh")
    return Archive(name, path)


def check_members(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Raises ArchiveError for members that could be unpacked to another place, over each other, or to far more.

    build_mar.sh writes none of these, so nothing is lost by refusing them.
    """
    seen: set[str] = set()
    if len(entries) > _MOST_MEMBERS:
        raise ArchiveError(f"{path}: has {len(entries)} members, over {_MOST_MEMBERS}; build it with build_mar.sh")
    for entry in entries:
        name = entry.orig_filename
        if not all(_PART.fullmatch(part) for part in name.split("/")):
            raise ArchiveError(f"{path}: the member {name!r} has a path that is not served; build it with build_mar.sh")
        if name.casefold() in seen:
            raise ArchiveError(f"{path}: has the member {name!r} twice; build it with build_mar.sh")
        seen.add(name.casefold())
        known = {*_TEXTS, _WEIGHTS}
        if Path(name).suffix not in known and name not in _NAMES:
            raise ArchiveError(
                f"{path}: the member {name!r} is of no kind that is served ({', '.join(sorted(known | _NAMES))}); "
                "build it with build_mar.sh"
            )
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ArchiveError(f"{path}: the member {name!r} is a link or no file; build it with build_mar.sh")
        # Stored members cannot grow when they are unpacked.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ArchiveError(f"{path}: the member {name!r} is compressed; build it with build_mar.sh")


def check_contents(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises ArchiveError for members that are not what their names say, or that the list of members does not have.

    Members must lie back to back, each as the list says: who unpacks a zip as a stream goes by what lies on the way.
    """
    end = 0
    with path.open("rb") as file:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
            file.seek(end)
            header = file.read(_LOCAL_HEADER.size).ljust(_LOCAL_HEADER.size, b"\0")
            signature, flags, method, packed, size, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            name = file.read(name_length)
            sizes = {packed, size} <= {entry.file_size, _ZIP64}
            as_listed = (signature, method, name) == (b"PK\x03\x04", entry.compress_type, entry.orig_filename.encode())
            if end != entry.header_offset or not as_listed or not sizes or flags & _DATA_DESCRIPTOR:
                raise ArchiveError(f"{path}: what lies before {entry.filename!r} is not what is listed; build it again")
            file.seek(extra_length, 1)
            begin = file.read(16)[: entry.file_size]
            end = _LOCAL_HEADER.size + entry.header_offset + name_length + extra_length + entry.file_size
            suffix = Path(entry.filename).suffix
            if suffix in _TEXTS and begin.startswith(_FORBIDDEN):
                raise ArchiveError(f"{path}: the member {entry.filename!r} is a pickle or a zip; build it again")
            if suffix == _WEIGHTS and begin[8:9] != b"{":
                raise ArchiveError(f"{path}: the member {entry.filename!r} is not safetensors; build it again")
    if end != archive.start_dir:
        raise ArchiveError(f"{path}: there is something between its members and their list; build it again")
