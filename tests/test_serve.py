"""scripts/serve: what it refuses to serve and why, and that it leaves nothing behind, whichever way it ends."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import conftest
import psutil
import pytest
import requests
from conftest import ROOT, free_ports, run, serve, stop, write_config, write_settings

NAME = "reviews-fp32"


@dataclass(frozen=True)
class Place:
    """A folder to serve from, a store, and a configuration with ports of its own."""

    folder: Path
    store: Path
    config: Path
    ports: list[int]
    temporary: Path

    def processes(self) -> list[psutil.Process]:
        """Everything started from here that still runs: launcher, JVM and workers, wherever they hang."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MARBLE_TEST") == str(self.folder):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                pass
        return found

    def assert_nothing_is_left(self) -> None:
        """No process, no listener, no key, no state and no scratch folder."""
        _, alive = psutil.wait_procs(self.processes(), timeout=10)
        assert alive == []
        for port in self.ports:
            socket.create_server(("127.0.0.1", port)).close()
        assert not (self.folder / "key_file.json").exists()
        assert not (self.folder / "run" / "server.json").exists()
        assert list(self.temporary.glob("marble-*")) == []

    def refuses(self, *options: object, store: Path | None = None) -> str:
        """What scripts/serve says on stderr when it refuses."""
        done = serve(self.folder, store or self.store, self.config, *options)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("scripts/serve: ")
        self.assert_nothing_is_left()
        return done.stderr.removeprefix("scripts/serve: ")

    def refuses_in_a_line(self, *options: object, store: Path | None = None) -> str:
        message = self.refuses(*options, store=store)
        assert message.count("\n") == 1
        return message

    def start(self, *options: object) -> "subprocess.Popen[str]":
        """Starts scripts/serve without waiting for it."""
        options = ("serve", "--store", self.store, "--config", self.config, *options)
        return subprocess.Popen(
            [sys.executable, "-m", "server", *map(str, options)],
            cwd=self.folder,
            env=conftest.OFFLINE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def place(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A folder with an archive in its store. Whatever a failed test has left running is ended."""
    folder = tmp_path / "serve"
    folder.mkdir()
    (tmp_path / "store").mkdir()
    for suffix in (".mar", ".mar.sha256"):
        os.link(store / f"{NAME}{suffix}", tmp_path / "store" / f"{NAME}{suffix}")
    config, ports = write_config(folder)
    # Children inherit both; the first tells them from those of other tests.
    monkeypatch.setitem(conftest.OFFLINE, "MARBLE_TEST", str(folder))
    place = Place(folder, tmp_path / "store", config, ports, tmp_path_factory.mktemp("t"))
    monkeypatch.setitem(conftest.OFFLINE, "TMPDIR", str(place.temporary))
    yield place
    for process in place.processes():
        process.kill()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_checksum(archive: Path) -> None:
    text = f"{digest(archive.read_bytes())}  {archive.name}\n"
    archive.with_name(f"{archive.name}.sha256").unlink(missing_ok=True)
    archive.with_name(f"{archive.name}.sha256").write_text(text)


def rewrite(place: Place, changes: dict[str, Callable[[bytes], bytes]], *, digests: bool = True) -> None:
    """Changes members of the archive and gives it a new checksum; and new digests, as a careful forger would."""
    archive = place.store / f"{NAME}.mar"
    with zipfile.ZipFile(archive) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members |= {name: change(members[name]) for name, change in changes.items()}
    if digests:
        listed = {name: digest(content) for name, content in members.items() if name != "digests.json"}
        members["digests.json"] = json.dumps(listed).encode()
    archive.unlink()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    write_checksum(archive)


# --- Refused before TorchServe starts --------------------------------------------------------------------------------


def test_an_archive_that_is_not_there(place: Place) -> None:
    message = place.refuses_in_a_line("--models", "nothing=nothing.mar")
    assert "nothing.mar: there is no such archive" in message
    assert "./build_mar.sh --bundle artifacts/nothing" in message


@pytest.mark.parametrize("kind", ["empty", "missing"])
def test_a_store_without_archives(place: Place, tmp_path: Path, kind: str) -> None:
    if kind == "empty":
        (tmp_path / kind).mkdir()
    message = place.refuses_in_a_line(store=tmp_path / kind)
    assert "there is no archive in" in message
    assert "./build_mar.sh" in message


def test_a_configuration_that_is_not_there(place: Place) -> None:
    place.config.unlink()
    assert "config.properties: there is no such file" in place.refuses_in_a_line()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["x=../store/reviews-fp32.mar"], "without its folder"),
        (["x=/etc/passwd"], "without its folder"),
        (["../store/reviews-fp32.mar"], "without its folder"),
        ([f"a b={NAME}.mar"], "'a b' is no model name"),
        ([f"={NAME}.mar"], "'' is no model name"),
        ([f"x={NAME}.mar", f"x={NAME}.mar"], "'x' is named twice"),
    ],
)
def test_bad_models(place: Place, options: list[str], words: str) -> None:
    message = place.refuses_in_a_line("--models", *options)
    assert words in message
    assert f"--models {options[-1]}" in message


def test_an_archive_without_its_checksum(place: Place) -> None:
    (place.store / f"{NAME}.mar.sha256").unlink()
    message = place.refuses_in_a_line()
    assert f"{NAME}.mar.sha256 is missing" in message
    assert "copy it beside it" in message


@pytest.mark.parametrize("damage", ["cut off", "one bit", "other checksum", "empty checksum"])
def test_an_archive_that_is_not_what_its_checksum_says(place: Place, damage: str) -> None:
    archive = place.store / f"{NAME}.mar"
    checksum = archive.with_name(f"{archive.name}.sha256")
    content = bytearray(archive.read_bytes())
    match damage:
        case "cut off":
            archive.unlink()
            archive.write_bytes(content[: len(content) // 2])
        case "one bit":
            content[len(content) // 2] ^= 1
            archive.unlink()
            archive.write_bytes(content)
        case _:
            checksum.unlink()
            checksum.write_text("" if damage.startswith("empty") else f"{'0' * 64}  {archive.name}\n")
    message = place.refuses_in_a_line()
    assert f"its SHA-256 is not the one in {NAME}.mar.sha256" in message
    assert "copy or build it again" in message


def test_a_zip_that_is_no_archive_of_ours(place: Place) -> None:
    archive = place.store / "other.mar"
    archive.write_bytes(b"no zip at all")
    write_checksum(archive)
    assert "not a model archive" in place.refuses_in_a_line("--models", "other")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", "{}")
        file.writestr("handler.py", "print('hello')")
    write_checksum(archive)
    message = place.refuses_in_a_line("--models", "other")
    assert "has no golden.jsonl, model-config.yaml; build it with build_mar.sh" in message


@pytest.mark.parametrize("which", range(5), ids=["inference", "management", "metrics", "grpc", "grpc management"])
def test_a_busy_port(place: Place, which: int) -> None:
    with socket.create_server(("127.0.0.1", place.ports[which])):
        done = serve(place.folder, place.store, place.config)
    assert done.returncode == 1
    assert f"port {place.ports[which]} on 127.0.0.1 is not free" in done.stderr
    assert done.stderr.count("\n") == 1
    place.assert_nothing_is_left()


def test_temporary_files_too_far_down_for_sockets(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = place.temporary / ("d" * 70)
    deep.mkdir()
    monkeypatch.setitem(conftest.OFFLINE, "TMPDIR", str(deep))
    message = place.refuses_in_a_line()
    assert message.startswith(f"{deep}, the folder for temporary files, has too long a path for the sockets in it")
    assert "set TMPDIR to a shorter one, e.g. /tmp" in message
    assert list(deep.iterdir()) == []


# --- Refused by the worker, when it loads ----------------------------------------------------------------------------


def test_a_handler_that_fails_to_import(place: Place) -> None:
    """TorchServe alone would say "No module named ts.torch_handler…"."""
    rewrite(place, {"handler/engine.py": lambda source: source + b"\nimport a_package_that_nobody_has\n"})
    message = place.refuses()
    assert message.startswith(f"model '{NAME}' did not load: ModuleNotFoundError: No module named 'a_package_that_")
    assert "Traceback (most recent call last):" in message
    assert re.search(r"handler/engine\.py\", line \d+, in <module>\n +import a_package_that_nobody_has\n", message)


def test_a_golden_set_that_does_not_fit_the_model(place: Place) -> None:
    def lower_the_second(content: bytes) -> bytes:
        rows = [json.loads(line) for line in content.decode().split("\n") if line]
        for entry in rows[1]["predictions"]:
            entry["score"] -= 0.25
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    rewrite(place, {"golden.jsonl": lower_the_second})
    message = place.refuses()
    assert re.match(rf"model '{NAME}' did not load: GoldenMismatch: golden example 2 of \d+ drifts by 0\.25,", message)
    assert "more than the tolerance 0.001 of openvino fp32" in message


@pytest.mark.parametrize("member", ["openvino_model.bin", "handler/tasks/text_classification.py"])
def test_a_member_that_is_not_what_the_digests_say(place: Place, member: str) -> None:
    rewrite(place, {member: lambda content: content + b"\n"}, digests=False)
    message = place.refuses()
    assert message.startswith(f"model '{NAME}' did not load: ValueError: {member} does not have the digest in digests")


def test_a_server_that_is_not_ready_in_time(place: Place) -> None:
    """Nor is anything left then of a server that has ended by itself before."""
    (scratch := place.temporary / "marble-of-another").mkdir()
    write_state(place, str(scratch))
    assert f"'{NAME}' was not ready within 0.1 s" in place.refuses("--timeout", "0.1")


@pytest.mark.parametrize("front", [False, True])
def test_a_torchserve_that_ends_while_it_starts(place: Place, front: bool) -> None:
    text = place.config.read_text()
    place.config.write_text(re.sub(r"(?m)^vmargs=.*", "vmargs=-XX:+NoSuchFlag", text))
    rest, grpc = free_ports(2)
    settings = write_settings(place.folder / "f.properties", rest=f"127.0.0.1:{rest}", grpc=f"127.0.0.1:{grpc}")
    message = place.refuses(*(["--front", settings] if front else []))
    assert "Unrecognized VM option 'NoSuchFlag'" in message
    assert not (place.folder / "run" / "store").exists()


# --- Running and stopping --------------------------------------------------------------------------------------------


def ask(place: Place, **headers: str) -> requests.Response:
    url = f"http://127.0.0.1:{place.ports[0]}/predictions/{NAME}"
    return requests.post(url, json={"inputs": "A fine pair of boots."}, headers=headers, timeout=30)


def write_state(place: Place, scratch: str) -> Path:
    """What a server has written that ended by itself; its process id is given to another process since, to this one."""
    state = {
        "pid": os.getpid(),
        "created": psutil.Process().create_time() - 3600,
        "scratch": scratch,
        "models": {},
        "addresses": dict.fromkeys(["inference", "management", "metrics", "grpc", "grpc_management"], ""),
    }
    path = place.folder / "run" / "server.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(state))
    return path


def test_without_tokens_a_second_start_and_stopping(place: Place) -> None:
    done = serve(place.folder, place.store, place.config, "--no-auth")
    assert done.returncode == 0, done.stderr
    assert re.match(rf"ready in [\d.]+ s: {NAME}\n", done.stdout)
    assert "tokens: none needed" in done.stdout
    assert ask(place).status_code == 200
    # Nobody may give it code: not over its management API, which would ask nobody for a key.
    url = f"http://127.0.0.1:{place.ports[1]}/models?url={NAME}.mar&model_name=other"
    assert requests.post(url, timeout=30).status_code >= 400
    upgraded = run(sys.executable, "-m", "server", "upgrade", NAME, "--store", place.store, cwd=place.folder)
    assert upgraded.returncode == 1
    assert "--no-auth" in upgraded.stderr
    state = json.loads((place.folder / "run" / "server.json").read_text())

    again = serve(place.folder, place.store, place.config)
    assert again.returncode == 1
    assert f"is running already (process {state['pid']}, models {NAME}); stop it with scripts/stop" in again.stderr
    assert again.stderr.count("\n") == 1

    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    other = serve(elsewhere, place.store, place.config)
    assert other.returncode == 1
    assert f"port {place.ports[0]} on 127.0.0.1 is not free" in other.stderr
    assert ask(place).status_code == 200, "it was left alone"

    assert stop(place.folder).stdout == f"stopped process {state['pid']}\n"
    place.assert_nothing_is_left()
    done = stop(place.folder)
    assert (done.returncode, done.stdout) == (0, "no server of this folder is running\n")


def test_foreground_ends_cleanly_when_told_to(place: Place) -> None:
    process = place.start("--foreground")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready in ")
    token = json.loads((place.folder / "key_file.json").read_text())["inference"]["key"]
    assert ask(place).status_code == 400  # TorchServe's answer to a request without a token
    assert ask(place, Authorization=f"Bearer {token}").status_code == 200
    commands = [" ".join(entry.cmdline()) for entry in place.processes()]
    assert len([command for command in commands if "model_service_worker" in command]) == 1
    assert len([command for command in commands if "org.pytorch.serve.ModelServer" in command]) == 1
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    place.assert_nothing_is_left()


def test_foreground_says_when_the_server_dies(place: Place) -> None:
    process = place.start("--foreground")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready in ")
    psutil.Process(json.loads((place.folder / "run" / "server.json").read_text())["pid"]).kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error == "scripts/serve: TorchServe ended by itself; logs/ has the cause\n"
    place.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_is_cut_off_leaves_no_server(place: Place, number: signal.Signals) -> None:
    process = place.start()
    deadline = time.monotonic() + 60
    while not (place.folder / "run" / "server.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == ""
    place.assert_nothing_is_left()


def test_stop_ends_nothing_but_its_own_server(place: Place) -> None:
    """A state file from before a crash."""
    written = write_state(place, "")
    for content in (written.read_text(), "{}", "[]", "not JSON"):
        written.write_text(content)
        done = stop(place.folder)
        assert (done.returncode, done.stdout) == (0, "no server of this folder is running\n")


def test_the_scripts_serve_from_the_checkout(place: Place, tmp_path: Path) -> None:
    """From any folder, scripts/serve and scripts/stop are the programs tested above."""
    script = (ROOT / "scripts" / "serve", "--store", tmp_path / "nothing")
    done = conftest.run(*script, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"scripts/serve: there is no archive in {tmp_path / 'nothing'}/")
    usage = conftest.run(ROOT / "scripts" / "serve", "--help", cwd=tmp_path)
    assert usage.returncode == 0
    assert all(option in usage.stdout for option in ("--models", "--config", "--no-auth", "--foreground"))
