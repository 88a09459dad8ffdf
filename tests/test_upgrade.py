"""scripts/upgrade and scripts/rollback: another version in a running server, and no request that fails meanwhile."""

import concurrent.futures
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import build_here, free_ports, run, serve, stop, succeeded, write_config, write_settings
from test_front import BODY, MODEL, PREDICTIONS, V2, Door, grpc_messages, token_command

from archiver import sign
from archiver.__main__ import main as build_main
from handler import digests


@pytest.fixture(scope="module")
def store(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small` in version 1.0, `small-2` in 2.0, `small-4` in 4.0; `wrong`, 3.0, has the golden set of another model."""
    place = tmp_path_factory.mktemp("upgrade_store")
    bundle = Path(shutil.copytree(tiny_bundle, place / MODEL))
    build_here(bundle, place / "store", MODEL, "openvino")
    for name, version in (("small-2", "2.0"), ("wrong", "3.0"), ("small-4", "4.0")):
        options = ("--name", name, "--version", version, "--backend", "openvino", "--precision", "fp32")
        with contextlib.redirect_stdout(io.StringIO()):
            build_main(["--bundle", str(bundle), "--store", str(place / "store"), *options])
    spoil(place / "store" / "wrong.mar", place)
    return place / "store"


def spoil(archive: Path, folder: Path) -> None:
    """Exchanges the two labels in the golden set."""
    with zipfile.ZipFile(archive) as file:
        members = {entry.filename: file.read(entry) for entry in file.infolist()}
    text = members["golden.jsonl"].decode()
    assert "positive" in text
    text = text.replace("positive", "-").replace("negative", "positive").replace("-", "negative")
    members["golden.jsonl"] = text.encode()
    (folder / "golden.jsonl").write_text(text)
    listed = json.loads(members[digests.FILE_NAME])
    listed["golden.jsonl"] = digests.sha256(folder / "golden.jsonl")
    members[digests.FILE_NAME] = json.dumps(listed).encode()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    sign.write_checksum(archive)


@pytest.fixture(scope="module")
def door(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("upgrade")
    config, inner = write_config(folder)
    rest, grpc_port = free_ports(2)
    addresses = {"rest": f"127.0.0.1:{rest}", "grpc": f"127.0.0.1:{grpc_port}"}
    settings = write_settings(folder / "f.properties", **addresses, canary_every_seconds=0.5)
    made = {
        role: succeeded(token_command(folder, "add", role, "--role", role)).strip() for role in ("predict", "admin")
    }
    made["watch"] = made["admin"]
    try:
        succeeded(serve(folder, store, config, "--front", settings, "--models", f"{MODEL}={MODEL}.mar"))
        yield Door(folder, rest, grpc_port, inner, made)
    finally:
        stop(folder)


def command(door: Door, store: Path, name: str, *arguments: object) -> str:
    """What scripts/upgrade or scripts/rollback prints; it must succeed."""
    return succeeded(_command(door.folder, store, name, *arguments))


def refused(folder: Path, store: Path, name: str, *arguments: object) -> str:
    """What it says when it refuses."""
    done = _command(folder, store, name, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"scripts/{name}: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def _command(folder: Path, store: Path, name: str, *arguments: object):  # type: ignore[no-untyped-def]
    given = ("--store", store) if name == "upgrade" else ()
    return run(sys.executable, "-m", "server", name, *arguments, *given, cwd=folder)


def versions(door: Door, path: str = f"/predictions/{MODEL}", body: object = BODY, times: int = 1) -> Counter[str]:
    """Which versions answer, how often."""
    answers = [door.ask("POST", path, door.tokens["predict"], json=body) for _ in range(times)]
    assert {answer.status_code for answer in answers} == {200}
    return Counter(answer.headers["x-model-version"] for answer in answers)


def test_up_and_back_with_requests_under_way(door: Door, store: Path) -> None:
    over = threading.Event()

    def ask_on(grpc: bool) -> list[object]:
        statuses: list[object] = []
        while not over.is_set():
            if grpc:
                message = grpc_messages()[PREDICTIONS]
                statuses.append(door.call(PREDICTIONS, message, door.tokens["predict"])[0].name)
            else:
                statuses.append(door.predict().status_code)
        return statuses

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_on, grpc) for grpc in (False, False, True)]
        try:
            said = command(door, store, "upgrade", f"{MODEL}=small-2.mar")
            assert said == f"{MODEL}: version 2.0 is served; scripts/rollback {MODEL} goes back to 1.0\n"
            assert versions(door) == {"2.0": 1}
            assert versions(door, f"/v2/models/{MODEL}/infer", V2) == {"2.0": 1}
            said = command(door, store, "rollback", MODEL)
            assert said == f"{MODEL}: version 1.0 is served again; 2.0 is one scripts/rollback {MODEL} away\n"
            assert versions(door) == {"1.0": 1}
            command(door, store, "rollback", MODEL)
            assert versions(door) == {"2.0": 1}
            command(door, store, "rollback", MODEL)
        finally:
            over.set()
        statuses = Counter(status for entry in asking for status in entry.result())
    assert statuses.keys() == {200, "OK"}
    assert min(statuses.values()) > 10


def test_a_share_of_the_requests(door: Door, store: Path) -> None:
    said = command(door, store, "upgrade", f"{MODEL}=small-2.mar", "--share", 50)
    assert said == f"{MODEL}: 50 % of the requests go to version 2.0, the others to 1.0\n"
    v1 = (f"/v1/models/{MODEL}:predict", {"instances": ["good"]})
    v2 = (f"/v2/models/{MODEL}/infer", V2)
    for path, body in ((f"/predictions/{MODEL}", BODY), v1, v2):
        # That one of them answers no request is as likely as 40 throws of a coin that all fall alike.
        assert versions(door, path, body, 40).keys() == {"1.0", "2.0"}
    for version in ("1.0", "2.0"):
        assert versions(door, f"/predictions/{MODEL}/{version}", times=8) == {version: 8}
    plain = door.ask("POST", *v1[:1], door.tokens["predict"], json=v1[1]).json()
    assert plain.keys() == {"predictions"}
    assert "is on trial: end that first" in refused(door.folder, store, "upgrade", f"{MODEL}=wrong.mar")
    command(door, store, "upgrade", MODEL, "--share", 1)
    said = command(door, store, "rollback", MODEL)
    assert said == f"{MODEL}: the trial of version 2.0 is over; 1.0 is served\n"
    assert versions(door, times=20) == {"1.0": 20}
    command(door, store, "upgrade", f"{MODEL}=small-2.mar", "--share", 20)
    command(door, store, "upgrade", MODEL, "--share", 100)
    assert versions(door, times=20) == {"2.0": 20}
    # A trial that was ended leaves the way back as it was.
    command(door, store, "upgrade", f"{MODEL}=small-4.mar", "--share", 20)
    command(door, store, "rollback", MODEL)
    assert versions(door, times=20) == {"2.0": 20}
    command(door, store, "rollback", MODEL)
    assert versions(door) == {"1.0": 1}


def test_a_version_that_answers_wrongly_is_not_served(door: Door, store: Path) -> None:
    assert "version 3.0 of 'small'" in refused(door.folder, store, "upgrade", f"{MODEL}=wrong.mar")
    assert versions(door, times=3) == {"1.0": 3}
    assert door.ask("POST", f"/predictions/{MODEL}/3.0", door.tokens["predict"], json=BODY).status_code == 404


def test_a_server_that_is_started_anew_has_the_new_version_and_no_trial(door: Door, store: Path) -> None:
    command(door, store, "upgrade", f"{MODEL}=small-2.mar")
    assert "is version 2.0, and so is what is served" in refused(door.folder, store, "upgrade", f"{MODEL}=small-2.mar")
    command(door, store, "upgrade", f"{MODEL}={MODEL}.mar", "--share", 50)
    os.kill(int(str(door.state()["pid"])), signal.SIGKILL)
    door.wait_until(lambda: not door.ready())
    door.wait_until(door.ready)
    assert versions(door, times=20) == {"2.0": 20}
    assert not (door.folder / "run" / "trial.json").exists()
    assert "has no version before 2.0 in this server" in refused(door.folder, store, "rollback", MODEL)
    command(door, store, "upgrade", f"{MODEL}={MODEL}.mar")
    assert versions(door) == {"1.0": 1}


def test_mistakes(door: Door, store: Path, tmp_path: Path) -> None:
    assert "'other' is not served here, but small" in refused(door.folder, store, "upgrade", "other=small-2.mar")
    assert "there is no such archive" in refused(door.folder, store, "upgrade", f"{MODEL}=nothing.mar")
    assert "name a file inside the store" in refused(door.folder, store, "upgrade", f"{MODEL}=../small-2.mar")
    assert "no server of this folder is running" in refused(tmp_path, store, "upgrade", f"{MODEL}=small-2.mar")
    assert "no server of this folder is running" in refused(tmp_path, store, "rollback", MODEL)
    done = _command(door.folder, store, "upgrade", f"{MODEL}=small-2.mar", "--share", "0")
    assert done.returncode == 2
    assert "above 0 and up to 100" in done.stderr
    assert versions(door) == {"1.0": 1}
