"""The front door: a real nginx before TorchServe, rendered from deploy/nginx/front.conf.j2."""

import contextlib
import datetime
import grp
import json
import os
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

import jinja2
import psutil

from server import tokens
from server.torchserve import (
    LOGS,
    ROOT,
    Addresses,
    ServerError,
    find_process,
    folder_for_sockets,
    read_properties,
    rotate,
)

# Where the front door of a working directory writes itself down.
STATE = Path("run/front.json")
TEMPLATE = ROOT / "deploy" / "nginx" / "front.conf.j2"
_SECONDS_TO_START = 10
_SECONDS_TO_CLOSE = 1.0
_SELF_SIGNED_DAYS = 90
_LOG_BYTES = 20_000_000
_OLD_LOGS = 5


@dataclass(frozen=True, slots=True)
class Settings:
    """front.properties: its file has the meaning and the reason of each."""

    rest: str
    grpc: str
    client_rate: int
    client_burst: int
    client_in_flight: int
    all_in_flight: int
    max_body_bytes: int
    slow_client_seconds: int
    answer_seconds: int
    drain_seconds: int
    connections: int
    processes: int
    streams: int
    canary_every_seconds: float
    canary_within_seconds: float
    silent_seconds: float
    stuck_seconds: float

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """From a file of `key=value`. Raises ServerError, naming the key, for what is missing, unknown or no number."""
        try:
            given = read_properties(path)
        except FileNotFoundError:
            raise ServerError(f"--front {path}: there is no such file") from None
        kinds = {field.name: field.type for field in fields(cls)}
        if wrong := given.keys() ^ kinds.keys():
            raise ServerError(f"{path}: missing or unknown: {', '.join(sorted(wrong))}; front.properties has all keys")
        values: dict[str, str | int | float] = {}
        for name, kind in kinds.items():
            try:
                values[name] = given[name] if kind is str else _positive(int if kind is int else float, given[name])
            except ValueError:
                raise ServerError(f"{path}: {name}={given[name]}: give a number above 0") from None
        for name in ("rest", "grpc"):
            if not re.fullmatch(r"([0-9.]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}", given[name]):
                raise ServerError(f"{path}: {name}={given[name]}: write ADDRESS:PORT, e.g. 0.0.0.0:8443")
        return cls(**values)  # type: ignore[arg-type]  # of the types that its fields have

    def ports(self) -> list[tuple[str, int]]:
        """(host, port) of the IPv4 listeners."""
        pairs = [address.rsplit(":", 1) for address in (self.rest, self.grpc)]
        return [(host, int(port)) for host, port in pairs if not host.startswith("[")]


