"""The container's entry point, end to end and without a container engine: in namespaces of its own.

There the root is read-only, the user is 10001 without any capability, and what a container mounts is mounted.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
from conftest import ROOT, build_here, free_ports, succeeded, write_config, write_settings
from test_front import MODEL, Door, listens, token_command
from test_provenance import P256, flip, make_key

from archiver import sign
from server import tokens
from server.front import Certificate

CONTAINER = ROOT / "deploy" / "container"
ENTRYPOINT = "/mnt/marble/deploy/container/entrypoint"
UID = 10001


def copied() -> set[str]:
    """What the container's file copies into the image, relative to the project."""
    text = (CONTAINER / "Containerfile").read_text()
    return {name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for name in line.split()[:-1]}


def in_container(folder: Path, *arguments: object) -> list[str]:
    """The command that runs the entry point, in a tree as the container's, with the folders of `folder` below /mnt.

    Every step replaces the one before (exec), so that a signal to the process reaches the entry point.
    """
    venv = (ROOT / ".venv").resolve()
    steps = ["set -e", "mount -t tmpfs none /mnt"]
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        steps += [f"mkdir /mnt/{path.name}", f"mount --bind {shlex.quote(str(path))} /mnt/{path.name}"]
    steps += ["mkdir /mnt/marble /mnt/marble/.venv", f"mount --bind {shlex.quote(str(venv))} /mnt/marble/.venv"]
    for name in sorted(copied()):
        # Not bound, but copied: the project itself is hidden after that, lest anything be taken from it.
        steps += [
            f"mkdir -p /mnt/marble/{Path(name).parent}",
            f"cp -r {shlex.quote(str(ROOT / name))} /mnt/marble/{name}",
        ]
    steps += [
        "cd /",
        *(f"mount -t tmpfs none {shlex.quote(str(path))}" for path in sorted({ROOT, venv.parent})),
        "mount -t tmpfs none /tmp",
        "mount -o bind,remount,ro /",
        "mount -o remount,ro /mnt",
        f"exec unshare --user --map-user={UID} --map-group={UID} setpriv --no-new-privs "
        + shlex.join([ENTRYPOINT, *map(str, arguments)]),
    ]
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "\n".join(steps)]


