"""The program behind `build_mar.sh`: a bundle becomes a model archive that TorchServe can load.

    ./build_mar.sh --bundle artifacts/reviews
    ./build_mar.sh --bundle artifacts/reviews --name reviews --version 1.1 --backend openvino --precision bf16

The archive is canonical: one bundle and one choice of backend and precision give the same bytes anywhere.
"""

import argparse
import fcntl
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from archiver import convert, gate, pack, source
from handler.backends import BACKENDS, PRECISIONS
from handler.digests import sha256
from training.errors import UserError


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    bundle = source.check(arguments.bundle)
    name = arguments.bundle.resolve().name if arguments.name is None else arguments.name
    check_name(name)
    check_version(arguments.version)
    check_max_drop(arguments.max_drop)
    try:
        arguments.store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--store {arguments.store}: no folder to write to ({error.strerror})") from None
    target = arguments.store / f"{name}.mar"

    with tempfile.TemporaryDirectory(prefix="marble-build-") as folder:
        work = Path(folder)
        model_dir, backend, precision = choose(bundle, arguments, work)
        built = work / target.name
        (work / "pack").mkdir()
        pack.pack(
            model_dir,
            name,
            arguments.version,
            without_torch=backend == "openvino",
            work=work / "pack",
            target=built,
        )
        _end_if_interrupted()
        with locked(arguments.store):
            publish(built, target, arguments.version, force=arguments.force)
    print(f"{target}: version {arguments.version}, {backend} {precision}, {target.stat().st_size / 1e6:.1f} MB")
    print(f"sha256 {sha256(target)}")
    print(f"next: scripts/serve --models {name}={target.name}")


def choose(bundle: source.Bundle, arguments: argparse.Namespace, work: Path) -> tuple[Path, str, str]:
    """The model folder that passes the gate, its backend and its precision.

    `auto` is OpenVINO where the task can run on it, in bf16 where the CPU has it, and falls back to torch and to fp32.
    Raises UserError if no choice passes.
    """
    if arguments.backend == "openvino" and not bundle.runs_on_openvino:
        raise UserError(f"--backend openvino: {bundle.settings.task} runs on torch only; leave --backend out")
    backend = arguments.backend
    if backend == "auto":
        backend = "openvino" if bundle.runs_on_openvino else "torch"
    auto = arguments.precision == "auto"
    precisions = [arguments.precision]
    if auto:
        precisions = ["bf16", "fp32"] if bundle.runs_on_openvino and convert.cpu_has_bf16() else ["fp32"]
    try:
        found = build(bundle, backend, precisions, arguments, work)
    except UserError as error:
        if arguments.backend != "auto" or backend == "torch":
            raise
        _end_if_interrupted()
        print(f"{error}; trying torch", file=sys.stderr)
        backend = "torch"
        found = build(bundle, backend, ["fp32"] if auto else precisions, arguments, work)
    return found[0], backend, found[1]


def build(
    bundle: source.Bundle, backend: str, precisions: list[str], arguments: argparse.Namespace, work: Path
) -> tuple[Path, str]:
    """The model folder of the first precision that passes the gate. Raises UserError if none does."""
    for precision in precisions:
        model_dir = work / f"{backend}-{precision}"
        model_dir.mkdir()
        print(f"{backend} {precision}: converting and checking …", flush=True)
        convert.write(bundle, backend, precision, model_dir)
        write_config(bundle, model_dir, backend, precision)
        verdict = gate.check(bundle, model_dir, arguments.max_drop)
        print(f"{backend} {precision}: {verdict}", flush=True)
        if verdict.passed or (arguments.force and arguments.precision != "auto"):
            if not verdict.passed:
                print(f"warning: built because of --force, though {verdict.reason}", file=sys.stderr)
            return model_dir, precision
        print(f"{backend} {precision} does not pass: {verdict.reason}", file=sys.stderr)
    raise UserError(
        f"{backend} {' and '.join(precisions)} did not pass the quality gate, as said above; "
        "try another --backend or --precision, or --max-drop"
    )


def write_config(bundle: source.Bundle, model_dir: Path, backend: str, precision: str) -> None:
    """The archive's `model-config.yaml`: the bundle's, with the choices made here."""
    config = yaml.safe_load((bundle.path / "model-config.yaml").read_text(encoding="utf-8"))
    config["handler"] |= {
        "backend": backend,
        "precision": precision,
        "golden_tolerance": gate.GOLDEN_TOLERANCE[precision],
    }
    (model_dir / "model-config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def publish(built: Path, target: Path, version: str, *, force: bool) -> None:
    """Moves a built archive into the store, with its `.sha256`. Raises UserError before it would replace another one
    of the same version."""
    if target.exists() and not force and sha256(target) != sha256(built):
        try:
            present = pack.manifest(target)["model"]["modelVersion"]
        except UserError:
            raise UserError(f"{target} is there and is not a readable archive; remove it, or add --force") from None
        if present == version:
            raise UserError(
                f"{target} has version {version} already, with other content; give another --version, or add --force"
            )
        print(f"{target}: version {present} is replaced")
    # Copied beside the target first: a rename within one folder is the only step that can be seen.
    for suffix, content in (("", built.read_bytes()), (".sha256", f"{sha256(built)}  {target.name}\n".encode())):
        partial = target.with_name(f".{target.name}{suffix}.partial")
        partial.write_bytes(content)
        os.replace(partial, target.with_name(target.name + suffix))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds other builds off a store, so that an archive and its checksum always come from one of them."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_name(name: str) -> None:
    """Raises UserError for a name that TorchServe or a URL would not take."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UserError(
            f"--name {name!r}: use letters, digits, '_', '-' and '.', at most 100, the first a letter or digit"
        )


def check_version(version: str) -> None:
    """Raises UserError for a version that cannot be put in order."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+){0,3}", version):
        raise UserError(f"--version {version!r}: use numbers separated by dots, such as 1.0 or 2.3.1")


def check_max_drop(points: float) -> None:
    """Raises UserError for points that are none."""
    if not 0 <= points <= 100:
        raise UserError(f"--max-drop {points:g}: give points of the validation metric, 0 to 100, such as 0.5")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="build_mar.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--name", help="model name (default: the bundle's folder name)")
    parser.add_argument("--version", default="1.0", help="numbers separated by dots (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="auto: openvino where the task can run on it"
    )
    parser.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: bf16 where the CPU has it, else fp32"
    )
    parser.add_argument(
        "--max-drop", type=float, default=0.5, help="points of the validation metric that may be lost (default: 0.5)"
    )
    parser.add_argument("--store", type=Path, default=Path("model_store"), help="folder to write to")
    parser.add_argument("--force", action="store_true", help="replace an archive of the same version; ignore the gate")
    return parser.parse_args(argv)


_interrupted = False


def _interrupt(number: int, frame: object) -> None:
    """Ctrl-C. Remembered, too: what is raised may be lost in a destructor, or come out of OpenVINO as another error."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _end_if_interrupted() -> None:
    if _interrupted:
        raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupt)
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"build_mar.sh: {error}")
    except KeyboardInterrupt:
        sys.exit("build_mar.sh: interrupted; no archive was written")
