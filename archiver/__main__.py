"""The program behind `build_mar.sh`: a bundle becomes a model archive that TorchServe can load.

Without a choice of yours it measures every backend and precision and ships the fastest that answers as well. The
archive is canonical: one bundle and one choice of backend and precision give the same bytes anywhere.
"""

import argparse
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from archiver import bom, pack, report, sign, source
from archiver.optimise import Optimiser
from handler.backends import PRECISIONS
from handler.digests import sha256
from training.errors import UserError
from training.interrupts import INTERRUPTED, end_if_interrupted, remembered

_EXAMPLES = """examples:
  ./build_mar.sh --bundle artifacts/reviews
  ./build_mar.sh --bundle artifacts/reviews --name reviews --version 1.1 --backend openvino --precision bf16
  ./build_mar.sh --bundle artifacts/reviews --version 1.2 --sign release.pem"""


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.sign:
        sign.check_private_key(arguments.sign)  # before the minutes that a build may take
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
        (work / "candidates").mkdir()
        optimiser = Optimiser(bundle, arguments.max_drop, work / "candidates", end_if_interrupted)
        choice = optimiser.choose(arguments.backend, arguments.precision, force=arguments.force)
        built = work / target.name
        (work / "pack").mkdir()
        pack.pack(
            choice.model_dir,
            name,
            arguments.version,
            without_torch=choice.backend == "openvino",
            work=work / "pack",
            target=built,
        )
        sign.write_checksum(built)
        built.with_name(name + bom.SUFFIX).write_text(bom.render(arguments.bundle, built), encoding="utf-8")
        if arguments.sign:
            sign.sign(built, arguments.sign)
        end_if_interrupted()
        with locked(arguments.store):
            publish(built, target, arguments.version, force=arguments.force)
    report.show(arguments.bundle, choice.record)
    size = target.stat().st_size / 1e6
    print(f"{target}: version {arguments.version}, {choice.backend} {choice.precision}, {size:.1f} MB")
    if arguments.sign:
        print(f"signed with {arguments.sign}")
    print(f"sha256 {sha256(target)}")
    print(f"next: scripts/serve --models {name}={target.name}")


def publish(built: Path, target: Path, version: str, *, force: bool) -> None:
    """Moves a built archive into the store, with the files beside it. Raises UserError before it would replace another
    one of the same version."""
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
    for source_file, place in zip(sign.files(built), sign.files(target), strict=True):
        if source_file.exists():
            partial = place.with_name(f".{place.name}.partial")
            shutil.copyfile(source_file, partial)
            os.replace(partial, place)
        else:
            place.unlink(missing_ok=True)  # the signature of an archive that is replaced by an unsigned one


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
        prog="build_mar.sh",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--name", help="model name (default: the bundle's folder name)")
    parser.add_argument("--version", default="1.0", help="numbers separated by dots (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=("auto", *PRECISIONS), default="auto", help="auto: the fastest on this machine"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", *dict.fromkeys(name for names in PRECISIONS.values() for name in names)),
        default="auto",
        help="auto: the fastest on this machine that keeps the golden set and the validation metric",
    )
    parser.add_argument(
        "--max-drop", type=float, default=0.5, help="points of the validation metric that may be lost (default: 0.5)"
    )
    parser.add_argument("--sign", type=Path, metavar="KEY", help="private key (PEM, P-256) to sign with: docs/trust.md")
    parser.add_argument("--store", type=Path, default=Path("model_store"), help="folder to write to")
    parser.add_argument("--force", action="store_true", help="replace an archive of the same version; ignore the gate")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        with remembered(at_once=True):
            main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"build_mar.sh: {error}")
    except KeyboardInterrupt:
        print("build_mar.sh: interrupted; no archive was written", file=sys.stderr)
        sys.exit(INTERRUPTED)
