"""Row 12: signed archives that somebody has tampered with, and servers that trust the signer's key.

The archives are small and their code leaves a mark where it runs: none of it may, before the archive is refused.
"""

import json
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from archiver import sign
from benchmarks.fault_injection.bench import Bench, Target
from benchmarks.fault_injection.site import Site

P256 = ("EC", "-pkeyopt", "ec_paramgen_curve:P-256")
MEMBERS = ("MAR-INF/MANIFEST.json", "config.json", "golden.jsonl", "model-config.yaml", "model.safetensors")
SUFFIXES = (".mar", ".mar.sha256", ".cdx.json", ".manifest.json", ".sig")


def make(store: Path, name: str, key: Path, version: str = "1.0", **members: bytes) -> Path:
    """A signed archive whose code leaves a mark where it runs."""
    archive = store / f"{name}.mar"
    model = {"modelName": name, "modelVersion": version, "handler": "entry.py", "configFile": "model-config.yaml"}
    contents = dict.fromkeys(MEMBERS, b"{}") | {
        "MAR-INF/MANIFEST.json": json.dumps({"runtime": "python", "model": model}).encode(),
        "model.safetensors": b"\2\0\0\0\0\0\0\0{}",
        "entry.py": f"open({str(store / 'it-ran')!r}, 'w')".encode(),
        **members,
    }
    with zipfile.ZipFile(archive, "w") as file:
        for member, content in sorted(contents.items()):
            file.writestr(member, content)
    archive.with_name(f"{name}.cdx.json").write_text(json.dumps({"name": name, "version": version}))
    sign.write_checksum(archive)
    sign.sign(archive, key)
    return archive


def make_key(path: Path, *kind: str) -> Path:
    """A private key in PEM, its public one beside it as .pub."""
    subprocess.run(["openssl", "genpkey", "-algorithm", *kind, "-out", path], check=True, capture_output=True)
    public = path.with_suffix(".pub")
    subprocess.run(["openssl", "pkey", "-in", path, "-pubout", "-out", public], check=True, capture_output=True)
    return path


def flip(path: Path) -> None:
    """Changes a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of(store: Path, suffix: str, name: str = "small") -> Path:
    return store / f"{name}{suffix}"


def with_checksum(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A change of the archive by someone who mends its checksum, too."""

    def changed(store: Path) -> None:
        change(of(store, ".mar"))
        sign.write_checksum(of(store, ".mar"))

    return changed


def repacked(member: str | zipfile.ZipInfo, content: bytes | None) -> Callable[[Path], None]:
    """The archive written anew with a member added, replaced, or (None) left out."""

    def change(archive: Path) -> None:
        with zipfile.ZipFile(archive) as file:
            members = {entry.filename: file.read(entry) for entry in file.infolist()}
        members.pop(member if isinstance(member, str) else member.filename, None)
        with zipfile.ZipFile(archive, "w") as file:
            for name, kept in members.items():
                file.writestr(name, kept)
            if content is not None:
                file.writestr(member, content)

    return change


def with_manifest(archive: Path, **changes: object) -> None:
    path = archive.with_name(archive.stem + sign.MANIFEST_SUFFIX)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def hide(archive: Path) -> None:
    """A member that is there, but not in the list of members."""
    with zipfile.ZipFile(archive) as file:
        begin, list_begin = archive.read_bytes(), file.start_dir
        members = file.infolist()
    hidden = archive.with_name("hidden.zip")
    with zipfile.ZipFile(hidden, "w") as file:
        file.writestr("hidden.py", "print()")
        end = file.start_dir
    extra = hidden.read_bytes()[:end]
    hidden.unlink()
    archive.write_bytes(begin[:list_begin] + extra + moved(begin[list_begin:], len(extra)))
    with zipfile.ZipFile(archive) as file:
        assert [entry.filename for entry in file.infolist()] == [entry.filename for entry in members]


def moved(directory: bytes, by: int) -> bytes:
    """The list of members, with its own offset (in the last record of a zip) moved."""
    offset = int.from_bytes(directory[-6:-2], "little") + by
    return directory[:-6] + offset.to_bytes(4, "little") + directory[-2:]


def swap(store: Path, *suffixes: str) -> None:
    for suffix in suffixes:
        first, second, spare = of(store, suffix), of(store, suffix, "other"), store / "spare"
        first.rename(spare)
        second.rename(first)
        spare.rename(second)


def linked(store: Path) -> None:
    """The archive is a link to another, unsigned, one."""
    elsewhere = store.parent / "elsewhere.mar"
    of(store, ".mar").rename(elsewhere)
    repacked("entry.py", b"other")(elsewhere)
    of(store, ".mar").symlink_to(elsewhere)
    sign.write_checksum(of(store, ".mar"))


