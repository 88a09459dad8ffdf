"""A new version of a model in a running server, and the way back, without a request that fails.

TorchServe holds both versions: the new one is loaded beside the old, answers its canary, and becomes the default. The
old one ends what it has been asked and gives up its workers; it stays registered, so that the way back is short.
"""

import argparse
import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from archiver import pack
from marble_client import MarbleError
from server import front, options, trust
from server.archive import Archive, verify
from server.tokens import write_private
from server.torchserve import STORE, TRIAL, Server, ServerError

_SECONDS_TO_LOAD = 120
_SECONDS_TO_ANSWER = 60
# A worker that spends less of this time on a CPU has no request under way.
_IDLE_SECONDS, _IDLE_SHARE = 1.0, 0.02


@dataclass(frozen=True, slots=True)
class Trial:
    """A version that gets a share (percent) of the requests for its model."""

    model: str
    version: str
    share: float

    @classmethod
    def read(cls) -> "Trial | None":
        """The one that is under way."""
        try:
            return cls(**json.loads(TRIAL.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def begin(self, door: front.State) -> None:
        """Has the front door send the share. Raises ServerError if it does not do as it is told."""
        write_private(TRIAL, json.dumps(asdict(self)) + "\n")
        front.write_share(Path(door.folder), self.model, self.version, self.share)
        front.reload(door.nginx, Path(door.folder))

    def end(self, door: front.State) -> None:
        """Has all requests go to the default version again."""
        front.write_share(Path(door.folder))
        front.reload(door.nginx, Path(door.folder))
        TRIAL.unlink(missing_ok=True)


def upgrade(argv: Sequence[str]) -> None:
    """Serves another version of a model, without a request that fails. Raises ServerError if it cannot."""
    arguments = options.upgrade(argv)
    with _running() as server:
        _upgrade(arguments, server)


def _upgrade(arguments: argparse.Namespace, server: Server) -> None:
    name, file = _named(arguments.model, server)
    door, trial = front.State.read(), Trial.read()
    if arguments.share is not None and (door is None or door.serving() is None):
        raise ServerError("--share needs the front door, which divides the requests: scripts/serve --front")
    if trial is not None and (trial.model != name or file is not None):
        raise ServerError(
            f"version {trial.version} of {trial.model!r} is on trial: end that first, with scripts/upgrade "
            f"{trial.model} --share 100 or scripts/rollback {trial.model}"
        )
    models = Models(server, name)
    if trial is None:
        version = _load(models, arguments.store / (file or f"{name}.mar"), server.trust, arguments.allow_downgrade)
    else:
        version = trial.version
    share = 100.0 if arguments.share is None else arguments.share
    if share < 100:
        assert door is not None
        Trial(name, version, share).begin(door)
        print(f"{name}: {share:g} % of the requests go to version {version}, the others to {models.default()}")
        return
    old = models.default()
    before = [other for other in models.versions() if other not in (old, version)]
    models.make_default(version)
    if trial is not None and door is not None:
        trial.end(door)
    models.retire(old)
    for other in before:
        models.remove(other)
    _replace(f"{name}.next", name, kept=f"{name}.previous")
    if server.trust is not None:
        trust.remember([Archive(name, STORE / f"{name}.mar")])
    print(f"{name}: version {version} is served; scripts/rollback {name} goes back to {old}")


def rollback(argv: Sequence[str]) -> None:
    """Ends a trial, or serves the version before again. Raises ServerError if there is none."""
    name = options.rollback(argv).model
    with _running() as server:
        _rollback(name, server)


def _rollback(name: str, server: Server) -> None:
    _named(name, server)
    models, door, trial = Models(server, name), front.State.read(), Trial.read()
    served = models.default()
    if trial is not None and trial.model == name:
        assert door is not None
        trial.end(door)
        models.retire(trial.version)
        models.remove(trial.version)
        print(f"{name}: the trial of version {trial.version} is over; {served} is served")
        return
    before = [version for version in models.versions() if version != served]
    if not before or not (STORE / f"{name}.previous.mar").exists():
        raise ServerError(
            f"{name!r} has no version before {served} in this server; serve an archive of it: "
            f"scripts/upgrade {name}=FILE.mar"
        )
    [version] = before
    models.wake(version)
    models.make_default(version)
    models.retire(served)
    _replace(f"{name}.previous", name, kept=f"{name}.previous")
    print(f"{name}: version {version} is served again; {served} is one scripts/rollback {name} away")


class Models:
    """The versions of one model in a running TorchServe, by its management API."""

    def __init__(self, server: Server, name: str) -> None:
        self._server = server
        self.name = name

    def default(self) -> str:
        """The version that is served where none is named."""
        [description] = self._call("GET", f"/models/{self.name}")
        return str(description["modelVersion"])

    def versions(self) -> list[str]:
        """All that are registered."""
        return [str(entry["modelVersion"]) for entry in self._call("GET", f"/models/{self.name}/all")]

    def load(self, file: str, version: str) -> None:
        """Registers an archive of the store and waits for its canary. Raises ServerError if it does not answer it."""
        try:
            self._call("POST", "/models", url=file, model_name=self.name, synchronous="true")
        except ServerError:
            with contextlib.suppress(ServerError):
                self.remove(version)
            raise ServerError(
                f"version {version} of {self.name!r} did not load, and is not served; logs/model_log.log has the cause"
            ) from None
        self.prove(version)

    def wake(self, version: str) -> None:
        """Gives a version as many workers as the default one has, and waits for its canary."""
        [description] = self._call("GET", f"/models/{self.name}")
        self._scale(version, max(1, int(description["maxWorkers"])))
        self.prove(version)

    def prove(self, version: str) -> None:
        """Raises ServerError, after the version has been taken away, if it does not answer its canary rightly."""
        deadline = time.monotonic() + _SECONDS_TO_LOAD
        while True:
            try:
                with self._server.client() as client:
                    client.canary(self.name, version=version, timeout=_SECONDS_TO_ANSWER)
                    return
            except MarbleError as error:
                if error.type == "WrongAnswer" or time.monotonic() > deadline:
                    self.remove(version)
                    raise ServerError(
                        f"version {version} of {self.name!r}: {error.message}; it is not served"
                    ) from None
            time.sleep(0.1)

    def make_default(self, version: str) -> None:
        """Requests that come from now on get this version."""
        self._call("PUT", f"/models/{self.name}/{version}/set-default")

    def retire(self, version: str) -> None:
        """Takes the workers of a version that gets no request any more, once they have ended what they were asked."""
        with (
            self._server.client() as client,
            # It may be why another version is wanted.
            contextlib.suppress(MarbleError),
        ):
            # Behind all that waits for a worker.
            client.canary(self.name, version=version, timeout=_SECONDS_TO_ANSWER)
        [description] = self._call("GET", f"/models/{self.name}/{version}")
        processes = [psutil.Process(worker["pid"]) for worker in description["workers"] if worker["pid"] > 0]
        deadline = time.monotonic() + _SECONDS_TO_ANSWER
        while not _are_idle(processes) and time.monotonic() < deadline:
            pass
        self._scale(version, 0)

    def remove(self, version: str) -> None:
        """Unregisters a version, its workers with it."""
        self._call("DELETE", f"/models/{self.name}/{version}")

    def _scale(self, version: str, workers: int) -> None:
        path = f"/models/{self.name}/{version}"
        self._call("PUT", path, min_worker=workers, max_worker=workers, synchronous="true")

    def _call(self, method: str, path: str, **query: str | int) -> Any:
        return self._server.manage(method, path, timeout=_SECONDS_TO_LOAD, **query)


def _load(models: Models, path: Path, trusted: str | None, allow_downgrade: bool) -> str:
    """Has an archive answer its canary beside the version that is served; returns its version."""
    name = models.name
    archive = verify(name, path)
    version = str(pack.manifest(archive.path)["model"]["modelVersion"])
    served = models.default()
    if version == served:
        raise ServerError(
            f"{path} is version {version}, and so is what is served as {name!r}; build it with another --version"
        )
    if trusted is not None:
        trust.admit_next(archive, Path(trusted), allow_downgrade=allow_downgrade)
    else:
        trust.keep(archive, f"{name}.next")
    if version in models.versions():
        # The one before, which is to come again.
        models.remove(version)
        (STORE / f"{name}.previous.mar").unlink(missing_ok=True)
    models.load(f"{name}.next.mar", version)
    return version


def _replace(new: str, name: str, kept: str) -> None:
    """What a TorchServe that is started anew loads: the archive `new` as `name`, and the one before as `kept`."""
    spare = STORE / f"{name}.spare.mar"
    (STORE / f"{name}.mar").rename(spare)
    (STORE / f"{new}.mar").rename(STORE / f"{name}.mar")
    spare.rename(STORE / f"{kept}.mar")


def _are_idle(processes: Sequence[psutil.Process]) -> bool:
    """Whether they have spent next to no time on a CPU for a second; those that have ended have not."""

    def spent() -> list[float]:
        seconds = []
        for process in processes:
            try:
                times = process.cpu_times()
                seconds.append(times.user + times.system)
            except psutil.NoSuchProcess:
                seconds.append(0.0)
        return seconds

    before = spent()
    time.sleep(_IDLE_SECONDS)
    return all(b - a <= _IDLE_SHARE * _IDLE_SECONDS for a, b in zip(before, spent(), strict=True))


@contextlib.contextmanager
def _running() -> Iterator[Server]:
    """The server of this folder, while nobody else changes what it serves. Raises ServerError if there is none."""
    server = Server.running()
    if server is None:
        raise ServerError("no server of this folder is running; start it with scripts/serve")
    if server.keys()[1] is None:
        raise ServerError(
            "this server asks for no keys (--no-auth), so it takes no other version: anybody on this machine could "
            "give it one; stop it and start it with the new archive"
        )
    store = os.open(STORE, os.O_RDONLY)
    try:
        fcntl.flock(store, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield server
    except BlockingIOError:
        raise ServerError("another scripts/upgrade or scripts/rollback is at work; wait until it has ended") from None
    finally:
        os.close(store)


def _named(model: str, server: Server) -> tuple[str, str | None]:
    """NAME or NAME=FILE.mar. Raises ServerError if the server has no such model."""
    name, separator, file = model.partition("=")
    if name not in server.models:
        raise ServerError(f"{name!r} is not served here, but {', '.join(server.models)}; scripts/serve adds models")
    if separator and (Path(file).name != file or not file):
        raise ServerError(f"{model}: name a file inside the store, without its folder")
    return name, file if separator else None