def run_in_container(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        in_container(folder, *arguments),
        env={**os.environ, "MARBLE_STATE": "/mnt/state"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def mount_secret(folder: Path, files: Sequence[Path]) -> None:
    """Files as Kubernetes mounts them, and replaces them: links through a link that is given another target."""
    version = folder / f"..{time.monotonic_ns()}"
    version.mkdir(parents=True)
    for file in files:
        shutil.copy(file, version / file.name)
        if not (folder / file.name).is_symlink():
            (folder / file.name).symlink_to(f"..data/{file.name}")
    old = os.readlink(folder / "..data") if (folder / "..data").is_symlink() else None
    (folder / "..data_new").symlink_to(version.name)
    (folder / "..data_new").replace(folder / "..data")
    if old:
        shutil.rmtree(folder / old)


def new_certificate(folder: Path) -> list[Path]:
    """tls.crt and tls.key in `folder`, self-signed."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pair = Certificate.self_signed()
    return [pair.certificate.rename(folder / "tls.crt"), pair.key.rename(folder / "tls.key")]


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    tried = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        words = f"no user namespaces here: {tried.stderr.strip()}"
        pytest.fail(words) if os.environ.get("CI") == "true" else pytest.skip(words)


@pytest.fixture(scope="module")
def volumes(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pod would mount: signed archives, the key, tokens, certificate, settings, and places to write."""
    folder = tmp_path_factory.mktemp("pod")
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundle") / MODEL))
    build_here(bundle, folder / "models", MODEL, "openvino")
    key = make_key(tmp_path_factory.mktemp("key") / "marble.pem", *P256)
    sign.sign(folder / "models" / f"{MODEL}.mar", key)
    for name in ("store", "state/front", "settings"):
        (folder / name).mkdir(parents=True)
    shutil.copy(key.with_suffix(".pub"), folder / "settings" / "marble.pub")
    return folder


@dataclass(frozen=True)
class Pod(Door):
    """A running entry point, which is a front door."""

    process: "subprocess.Popen[str]"
    volumes: Path

    @property
    def certificate(self) -> Path:
        return self.volumes / "tls" / "tls.crt"


@pytest.fixture(scope="module")
def pod(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    _, inner = write_config(volumes / "settings")
    rest, grpc_port = free_ports(2)
    write_settings(
        volumes / "settings" / "front.properties",
        rest=f"127.0.0.1:{rest}",
        grpc=f"127.0.0.1:{grpc_port}",
        canary_every_seconds=0.5,
        canary_within_seconds=2,
    )
    made = tmp_path_factory.mktemp("secret")
    names = {
        name: succeeded(token_command(made, "add", name, "--role", role)).strip()
        for name, role in (("predict", "predict"), ("watch", "admin"))
    }
    mount_secret(volumes / "state" / "front", [made / tokens.FILE])
    mount_secret(volumes / "tls", new_certificate(made / "first"))

    trusted = ("--trust", "/mnt/settings/marble.pub", "--config", "/mnt/settings/config.properties")
    filled = run_in_container(volumes, "verify", "--store", "/mnt/models", "--into", "/mnt/store", *trusted)
    assert succeeded(filled) == f"verified, signed by /mnt/settings/marble.pub: {MODEL}\n"
    command = in_container(
        volumes,
        *("--store", "/mnt/store", *trusted, "--front", "/mnt/settings/front.properties"),
        *("--cert", "/mnt/tls/tls.crt", "--key", "/mnt/tls/tls.key"),
    )
    log = tmp_path_factory.mktemp("log") / "container.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, "MARBLE_STATE": "/mnt/state"}, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    pod = Pod(volumes / "state", rest, grpc_port, inner, names, process, volumes)
    try:
        deadline = time.monotonic() + 120
        while not listens(rest):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield pod
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def test_it_serves_with_no_rights_and_writes_nowhere_else(pod: Pod) -> None:
    assert pod.ready()
    answer = pod.predict()
    assert (answer.status_code, "positive" in answer.text) == (200, True), answer.text
    family = [psutil.Process(pod.process.pid)]
    family += family[0].children(recursive=True)
    family += [psutil.Process(pod.state()["pid"])]  # type: ignore[arg-type]
    family += family[-1].children(recursive=True)
    names = {process.name() for process in family}
    assert {"nginx", "java"} <= names
    for process in family:
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"(?m)^CapEff:\t0+$", status), process
        assert re.search(r"(?m)^NoNewPrivs:\t1$", status), process
        assert Path(f"/proc/{process.pid}/uid_map").read_text().split()[0] == str(UID), process
    roots = [line.split() for line in Path(f"/proc/{pod.process.pid}/mounts").read_text().splitlines()]
    assert {place: options.split(",")[0] for _, place, _, options, *_ in roots if place in ("/", "/mnt")} == {
        "/": "ro",
        "/mnt": "ro",
    }
    assert {entry.name for entry in (pod.volumes / "state").iterdir()} <= {"front", "key_file.json", "logs", "run"}


def test_replaced_secrets_count_by_themselves(pod: Pod, tmp_path: Path) -> None:
    """As Kubernetes replaces them, some time after the object was changed; nobody sends a signal."""
    shutil.copytree(pod.volumes / "state" / "front", tmp_path / "front", symlinks=False)
    added = succeeded(token_command(tmp_path, "add", "late", "--role", "predict")).strip()
    assert pod.predict(added).status_code == 401
    mount_secret(pod.volumes / "state" / "front", [tmp_path / tokens.FILE])
    pod.wait_until(lambda: pod.predict(added).status_code == 200)

    old = tmp_path / "old.crt"
    shutil.copy(pod.certificate, old)
    # A key that does not fit is not taken, and harms nothing.
    renewed = new_certificate(tmp_path / "renewed")
    mount_secret(pod.volumes / "tls", [old.rename(tmp_path / "tls.crt"), renewed[1]])
    log = pod.volumes / "state" / "logs" / "watchdog.log"
    pod.wait_until(lambda: "are no pair of PEM certificate" in log.read_text())
    assert pod.predict().ok
    mount_secret(pod.volumes / "tls", renewed)

    def is_new() -> bool:
        try:
            return pod.predict().ok
        except requests.exceptions.SSLError:
            return False

    pod.wait_until(is_new)


def test_a_term_answers_what_came_in_and_ends_with_0(pod: Pod) -> None:
    with ThreadPoolExecutor(1) as pool:
        with pod.stopped_worker():
            waiting = pool.submit(pod.predict)
            time.sleep(1)
            assert not waiting.done()
            pod.process.send_signal(signal.SIGTERM)
            pod.wait_until(lambda: not listens(pod.rest))
            began = time.monotonic()
        assert waiting.result().status_code == 200
    assert pod.process.wait(60) == 0
    assert time.monotonic() - began < 30
    assert not any(map(listens, (pod.rest, pod.grpc, *pod.inner)))
    assert not (pod.folder / "run" / "server.json").exists()


@pytest.mark.parametrize("spoilt", [f"{MODEL}.mar", f"{MODEL}.sig", f"{MODEL}.cdx.json"])
def test_an_archive_that_is_not_as_signed_fills_nothing(volumes: Path, tmp_path: Path, spoilt: str) -> None:
    """The init container's part: the server's container would not start."""
    folder = Path(shutil.copytree(volumes, tmp_path / "pod", symlinks=True, ignore=lambda *_: {"state", "tls"}))
    (folder / "state").mkdir()
    flip(folder / "models" / spoilt)
    done = run_in_container(
        folder, "verify", "--store", "/mnt/models", "--into", "/mnt/store", "--trust", "/mnt/settings/marble.pub"
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("scripts/verify: /mnt/store/small.mar: ")
    assert list((folder / "store").iterdir()) == []


def test_the_containers_file_copies_what_there_is() -> None:
    """And is given no more: what it copies is what the list of ignored files lets through."""
    assert [name for name in copied() if not (ROOT / name).exists()] == []
    lines = (CONTAINER / "ignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied()
    assert lines[1] == "*"
    assert f"USER {UID}:{UID}" in (CONTAINER / "Containerfile").read_text()
