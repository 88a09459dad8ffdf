"""scripts/serve --trust: nothing is served that the key has not signed as it is, and none of it runs before."""

import json
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import run, serve, stop, succeeded, write_config
from test_provenance import P256, flip, make_key

from archiver import sign
from server import trust
from server.archive import Archive, ArchiveError, verify
from server.torchserve import STORE, Server

MEMBERS = ("MAR-INF/MANIFEST.json", "config.json", "golden.jsonl", "model-config.yaml", "model.safetensors")
SUFFIXES = (".mar", ".mar.sha256", ".cdx.json", ".manifest.json", ".sig")


def make(store: Path, name: str, key: Path, version: str = "1.0", **members: bytes) -> Path:
    """A signed archive whose code leaves a mark where it runs."""
    archive = store / f"{name}.mar"
    contents = dict.fromkeys(MEMBERS, b"{}") | {
        "MAR-INF/MANIFEST.json": json.dumps({"model": {"modelName": name, "modelVersion": version}}).encode(),
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


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The signed archives `small` and `other` in a store, where a server of this folder would take them from."""
    monkeypatch.chdir(tmp_path)
    key = make_key(tmp_path / "key.pem", *P256)
    folder = tmp_path / "store"
    folder.mkdir()
    for name in ("small", "other"):
        make(folder, name, key)
    return folder


def admit(store: Path, key: str = "key.pub", *, allow_downgrade: bool = False, name: str = "small") -> list[Archive]:
    """What scripts/serve does with `small` before it starts anything."""
    archive = verify(name, store / f"{name}.mar")
    return trust.admit([archive], store.parent / key, allow_downgrade=allow_downgrade)


# --- Tamperings


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


LINK = zipfile.ZipInfo("link.json")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
PACKED = zipfile.ZipInfo("zeros.json")
PACKED.compress_type = zipfile.ZIP_DEFLATED

TAMPERINGS: dict[str, Callable[[Path], object]] = {
    **{f"a byte of {suffix}": lambda store, suffix=suffix: flip(of(store, suffix)) for suffix in SUFFIXES},
    **{f"no {suffix}": lambda store, suffix=suffix: of(store, suffix).unlink() for suffix in SUFFIXES},
    **{
        f"{suffix} of another model": lambda store, suffix=suffix: shutil.copy(
            of(store, suffix, "other"), of(store, suffix)
        )
        for suffix in SUFFIXES
    },
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


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_a_tampered_archive_is_refused_before_it_runs(store: Path, tampering: str) -> None:
    TAMPERINGS[tampering](store)
    with pytest.raises(ArchiveError):
        admit(store)
    assert not (store / "it-ran").exists()
    assert not (STORE / "small.mar").exists()


def test_there_are_enough_of_them() -> None:
    assert len(TAMPERINGS) >= 30


# --- What is served


def test_a_private_copy_is_served(store: Path) -> None:
    [archive] = admit(store)
    assert (archive.name, archive.path) == ("small", STORE / "small.mar")
    assert archive.path.read_bytes() == of(store, ".mar").read_bytes()
    assert not archive.path.samefile(of(store, ".mar"))
    assert stat.S_IMODE(STORE.stat().st_mode) == 0o700
    assert stat.S_IMODE(archive.path.stat().st_mode) == 0o400
    flip(of(store, ".mar"))
    assert [entry.name for entry in admit(store, name="other")] == ["other"]
    assert not (STORE / "small.mar").exists()


def test_an_older_version_is_refused(store: Path) -> None:
    key = store.parent / "key.pem"
    for version, newer in (("1.10", True), ("1.9", False), ("1.10.0", True), ("2.0", True), ("1.10", False)):
        make(store, "small", key, version)
        if newer:
            trust.remember(admit(store))
        else:
            with pytest.raises(ArchiveError, match=f"version {version} of 'small' is older than .*--allow-downgrade"):
                admit(store)
    trust.remember(admit(store, allow_downgrade=True))
    assert json.loads(trust.VERSIONS.read_text()) == {"small": "1.10"}
    assert admit(store, name="other")
    trust.VERSIONS.write_text("{")
    with pytest.raises(ArchiveError, match="is damaged"):
        admit(store)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ed25519", "not an elliptic"),
        ("private", "a private key"),
        ("text", "no public key"),
        ("none", "cannot be read"),
    ],
)
def test_wrong_keys(store: Path, kind: str, words: str) -> None:
    match kind:
        case "ed25519":
            make_key(store.parent / "wrong.pem", "ed25519")
        case "private":
            shutil.copy(store.parent / "key.pem", store.parent / "wrong.pub")
        case "text":
            (store.parent / "wrong.pub").write_text("hello")
    with pytest.raises(ArchiveError, match=words):
        admit(store, "wrong.pub")


def test_a_server_that_trusts_a_key(tiny_bundle: Path, tmp_path: Path) -> None:
    """build_mar.sh --sign, scripts/serve --trust, by option and by setting; then a change of the archive."""
    key = make_key(tmp_path / "key.pem", *P256)
    build = ("./build_mar.sh", "--bundle", tiny_bundle, "--name", "small", "--store", tmp_path / "store")
    succeeded(run(*build, "--backend", "openvino", "--precision", "fp32", "--version", "1.1", "--sign", key))
    config, _ = write_config(tmp_path, marble_trust=tmp_path / "key.pub")
    try:
        assert "ready in" in succeeded(serve(tmp_path, tmp_path / "store", config))
        found = json.loads((tmp_path / "run" / "versions.json").read_text())
        assert found == {"small": "1.1"}
        running = json.loads((tmp_path / "run" / "server.json").read_text())
        assert "small" in running["models"]
        assert "run/store" in " ".join(psutil.Process(running["pid"]).cmdline())
    finally:
        stop(tmp_path)
    flip(tmp_path / "store" / "small.mar")
    sign.write_checksum(tmp_path / "store" / "small.mar")
    config, _ = write_config(tmp_path)
    refused = serve(tmp_path, tmp_path / "store", config, "--trust", tmp_path / "key.pub")
    assert refused.returncode == 1
    assert "scripts/serve: " in refused.stderr
    assert Server.running() is None


def test_verifying_leaves_a_running_servers_store_alone(store: Path) -> None:
    """scripts/verify may be run beside a server; what it filled holds what was verified, and nothing else."""
    admitted = admit(store)
    into = store.parent / "into"
    verifying = ("verify", "--store", store, "--trust", store.parent / "key.pub", "--into", into)
    command = (sys.executable, "-m", "server", *verifying)
    assert succeeded(run(*command, cwd=store.parent)).startswith("verified, signed by ")
    assert {path.name for path in into.iterdir()} == {f"{name}{end}" for name in ("small", "other") for end in SUFFIXES}
    of(store, ".mar", "other").write_bytes(of(store, ".mar").read_bytes())
    done = run(*command, cwd=store.parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert "other.mar: its SHA-256 is not the one" in done.stderr
    assert list(into.iterdir()) == []
    assert admitted[0].path.is_file()
    assert not (store / "it-ran").exists()
