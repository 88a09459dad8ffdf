"""scripts/serve --trust: nothing is served that the key has not signed as it is, and none of it runs before."""

import json
import shutil
import stat
import sys
from pathlib import Path

import psutil
import pytest
from conftest import run, serve, stop, succeeded, write_config

from archiver import sign
from benchmarks.fault_injection.tampering import P256, SUFFIXES, TAMPERINGS, flip, make, make_key, of
from server import trust
from server.archive import Archive, ArchiveError, verify
from server.torchserve import STORE, Server


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
