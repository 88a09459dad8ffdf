"""Scores a table with Ray Data: an engine in each of several processes, on one machine or on many, without a server.

    score_with_ray.py --model artifacts/reviews --input reviews.csv --output scored
    score_with_ray.py --model /models/reviews --input reviews/ --output scored --actors 8 --cpus 4
    score_with_ray.py --model /models/reviews --input a.jsonl --output scored --parameters '{"overflow": "window"}'

The output is a folder of parquet files with the rows of the input, in their order, and the columns that
`marble predict --input --output` adds: docs/bulk.md. README.md beside this file says more.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from handler import golden, parameters, tasks
from handler.engine import Engine
from handler.errors import Overloaded, RequestError
from handler.messages import Request, jsonable
from handler.settings import Settings
from marble_client import columns, tables
from marble_client.tables import Kinds

# Reading and writing take next to nothing: without a CPU of their own, they leave all of them to the actors.
IO = {"num_cpus": 0}


class Scorer:
    """An engine in a process of its own, which answers a batch of rows at a time."""

    def __init__(self, model: Path, source: Path, kinds: Kinds, column: str | None, asked: Any, cpus: int) -> None:
        """kinds: the input's columns; asked: parameters of the task; cpus: that this engine may use."""
        self.engine = Engine(model, threads=cpus)
        self.asked = asked
        self.read = columns.reader(source, kinds, column)
        self.names = columns.free_names(source, kinds)
        # All answers of a model look like its first golden one.
        first = golden.read(model / golden.FILE_NAME)[0]["predictions"]
        self.answer = columns.added(columns.are_labels(first), asked)

    def __call__(self, batch: pa.Table) -> pa.Table:
        results = self.predict([self.read(row) for row in batch.to_pylist()])
        added = [self.answer(result) for result in results]
        types = {"string": pa.string(), "number": pa.float64(), "json": pa.string()}
        for name in self.answer(None):
            values = [row[name] for row in added]
            if columns.ADDED[name] == "json":
                values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
            batch = batch.append_column(self.names[name], pa.array(values, types[columns.ADDED[name]]))
        return batch

    def predict(self, inputs: list[Any]) -> list[dict[str, Any]]:
        """A prediction or an error for each input."""
        results: list[Any] = [None] * len(inputs)
        rows = list(range(len(inputs)))
        while rows:
            outcomes = self.engine.predict([Request([inputs[row]], self.asked) for row in rows])
            for row, outcome in zip(rows, outcomes, strict=True):
                if isinstance(outcome, RequestError):
                    results[row] = {"error": f"{outcome} ({type(outcome).__name__})"}
                else:
                    results[row] = json.loads(json.dumps({"prediction": outcome.predictions[0]}, default=jsonable))
            # What was too much beside the others goes once more, without them.
            late = [row for row, outcome in zip(rows, outcomes, strict=True) if isinstance(outcome, Overloaded)]
            rows = late if len(late) < len(rows) else []
        return results


def kinds_of(source: Path) -> Kinds:
    """The columns of a file, or of a folder of parquet files. Raises ValueError for what is no sound table."""
    if source.is_dir():
        schema = pyarrow.dataset.dataset(source, format="parquet").schema
        return dict(zip(schema.names, schema.types, strict=True))
    tables.check_suffix(source)
    return tables.survey(source)[0]


def read(source: Path, kinds: Kinds) -> Dataset:
    """The rows of a file, or of a folder of parquet files. The columns of a csv are texts, as they stand there."""
    if source.suffix == ".csv":
        return ray.data.read_csv(
            str(source),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(kinds, pa.string())),
            **IO,
        )
    if source.suffix == ".jsonl":
        return ray.data.read_json(str(source), file_extensions=None, **IO)
    return ray.data.read_parquet(str(source), **IO)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.output.exists():
        raise ValueError(f"{arguments.output} is there already: choose another output")
    kinds = kinds_of(arguments.input)
    given = (arguments.model.resolve(), arguments.input, kinds, arguments.column, arguments.parameters, arguments.cpus)
    # What is wrong with all rows is said now, and once.
    columns.reader(*given[1:4])
    parameters.parse(tasks.load(Settings.load(arguments.model).task).Parameters, arguments.parameters)
    # Ray would tell its makers of the cluster.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The cluster that RAY_ADDRESS names, else one of this machine alone.
    ray.init(include_dashboard=False, ignore_reinit_error=True)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    # Its new reader of parquet lists files in a task that takes a CPU, whatever it is told: it would wait for actors
    # that wait for it.
    context.use_datasource_v2 = False
    scored = read(arguments.input, kinds).map_batches(
        Scorer,
        fn_constructor_args=given,
        batch_size=arguments.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=arguments.actors or int(ray.cluster_resources()["CPU"] // arguments.cpus) or 1),
        num_cpus=arguments.cpus,
    )
    unfinished = arguments.output.absolute().with_name(f"{arguments.output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a run that was cut off has left
    scored.write_parquet(str(unfinished), ray_remote_args=IO)
    unfinished.rename(arguments.output)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a bundle, or the folder of an unpacked archive; on every machine")
    add("--input", type=Path, required=True, help="a csv, jsonl or parquet file, or a folder of parquet files")
    add("--output", type=Path, required=True, help="the folder to write parquet files to")
    add("--column", metavar="NAME", help="the input's (text; or the two of a pair, or question and context)")
    add("--parameters", type=json.loads, default={}, metavar="JSON", help="of the task")
    add("--actors", type=int, metavar="N", help="engines (as many as there are CPUs for)")
    add("--cpus", type=int, default=1, metavar="N", help="CPUs of an engine (%(default)s)")
    add("--batch-size", type=int, default=256, metavar="N", help="rows of a batch (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError, RequestError) as error:
        sys.exit(f"score_with_ray.py: {error}")