def _positive(kind: type[int] | type[float], text: str) -> int | float:
    value = kind(text)
    if not value > 0:
        raise ValueError
    return value


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files. The certificate's has the chain, too, the server's own first."""

    certificate: Path
    key: Path

    @classmethod
    def given(cls, certificate: Path, key: Path) -> "Certificate":
        """Raises ServerError if they are missing, no PEM, encrypted, or do not fit each other."""
        for option, path in (("--cert", certificate), ("--key", key)):
            if not path.is_file():
                raise ServerError(f"{option} {path}: there is no such file")
        # Not resolved: Kubernetes renews a mounted pair by giving a link in its path another target.
        pair = cls(certificate.absolute(), key.absolute())
        pair.check()
        return pair

    def check(self) -> None:
        """Raises ServerError if they are no PEM, encrypted, or do not fit each other."""
        try:
            # An empty password: a key that wants one must not make the server stop and ask.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise ServerError(
                f"--cert {self.certificate} and --key {self.key} are no pair of PEM certificate and unencrypted key "
                f"({error})"
            ) from None

    @classmethod
    def self_signed(cls) -> "Certificate":
        """The one in front/, made anew when it is missing or ends within a day. Raises ServerError without openssl."""
        pair = cls((tokens.FOLDER / "self-signed.pem").resolve(), (tokens.FOLDER / "self-signed.key").resolve())
        openssl = _program("openssl", "openssl")
        lasting = [openssl, "x509", "-checkend", "86400", "-noout", "-in", str(pair.certificate)]
        if pair.key.is_file() and subprocess.run(lasting, capture_output=True).returncode == 0:
            return pair
        tokens.FOLDER.mkdir(mode=0o700, exist_ok=True)
        host = socket.gethostname()
        names = f"subjectAltName=DNS:localhost,DNS:{host},IP:127.0.0.1,IP:::1"
        done = subprocess.run(
            [
                *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-days", str(_SELF_SIGNED_DAYS), "-subj", f"/CN={host[:64]}", "-addext", names),
                *("-keyout", str(pair.key), "-out", str(pair.certificate)),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise ServerError(f"openssl could not make a certificate: {done.stderr.strip()}")
        pair.key.chmod(0o600)
        return pair

    def ends(self) -> float:
        """When it ends to be valid, in seconds since 1970."""
        found = subprocess.run(
            [_program("openssl", "openssl"), "x509", "-enddate", "-noout", "-in", str(self.certificate)],
            capture_output=True,
            text=True,
            check=True,
        )
        text = found.stdout.strip().removeprefix("notAfter=")
        return datetime.datetime.strptime(text, "%b %d %H:%M:%S %Y %Z").replace(tzinfo=datetime.UTC).timestamp()


def _program(name: str, package: str) -> str:
    """The path of a program. Raises ServerError, with what to install, if there is none."""
    # Debian has nginx where only root looks.
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ServerError(f"--front needs {name}, and it was not found; on Debian: apt-get install {package}")
    return found


@dataclass(frozen=True, slots=True)
class State:
    """A supervised server, as written down in `run/front.json`. Process ids, each with when the process began."""

    supervisor: int
    supervisor_created: float
    nginx: int
    nginx_created: float
    folder: str

    @classmethod
    def read(cls) -> "State | None":
        """What was written down, None if there is nothing (of use)."""
        try:
            return cls(**json.loads(STATE.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def supervising(self) -> psutil.Process | None:
        """The supervisor, None if it has ended."""
        return find_process(self.supervisor, self.supervisor_created)

    def serving(self) -> psutil.Process | None:
        """The master process of nginx, None if it has ended."""
        return find_process(self.nginx, self.nginx_created)

    def drain(self, seconds: float) -> None:
        """Closes the door: connections end with an answer, then new ones are refused; then nginx ends.

        seconds: after so long it is ended by force.
        """
        process = self.serving()
        if process is not None:
            # What is on its way now still comes in, and load balancers see that the server is not ready any more.
            with contextlib.suppress(FileNotFoundError):
                (Path(self.folder) / "closing").touch()
            time.sleep(_SECONDS_TO_CLOSE)
            process.send_signal(signal.SIGQUIT)
            _, left = psutil.wait_procs([process], timeout=seconds)
            if left:
                _kill_group(self.nginx)
        shutil.rmtree(self.folder, ignore_errors=True)
        STATE.unlink(missing_ok=True)


class Front:
    """nginx, started and told what to do by this process."""

    def __init__(
        self, settings: Settings, certificate: Certificate, addresses: Addresses, models: Sequence[str]
    ) -> None:
        """Renders its configuration; `start` starts it.

        Raises ServerError if there is no nginx, or no place for sockets.
        """
        self._nginx = _program("nginx", "nginx-light")
        self.settings = settings
        self.certificate = certificate
        # nginx's own processes, which run as nobody when this one is root, must reach what is in it.
        self.folder = folder_for_sockets("marble-front-")
        self.folder.chmod(0o711)
        self._process: subprocess.Popen[bytes] | None = None
        self._seen = self._stamps()
        template = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(
            TEMPLATE.read_text(encoding="utf-8")
        )
        configuration = template.render(
            s=settings,
            folder=self.folder,
            logs=LOGS.resolve(),
            user=_nobody(),
            certificate=certificate.certificate,
            key=certificate.key,
            models=models,
            inference=urlsplit(addresses.inference).netloc,
            metrics=urlsplit(addresses.metrics).netloc,
            grpc=addresses.grpc,
        )
        tokens.write_private(self.folder / "nginx.conf", configuration)
        self.write_tokens()
        write_share(self.folder)
        self._write_inner(None)

    def write_tokens(self) -> None:
        """Brings what nginx knows of clients' tokens up to date; `reload` makes it count."""
        write_tokens(self.folder)

    def files_changed(self) -> bool:
        """Whether the certificate, its key or the tokens are others than nginx was told of; says so once."""
        before, self._seen = self._seen, self._stamps()
        if before[:2] != self._seen[:2]:
            return True
        # scripts/token has told nginx by itself, and a reload is not for nothing: it ends connections.
        return before != self._seen and not self._knows_tokens()

    def _knows_tokens(self) -> bool:
        try:
            return tokens.nginx_maps(tokens.read()) == (self.folder / "tokens.conf").read_text(encoding="utf-8")
        except ServerError:
            return False

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in (self.certificate.certificate, self.certificate.key, tokens.FILE)]

    def start(self) -> None:
        """Starts nginx; returns when it listens. Raises ServerError with what it says."""
        LOGS.mkdir(exist_ok=True)
        log = LOGS / "front_error.log"
        self.rotate_logs()
        # What one that was killed has left: its processes, which still listen, and its file.
        if self._process is not None:
            _kill_group(self._process.pid)
        (self.folder / "nginx.pid").unlink(missing_ok=True)
        with log.open("ab") as errors:
            begun = errors.tell()
            self._process = subprocess.Popen(
                # -e: what it says before it has read where its log is.
                [self._nginx, "-p", str(self.folder), "-e", "stderr", "-c", str(self.folder / "nginx.conf")],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for the supervisor: nginx would drop its requests
            )
        deadline = time.monotonic() + _SECONDS_TO_START
        while not (self.folder / "nginx.pid").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = log.read_bytes()[begun:].decode("utf-8", errors="replace").strip()
                raise ServerError(f"nginx did not start: {said or 'it said nothing'}")
            time.sleep(0.02)
        STATE.parent.mkdir(exist_ok=True)
        own = psutil.Process()
        nginx = psutil.Process(self._process.pid)
        state = State(own.pid, own.create_time(), nginx.pid, nginx.create_time(), str(self.folder))
        tokens.write_private(STATE, json.dumps(asdict(state), indent=2) + "\n")

    def open(self, key: str | None) -> None:
        """Lets requests through, with TorchServe's inference key; None if it wants none."""
        self._write_inner(key or "")
        self.reload()

    def close(self) -> None:
        """Answers every request with 503, while TorchServe is not there: it is told apart from one that fails.

        A version on trial is gone with it.
        """
        write_share(self.folder)
        self._write_inner(None)
        self.reload()

    def reload(self) -> None:
        """Has nginx read its configuration, tokens and certificate anew; requests go on meanwhile."""
        if self._process is not None and self._process.poll() is None:
            try:
                reload(self._process.pid, self.folder)
            except psutil.NoSuchProcess:
                return  # it has just ended, and reads it all when it is started

    def alive(self) -> bool:
        """Whether nginx runs."""
        return self._process is not None and self._process.poll() is None

    def drain(self) -> None:
        """As `State.drain`, within the time of the settings."""
        if self._process is not None and (state := State.read()) is not None:
            # nginx itself cuts off what has not ended by then.
            state.drain(self.settings.drain_seconds + 5)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def rotate_logs(self) -> None:
        """Begins the log files anew that are large.

        nginx is not told: a reload has every connection end with its next answer, and the processes that it has as
        nobody may not be able to open a file in this folder.
        """
        for path in (LOGS / "front_access.log", LOGS / "front_error.log"):
            if path.exists() and path.stat().st_size > _LOG_BYTES:
                rotate(path, _OLD_LOGS, held=True)

    def _write_inner(self, key: str | None) -> None:
        token = f"Bearer {key}" if key else ""
        text = (
            f'map "" $marble_inner_token {{ default "{token}"; }}\n'
            f'map "" $marble_open {{ default "{0 if key is None else 1}"; }}\n'
        )
        tokens.write_private(self.folder / "inner.conf", text)