def signed_by_another(store: Path) -> None:
    sign.sign(of(store, ".mar"), make_key(store.parent / "other.pem", *P256))


def _to_file(suffix: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda store: change(of(store, suffix))


def _of_another(suffix: str) -> Callable[[Path], object]:
    return lambda store: shutil.copy(of(store, suffix, "other"), of(store, suffix))


LINK = zipfile.ZipInfo("link.json")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
PACKED = zipfile.ZipInfo("zeros.json")
PACKED.compress_type = zipfile.ZIP_DEFLATED

TAMPERINGS: dict[str, Callable[[Path], object]] = {
    **{f"a byte of {suffix}": _to_file(suffix, flip) for suffix in SUFFIXES},
    **{f"no {suffix}": _to_file(suffix, Path.unlink) for suffix in SUFFIXES},
    **{f"{suffix} of another model": _of_another(suffix) for suffix in SUFFIXES},
    "a byte and its checksum": with_checksum(flip),
    "a member more": with_checksum(repacked("more.json", b"{}")),
    "code changed": with_checksum(repacked("entry.py", b"import os")),
    "a member less": with_checksum(repacked("config.json", None)),
    "a hidden member": with_checksum(hide),
    "a pickle": with_checksum(repacked("weights.pkl", b"\x80\x04.")),
    "a pickle by another name": with_checksum(repacked("config.json", b"\x80\x04.")),
    "weights of torch.save": with_checksum(repacked("model.safetensors", b"PK\x03\x04")),
    "an archive in the archive": with_checksum(repacked("more.txt", b"PK\x03\x04")),
    "a program": with_checksum(repacked("library.so", b"\x7fELF")),
    "a path that leads out": with_checksum(repacked("../more.py", b"1")),
    "an absolute path": with_checksum(repacked("/etc/more.py", b"1")),
    ".git": with_checksum(repacked(".git/config", b"1")),
    "a link": with_checksum(repacked(LINK, b"/etc/passwd")),
    "a bomb": with_checksum(repacked(PACKED, b"0" * 10_000_000)),
    "something before it": with_checksum(lambda path: path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())),
    "cut off": with_checksum(lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "empty": with_checksum(lambda path: path.write_bytes(b"")),
    "a signature cut off": lambda store: of(store, ".sig").write_bytes(of(store, ".sig").read_bytes()[:100]),
    "an empty signature": lambda store: of(store, ".sig").write_bytes(b""),
    "a manifest of another version": lambda store: with_manifest(of(store, ".mar"), version="9.0"),
    "another model under this name": lambda store: swap(store, ".mar", ".mar.sha256"),
    "another model, whole": lambda store: swap(store, *SUFFIXES),
    "a link to another archive": linked,
    "another key": signed_by_another,
}


def tampering(bench: Bench) -> tuple[list[Target], Any]:
    """Row 12: each tampering, in a store and a server's folder of its own."""
    chosen = dict(list(TAMPERINGS.items())[:: bench.times(1, 8)])
    outcomes = {name: _serve(bench, change) for name, change in chosen.items()}
    # That code which may run is seen to run shows that the mark works.
    untouched = _serve(bench, lambda store: None)
    served = [name for name, outcome in outcomes.items() if not outcome["refused"]]
    ran = [name for name, outcome in outcomes.items() if outcome["ran"]]
    return [
        Target("12a", f"tamperings not refused, of {len(outcomes)}", len(served), "0", not served),
        Target("12b", "of them, code that ran", len(ran), "0; without tampering it runs", not ran and untouched["ran"]),
    ], {**outcomes, "none": untouched}


def _serve(bench: Bench, change: Callable[[Path], object]) -> dict[str, Any]:
    """Signs two archives, changes them, and has scripts/serve --front --trust serve the first."""
    folder = bench.work / "sites" / "tampering"
    shutil.rmtree(folder, ignore_errors=True)
    store = folder / "store"
    store.mkdir(parents=True)
    key = make_key(folder / "key.pem", *P256)
    for name in ("small", "other"):
        make(store, name, key)
    change(store)
    site = Site(folder, store, ["small"], {})
    config = ("--config", "config.properties", "--front", "front.properties", "--models", "small=small.mar")
    done = site.command("serve", "--store", store, *config, "--trust", key.with_suffix(".pub"), "--timeout", 60)
    said = done.stderr.strip().splitlines()[-1:]
    # What these archives hold cannot be loaded; but whether they are refused is said by the program that verifies them.
    refused = done.returncode == 1 and not (folder / "logs" / "ts_log.log").exists()
    return {"refused": refused, "ran": (store / "it-ran").exists(), "said": said}
