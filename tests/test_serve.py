"""scripts/serve: what may not be served is named before or while it starts, and nothing is left behind."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests
from conftest import OFFLINE, ROOT, run, serve, stop, succeeded, write_config


def checksum(archive: Path) -> None:
    """Writes the .sha256 that belongs to an archive."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    archive.with_name(archive.name + ".sha256").write_text(f"{digest}  {archive.name}\n")


def repack(source: Path, target: Path, *, digests: bool = True, **changes: Callable[[bytes], bytes]) -> None:
    """Copies an archive with some members changed; with `digests` its list of digests is made to fit."""
    with zipfile.ZipFile(source) as old:
        members = {name: old.read(name) for name in old.namelist()}
    for name, change in changes.items():
        members[name] = change(members[name])
    if digests:
        listing = {n: hashlib.sha256(m).hexdigest() for n, m in sorted(members.items()) if n != "digests.json"}
        members["digests.json"] = json.dumps(listing).encode()
    with zipfile.ZipFile(target, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    checksum(target)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty working directory with a store in it; whatever was started there must have ended by itself."""
    (tmp_path / "store").mkdir()
    yield tmp_path
    left = [p for p in psutil.process_iter(["cmdline"]) if any(str(tmp_path) in a for a in p.info["cmdline"] or [])]
    stop(tmp_path)
    assert not left


def refused(folder: Path, *options: object, config: Path | None = None) -> str:
    """What scripts/serve says when it must not start; its ports are free afterwards."""
    path, ports = (config, []) if config else write_config(folder)
    done = serve(folder, folder / "store", path, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("scripts/serve: ")
    assert "Traceback" not in done.stderr.splitlines()[0]
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()
    return done.stderr


def test_an_empty_store(folder: Path) -> None:
    assert "there is no archive in" in refused(folder)


def test_a_missing_archive(folder: Path) -> None:
    assert "there is no such archive; build it" in refused(folder, "--models", "nobody=nobody.mar")


def test_an_archive_without_checksum(folder: Path, store: Path) -> None:
    (folder / "store" / "reviews.mar").write_bytes((store / "reviews.mar").read_bytes())
    assert "reviews.mar.sha256 is missing" in refused(folder)


def test_a_truncated_archive(folder: Path, store: Path) -> None:
    content = (store / "reviews.mar").read_bytes()
    (folder / "store" / "reviews.mar").write_bytes(content[: len(content) // 2])
    (folder / "store" / "reviews.mar.sha256").write_bytes((store / "reviews.mar.sha256").read_bytes())
    assert "incomplete or was changed" in refused(folder)


def test_a_truncated_archive_with_its_own_checksum(folder: Path, store: Path) -> None:
    archive = folder / "store" / "reviews.mar"
    archive.write_bytes((store / "reviews.mar").read_bytes()[:-1000])
    checksum(archive)
    assert "not a model archive" in refused(folder)


def test_a_zip_that_is_no_marble_archive(folder: Path) -> None:
    archive = folder / "store" / "other.mar"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", "{}")
    checksum(archive)
    assert "has no golden.jsonl, model-config.yaml" in refused(folder)


@pytest.mark.parametrize("entry", ["x=../x.mar", "/etc/passwd", "x=a/b.mar"])
def test_a_path_out_of_the_store(folder: Path, entry: str) -> None:
    assert "without its folder" in refused(folder, "--models", entry)


def test_a_missing_config(folder: Path) -> None:
    assert "there is no such file" in refused(folder, config=folder / "nothing.properties")


def test_a_busy_port_is_named(folder: Path, store: Path) -> None:
    config, ports = write_config(folder)
    with socket.create_server(("127.0.0.1", ports[3])):
        done = serve(folder, store, config)
    assert done.returncode == 1
    assert f"port {ports[3]} on 127.0.0.1 is not free" in done.stderr


def test_a_handler_that_fails_to_import_shows_its_traceback(folder: Path, store: Path) -> None:
    repack(
        store / "reviews-fp32.mar",
        folder / "store" / "broken.mar",
        **{"handler/engine.py": lambda code: b"import a_module_nobody_has\n" + code},
    )
    said = refused(folder)
    assert "model 'broken' did not load: ModuleNotFoundError: No module named 'a_module_nobody_has'" in said
    assert 'handler/engine.py", line 1' in said


def test_a_golden_set_that_is_not_kept_is_named(folder: Path, store: Path) -> None:
    def other(content: bytes) -> bytes:
        first, rest = content.split(b"\n", 1)
        example = json.loads(first)
        example["predictions"][0]["score"] += 0.25
        return json.dumps(example).encode() + b"\n" + rest

    repack(store / "reviews-fp32.mar", folder / "store" / "drifts.mar", **{"golden.jsonl": other})
    said = refused(folder)
    assert "golden example 1 of" in said
    assert "drifts by 0.25" in said


def test_a_member_changed_after_packing_is_named(folder: Path, store: Path) -> None:
    repack(
        store / "reviews-fp32.mar",
        folder / "store" / "changed.mar",
        digests=False,
        **{"config.json": lambda content: content.replace(b'"hidden', b' "hidden', 1)},
    )
    assert "config.json does not have the digest in digests.json" in refused(folder)


def test_without_tokens_and_a_second_start(folder: Path, store: Path) -> None:
    config, ports = write_config(folder)
    models = ("--models", "reviews-fp32")
    out = succeeded(serve(folder, store, config, "--no-auth", *models))
    assert "ready in" in out
    answer = requests.post(f"http://127.0.0.1:{ports[0]}/predictions/reviews-fp32", json={"inputs": "a"}, timeout=30)
    assert answer.status_code == 200
    second = serve(folder, store, config, *models)
    assert second.returncode == 1
    assert "is running already" in second.stderr
    assert "stop it with scripts/stop" in second.stderr
    assert "stopped process" in succeeded(stop(folder))
    assert "no server of this folder is running" in succeeded(stop(folder))
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_foreground_ends_cleanly_on_sigterm(folder: Path, store: Path) -> None:
    config, _ = write_config(folder)
    command = [sys.executable, "-m", "server", "serve", "--store", str(store), "--config", str(config)]
    with subprocess.Popen(
        [*command, "--foreground", "--models", "reviews-fp32"],
        cwd=folder,
        env=OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "ready in" in process.stdout.readline()
        server = psutil.Process(json.loads((folder / "run" / "server.json").read_text())["pid"])
        family = [server, *server.children(recursive=True)]
        assert len(family) >= 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not (folder / "run" / "server.json").exists()
    assert not (folder / "key_file.json").exists()


def test_foreground_notices_that_the_server_died(folder: Path, store: Path) -> None:
    config, _ = write_config(folder)
    command = [sys.executable, "-m", "server", "serve", "--store", str(store), "--config", str(config)]
    with subprocess.Popen(
        [*command, "--foreground", "--models", "reviews-fp32"],
        cwd=folder,
        env=OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "ready in" in process.stdout.readline()
        os.kill(json.loads((folder / "run" / "server.json").read_text())["pid"], signal.SIGKILL)
        assert process.wait(timeout=60) == 1
        assert "ended by itself" in process.stdout.read()


def test_the_scripts_themselves(tmp_path: Path) -> None:
    for script in ("serve", "stop", "demo", "setup", "test", "check", "lock"):
        succeeded(run("sh", "-n", ROOT / "scripts" / script))
    help_text = succeeded(run(ROOT / "scripts" / "serve", "--help"))
    assert "--models" in help_text
    assert run(ROOT / "scripts" / "demo", "--nonsense").returncode == 2
    assert run(ROOT / "build_mar.sh", "--bundle", tmp_path / "nothing").returncode == 1
