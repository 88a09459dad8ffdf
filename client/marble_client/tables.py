"""Tables in files, row by row: csv, jsonl and parquet, after the suffix."""

import base64
import csv
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

# A value is JSON, or in a parquet file whatever Arrow gives.
Row: TypeAlias = dict[str, Any]
# What a column holds: "string", "integer", "number", "boolean", "json", or the Arrow type it has in a parquet file.
Kinds: TypeAlias = dict[str, Any]

SUFFIXES = (".csv", ".jsonl", ".parquet")
# What of a parquet file is in memory at a time, at most.
_ROWS_READ = 256
_ROWS_WRITTEN, _CHARACTERS_WRITTEN = 10_000, 32 * 2**20
_MOST_INTEGER = 2**63


def check_suffix(path: Path) -> None:
    """Raises ValueError for a file that is no table, or one of parquet where pyarrow is missing."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the name must end in {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        _parquet()


def survey(path: Path) -> tuple[Kinds, int]:
    """The columns of a file and its number of rows, all of which are read once, save those of a parquet file.

    Raises ValueError, with the line, for what is no table, and OSError.
    """
    if path.suffix == ".parquet":
        with _opened(path) as file:
            return {field.name: field.type for field in file.schema_arrow}, file.metadata.num_rows
    if path.suffix == ".csv":
        records = _records(path)
        return dict.fromkeys(next(records), "string"), sum(1 for _ in records)
    kinds: dict[str, str | None] = {}
    rows = 0
    for row in rows_of(path):
        rows += 1
        for name, value in row.items():
            kinds[name] = _joined(kinds.get(name), _kind(value))
    return {name: kind or "string" for name, kind in kinds.items()}, rows


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file, one at a time. Raises as `survey` does."""
    if path.suffix == ".parquet":
        with _opened(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_READ):
                yield from batch.to_pylist()
    elif path.suffix == ".csv":
        records = _records(path)
        header = next(records)
        yield from (dict(zip(header, record, strict=True)) for record in records)
    else:
        yield from _objects(path)


def plain(value: Any) -> Any:
    """A value as JSON has it, bytes left as they are: NaN is null, and what JSON lacks is its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bytes)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence):
        return [plain(entry) for entry in value]
    return str(value)


@contextmanager
def writing(path: Path, suffix: str, kinds: Kinds) -> Iterator[Callable[[Row], None]]:
    """Writes a file of these columns; gives what takes a row, in which columns may be missing."""
    if suffix == ".parquet":
        with _writing_parquet(path, kinds) as write:
            yield write
        return
    # A lone surrogate becomes the escape that JSON has for it.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        if suffix == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(kinds)

            def write(row: Row) -> None:
                writer.writerow([_cell(row.get(name)) for name in kinds])
        else:

            def write(row: Row) -> None:
                file.write(f"{_json(row)}\n")

        yield write


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False, default=lambda data: base64.b64encode(data).decode("ascii"))


def _lines(path: Path) -> Iterator[str]:
    """Lines of UTF-8, each with its end."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                mend = "convert it first, e.g. iconv -f latin1 -t utf-8"
                raise ValueError(f"{path}: line {number} is not UTF-8 (byte 0x{byte:02x}): {mend}") from None


def _records(path: Path) -> Iterator[list[str]]:
    """The header and the rows of a csv file, all of one length; blank lines are none."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the 128 KiB that csv takes by itself
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}: line {line}: {error}: mend its quotes") from None
        if record is None:
            break
        if not header and record:
            header = record
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"{path}: the column {twice[0]!r} is there twice: rename one")
        if record:
            if len(record) != len(header):
                raise ValueError(
                    f"{path}: line {line} has {len(record)} fields, the header {len(header)}: mend the line, "
                    "or put a text with commas into quotes"
                )
            yield record
    if not header:
        raise ValueError(f"{path}: the file is empty; its first line must name the columns")


def _objects(path: Path) -> Iterator[Row]:
    """The objects of a jsonl file; blank lines are none."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}: line {number} is no object: write {{"text": "…"}}')
        yield row


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON: write null")


def _kind(value: Any) -> str | None:
    """What a JSON value is in a column; None for null."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer" if -_MOST_INTEGER <= value < _MOST_INTEGER else "json"
    if isinstance(value, (float, str)):
        return "number" if isinstance(value, float) else "string"
    return "json"


def _joined(one: str | None, other: str | None) -> str | None:
    """What a column is that holds both."""
    if one is None or other is None or one == other:
        return one or other
    return "number" if {one, other} == {"integer", "number"} else "json"


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"a parquet file needs pyarrow ({error}): pip install 'marble-client[parquet]'") from None
    return pyarrow.parquet


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import pyarrow

    try:
        with _parquet().ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: this is no sound parquet file: {error}") from None


@contextmanager
def _writing_parquet(path: Path, kinds: Kinds) -> Iterator[Callable[[Row], None]]:
    import pyarrow as pa

    types = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
    types["json"] = pa.string()
    schema = pa.schema([(name, types[kind] if isinstance(kind, str) else kind) for name, kind in kinds.items()])
    rows: list[list[Any]] = []

    with _parquet().ParquetWriter(path, schema) as file:
        size = 0

        def flush() -> None:
            nonlocal size
            columns = zip(*rows, strict=True)
            arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
            file.write_table(pa.Table.from_arrays(arrays, schema=schema))
            rows.clear()
            size = 0

        def write(row: Row) -> None:
            nonlocal size
            values = [_arrow(row.get(name), kind) for name, kind in kinds.items()]
            rows.append(values)
            size += sum(len(value) for value in values if isinstance(value, (str, bytes)))
            if len(rows) == _ROWS_WRITTEN or size > _CHARACTERS_WRITTEN:
                flush()

        yield write
        if rows:
            flush()


def _arrow(value: Any, kind: Any) -> Any:
    """A value as a column of this kind takes it; a lone surrogate becomes its escape."""
    if kind == "json" and value is not None:
        value = _json(value)
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value
