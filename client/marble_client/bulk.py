"""A file of inputs to a file of predictions, in constant memory, resumable at any point.

Results go to FILE.part as they come, a line for each batch; when all are there, the input is read once more and FILE is
written whole, beside it, and renamed. So a run that was killed has lost what was under way and nothing else, whatever
the format of FILE.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Self

from tqdm import tqdm

from marble_client.answer import ItemError, Json
from marble_client.client import Client
from marble_client.columns import ADDED, added, are_labels, free_names, reader
from marble_client.many import Batch, Plan, predict_batches
from marble_client.tables import check_suffix, rows_of, survey, writing
from marble_client.wire import without_details

_SYNC_EVERY_S = 1.0


class Bulk:
    """A file to predict for: use it in a `with` block, `predict`, then `finish`.

    column: the input's; None goes by the names. Raises ValueError for what is wrong with a file, with its line.
    """

    def __init__(self, source: Path, target: Path, plan: Plan, *, column: str | None, overwrite: bool) -> None:
        _check(source, target, overwrite)
        self._source, self._target, self._plan = source, target, plan
        with _said(target):
            self._state = _state(source)
            self._kinds, self.rows = survey(source)
            self._input = reader(source, self._kinds, column)
            self._names = free_names(source, self._kinds)
            with source.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            parameters = dict(plan.parameters or {})
            about = {"input": digest, "column": column, "model": plan.model, "version": plan.version}
            self._part = _Part(target.with_name(f"{target.name}.part"), {**about, "parameters": parameters})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._part.close()

    @property
    def done(self) -> int:
        """How many rows have a result."""
        return self._part.rows

    def predict(self, client: Client) -> None:
        """Ask for the rows that have no result yet. A call that raised may be repeated.

        Raises MarbleError where no single row is to blame, ValueError if the model changed since the first row.
        """
        inputs = map(self._input, islice(rows_of(self._source), self.done, None))
        with (
            tqdm(total=self.rows, initial=self.done, unit=" rows", delay=2, disable=None) as bar,
            closing(predict_batches(client, inputs, self._plan)) as batches,
        ):
            for batch in batches:
                with _said(self._target):
                    self._part.append(batch)
                bar.update(len(batch.results))

    def finish(self) -> tuple[int, bool]:
        """Write the output. Returns how many rows failed, and whether a text was cut to fit the model."""
        if _state(self._source) != self._state:
            raise ValueError(f"{self._source} changed while it was read: delete {self._part.path} and start anew")
        columns = added(self._part.labels, self._plan.parameters or {})
        kinds = {**self._kinds, **{self._names[name]: ADDED[name] for name in columns(None)}}
        unfinished = self._target.with_name(f"{self._target.name}.tmp")
        with _said(self._target):
            with writing(unfinished, self._target.suffix, kinds) as write:
                for row, result in zip(rows_of(self._source), self._part.results(), strict=True):
                    write({**row, **{self._names[name]: value for name, value in columns(result).items()}})
            _sync(unfinished)
            unfinished.replace(self._target)
            _sync(self._target.parent)
            self._part.path.unlink()
        return self._part.failed, self._part.truncated


class _Part:
    """FILE.part: a line that says what is predicted for, then one for each batch. Locked while it is open.

    rows, failed: results so far, and how many are errors. labels: whether all others are those of a classification,
    None as long as it cannot be told.
    """

    def __init__(self, path: Path, about: dict[str, Json]) -> None:
        self.path = path
        self.rows = self.failed = 0
        self.truncated = False
        self.labels: bool | None = None
        self._digest: str | None = None
        self._synced = time.monotonic()
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load(about)
        except BlockingIOError:
            self.close()
            raise ValueError(f"another run is writing {path}: wait for it, or choose another output") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def append(self, batch: Batch) -> None:
        """Add what became of the next rows. Raises ValueError if another model answered than before."""
        digest = None if batch.model is None else batch.model.digest
        if None not in (digest, self._digest) and digest != self._digest:
            raise ValueError(
                f"the model changed: its digest was {self._digest} for the rows before row {self.rows + 1} and is now "
                f"{digest}. Serve the former again, or delete {self.path} to predict for all rows anew"
            )
        results: list[dict[str, Json]] = [
            {"error": f"{result.error} ({result.type})"}
            if isinstance(result, ItemError)
            else {"prediction": without_details(result)}
            for result in batch.results
        ]
        self._write({"digest": digest, "truncated": batch.truncated, "results": results})
        self._count(digest, batch.truncated, results)

    def results(self) -> Iterator[Json]:
        """All results: objects with a prediction or an error."""
        with self.path.open("rb") as file:
            file.readline()
            for line in file:
                yield from json.loads(line)["results"]

    def _load(self, about: dict[str, Json]) -> None:
        """Go on with what an earlier run has left, up to where it was cut off."""
        with self.path.open("rb") as file:
            first = file.readline()
            try:
                found = json.loads(first) if first else about
                others = [name for name, value in about.items() if found[name] != value]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path} was not written by marble: move it away") from None
            whole = len(first)
            for line in file:
                try:
                    if not line.endswith(b"\n"):
                        break
                    entry = json.loads(line)
                    self._count(entry["digest"], entry["truncated"], entry["results"])
                except (ValueError, KeyError, TypeError):  # what a crash of the machine leaves at the end
                    break
                whole += len(line)
        if self.rows and others:
            raise ValueError(
                f"{self.path} was begun with another {' and '.join(others)}: give what it was begun with, or delete it "
                "to start anew"
            )
        self._file.truncate(whole if self.rows else 0)
        if not self.rows:
            self._write(about)

    def _write(self, entry: Json) -> None:
        line = json.dumps(entry).encode("ascii") + b"\n"
        while line:
            line = line[self._file.write(line) :]
        if time.monotonic() - self._synced > _SYNC_EVERY_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _count(self, digest: str | None, truncated: bool, results: list[dict[str, Json]]) -> None:
        self.rows += len(results)
        self.failed += sum("error" in result for result in results)
        self.truncated |= truncated
        self._digest = self._digest or digest
        for prediction in (result["prediction"] for result in results if "prediction" in result):
            if prediction != []:  # no label over the threshold, or no entity found
                self.labels = self.labels is not False and are_labels(prediction)


def _check(source: Path, target: Path, overwrite: bool) -> None:
    """Raises ValueError for an input and an output that cannot be."""
    check_suffix(source)
    check_suffix(target)
    if source.exists() and not source.is_file():
        raise ValueError(f"{source} is no file; the input is read more than once")
    if target.exists():
        if target.samefile(source):
            raise ValueError(f"{target} is the input: choose another output")
        if not (overwrite and target.is_file()):
            raise ValueError(f"{target} is there already: choose another output, or --overwrite")


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _sync(path: Path) -> None:
    """Have a file, or a folder's names, survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Says what the system refuses in terms of the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror}") from None