def _kill_group(leader: int) -> None:
    """Kills an nginx with all its processes: it was started as the leader of a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Differs when a file was replaced or written to; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _nobody() -> str | None:
    """User and group of nginx's own processes when this one is root, else None: they are this one's."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return f"nobody {grp.getgrgid(nobody.pw_gid).gr_name}"


def write_tokens(folder: Path) -> None:
    """Writes the maps of clients' tokens where the nginx of `folder` reads them."""
    tokens.write_private(folder / "tokens.conf", tokens.nginx_maps(tokens.read()))


def write_share(folder: Path, model: str = "", version: str = "", share: float = 0) -> None:
    """Has `share` percent of the requests for a model go to a version of it; without arguments none do."""
    text = 'map "" $marble_share { default ""; }\n'
    if model:
        text = (
            f'split_clients $request_id $marble_split {{ {share:.2f}% "/{version}"; * ""; }}\n'
            f'map $marble_model $marble_share {{ default ""; "{model}" $marble_split; }}\n'
        )
    tokens.write_private(folder / "share.conf", text)


def reload(nginx: int, folder: Path) -> None:
    """Has the nginx of this process id and folder read its configuration anew; returns when new processes answer.

    Raises ServerError if they do not: then the old ones go on, and nginx's log says what is wrong.
    """
    master = psutil.Process(nginx)
    before = master.children()
    closing = folder / "closing"
    closing.touch()
    try:
        # Connections on which requests come end with an answer; those that are idle for so long will be closed.
        time.sleep(_SECONDS_TO_CLOSE)
        master.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + _SECONDS_TO_START
        # The old ones go on taking requests until they say that they are shutting down.
        while not (set(master.children()) - set(before) and all(map(_is_shutting_down, before))):
            if time.monotonic() > deadline:
                raise ServerError(f"nginx did not reload; {LOGS}/front_error.log has the cause")
            time.sleep(0.02)
    finally:
        closing.unlink(missing_ok=True)


def _is_shutting_down(process: psutil.Process) -> bool:
    try:
        return "shutting down" in " ".join(process.cmdline()) or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
