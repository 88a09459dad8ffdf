"""examples/bulk: Ray Data gives what `marble predict --input --output` gives, for every format."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REVIEWS, ROOT, Served, run, succeeded
from datasets import load_dataset

NAME = "reviews-fp32"
# One start of Ray for all tables, which takes longer than they do.
PROGRAM = """
import sys, score_with_ray
model, *names = sys.argv[1:]
for name in names:
    score_with_ray.main(["--model", model, "--input", name, "--output", name + ".scored", "--batch-size", "40"])
"""
PYTHON = ROOT / ".venv-ray" / "bin" / "python"


def test_ray_gives_what_the_server_gives(served: Served, store: Path, tmp_path: Path) -> None:
    done = subprocess.run([ROOT / "scripts" / "setup-ray"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(store / f"{NAME}.mar") as file:
        file.extractall(tmp_path / "model")
    rows = load_dataset("csv", data_files=str(REVIEWS / "test.csv"), split="train").to_pandas().head(120)
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table = pa.Table.from_pandas(rows, preserve_index=False)
    # A row that fails, and two files that are one table.
    table = table.set_column(0, "text", pa.array([*table["text"].to_pylist()[:-1], None], pa.string()))
    (tmp_path / "folder").mkdir()
    pq.write_table(table.slice(0, 50), tmp_path / "folder" / "1.parquet")
    pq.write_table(table.slice(50), tmp_path / "folder" / "2.parquet")
    pq.write_table(table, tmp_path / "folder.parquet")

    sources = [tmp_path / name for name in ("a.csv", "a.jsonl", "folder")]
    # A busy machine may need longer than Ray waits for its own parts.
    waits = {"RAY_raylet_start_wait_time_s": "200", "RAY_agent_register_timeout_ms": "200000"}
    settings = {"PYTHONPATH": str(ROOT / "examples" / "bulk"), **waits}
    succeeded(run(PYTHON, "-c", PROGRAM, tmp_path / "model", *sources, cwd=tmp_path, **settings))
    assert not list(tmp_path.glob("*.part"))
    marble = (Path(sys.executable).with_name("marble"), "predict", NAME, "--url", served.url, "--token", served.token)
    for source in sources:
        given = source if source.is_file() else source.with_suffix(".parquet")
        expected = tmp_path / f"{source.name}.parquet.expected.parquet"
        asked = run(*marble, "--input", given, "--output", expected)
        assert asked.returncode == (0 if source.is_file() else 1), asked.stderr
        wanted, found = pq.read_table(expected), pq.read_table(f"{source}.scored")
        assert found.schema.equals(wanted.schema)
        for one, other in zip(found.to_pylist(), wanted.to_pylist(), strict=True):
            assert {**one, "score": None} == {**other, "score": None}
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    assert pq.read_table(tmp_path / "folder.scored")["error"].to_pylist()[-1].endswith("(InvalidInput)")

    command = (PYTHON, ROOT / "examples" / "bulk" / "score_with_ray.py", "--model", tmp_path / "model")
    for more, message in (
        (("--input", "a.csv", "--output", "a.csv.scored"), "a.csv.scored is there already: choose another output"),
        (("--input", "a.csv", "--output", "b", "--column", "body"), "a.csv: there is no column 'body'"),
        (("--input", "a.csv", "--output", "b", "--parameters", '{"topk": 1}'), "unknown parameter 'topk'"),
    ):
        refused = run(*command, *more, cwd=tmp_path)
        assert (refused.returncode, refused.stderr.startswith(f"score_with_ray.py: {message}")) == (1, True), refused
