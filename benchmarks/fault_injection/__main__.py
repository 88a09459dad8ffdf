"""What happens when things go wrong, everything through the front door unless said.

docs/faults.md says what each row does and how to read it.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.fault_injection import (
    access,
    exposure,
    hostile,
    overload,
    oversize,
    processes,
    protocol,
    soak,
    tampering,
    upgrades,
    wedge,
)
from benchmarks.fault_injection.bench import Bench, Target
from benchmarks.fault_injection.site import ROOT, SiteError
from benchmarks.page import rewritten
from benchmarks.speed.__main__ import machine
from training.interrupts import INTERRUPTED

RESULTS = ROOT / "benchmarks" / "faults-results.json"
DOCUMENT = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- figures: written by benchmarks/faults -->", "<!-- end of figures -->"
_EXAMPLES = """examples:
  benchmarks/faults                    # all rows; writes benchmarks/faults-results.json
  benchmarks/faults --only 2 6         # these rows; the others of the file stay as they were
  benchmarks/faults --quick            # fewer repetitions, for CI; prints only"""
# Each gives its figures and what they were taken from.
ROWS: dict[str, Callable[[Bench], tuple[list[Target], Any]]] = {
    "1": soak.soak,
    "2": processes.kill_workers,
    "3": processes.kill_torchserve,
    "4": wedge.wedge,
    "5": processes.shut_down,
    "6": upgrades.upgrade,
    "7": overload.overload,
    "8": hostile.hostile,
    "9": protocol.protocol,
    "10": oversize.oversize,
    "11": access.every_route,
    "12": tampering.tampering,
    "13": exposure.exposure,
}


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    output = arguments.output or (None if arguments.quick else RESULTS)
    rows: dict[str, Any] = {}
    if output is not None and output.exists() and arguments.only:
        rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work.absolute(), arguments.quick)
        for row in arguments.only or ROWS:
            begun = time.time()
            targets, rounds = ROWS[row](bench)
            rows[row] = {
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
                "seconds": round(time.time() - begun),
                "targets": [asdict(target) for target in targets],
                "rounds": rounds,
            }
            for target in targets:
                mark = "met" if target.met else "MISSED"
                print(f"{target.id:>5}  {target.what}: {target.value} (target {target.target}): {mark}", flush=True)
            if output is not None:
                found = results(rows)
                output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                if output == RESULTS:
                    DOCUMENT.write_text(document(found, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    if not all(target["met"] for row in rows.values() for target in row["targets"]):
        sys.exit(1)


def results(rows: dict[str, Any]) -> dict[str, Any]:
    """What is written."""
    ordered = {row: rows[row] for row in ROWS if row in rows}
    packages = ("torchserve", "torch", "openvino", "grpcio", "aiohttp")
    nginx = subprocess.run(["/usr/sbin/nginx", "-v"], capture_output=True, text=True, check=False).stderr.strip()
    return {
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "nginx": nginx.rpartition("/")[2],
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "targets": [target for row in ordered.values() for target in row["targets"]],
        "rows": ordered,
    }


def document(found: dict[str, Any], text: str) -> str:
    """docs/faults.md with the table of these results between its marks. Raises ValueError if it has none."""
    lines = ["| row | figure | found | target | |", "|---|---|---|---|---|"]
    for target in found["targets"]:
        met = "met" if target["met"] else "**missed**"
        lines.append(f"| {target['id']} | {target['what']} | {target['value']} | {target['target']} | {met} |")
    where = found["machine"]
    lines += ["", f"{where['processor']}, {where['cpus']} CPUs; nginx {found['versions']['nginx']}."]
    return rewritten("docs/faults.md", text, (BEGIN, END), "\n".join(lines))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/faults",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; nothing is written")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="these rows")
    parser.add_argument("--work", type=Path, help="folder of models and servers, used again (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="where the results go (default: benchmarks/faults-results.json)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (SiteError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks/faults: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
