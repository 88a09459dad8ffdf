"""build_mar.sh: one bundle gives one sequence of bytes, and what is broken or was changed becomes no archive."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import OFFLINE, ROOT, Build, Exit, build, run, succeeded

from archiver.__main__ import locked

TORCH = ("--backend", "torch", "--precision", "fp32")
# What a build leaves in the store.
BUILT = ["small.cdx.json", "small.mar", "small.mar.sha256"]
ARCHIVES = ("reviews.mar", "reviews-fp32.mar", "reviews-torch.mar")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.unlink()  # it may be a link
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def settings(archive: Path) -> dict[str, Any]:
    with zipfile.ZipFile(archive) as file:
        section: dict[str, Any] = yaml.safe_load(file.read("model-config.yaml"))["handler"]
    return section


# --- The same bytes anywhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHIVES)
def test_another_build_elsewhere_gives_the_same_bytes(bundle: Path, store: Path, tmp_path: Path, name: str) -> None:
    """Another folder, another user's habits, file times and modes; `auto` finds what was measured in the bundle."""
    elsewhere = tmp_path / "somewhere else" / "copy"
    options: tuple[str, ...] = ("--name", name.removesuffix(".mar"))
    if name != "reviews.mar":
        made = settings(store / name)
        options += ("--backend", made["backend"], "--precision", made["precision"])
    for folder in ("home", "tmp", "cwd"):
        (tmp_path / folder).mkdir()
    environment = {
        "TZ": "Pacific/Kiritimati",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    before = os.umask(0o077)
    try:
        shutil.copytree(bundle, elsewhere, copy_function=shutil.copyfile)
        with zipfile.ZipFile(store / name) as file:
            if "candidates.json" in file.namelist():
                file.extract("candidates.json", elsewhere)
        command = (ROOT / "build_mar.sh", "--bundle", elsewhere, "--store", tmp_path / "store", *options)
        succeeded(run(*command, cwd=tmp_path / "cwd", **environment))
    finally:
        os.umask(before)
    assert digest(tmp_path / "store" / name) == digest(store / name)
    left = [path.name for folder in ("cwd", "tmp") for path in (tmp_path / folder).iterdir()]
    assert [entry for entry in left if not entry.startswith("torchinductor_")] == [], "left behind"
    assert not (tmp_path / "home" / "intel").exists(), "telemetry, which begins with an id in this folder"
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == sorted(
        [name, f"{name}.sha256", name.replace(".mar", ".cdx.json")]
    )


def test_openvino_bf16_is_built_the_same_twice(small: Path, tmp_path: Path, build_main: Build) -> None:
    """Where `auto` does not choose bf16, the test above has not built it."""
    for folder in ("one", "two"):
        build_main(small, "--backend", "openvino", "--precision", "bf16", store=tmp_path / folder)
    assert digest(tmp_path / "one" / "small.mar") == digest(tmp_path / "two" / "small.mar")


def test_source_date_epoch(small: Path, tmp_path: Path, build_main: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000001")
    build_main(small)
    with zipfile.ZipFile(tmp_path / "store" / "small.mar") as file:
        assert {entry.date_time for entry in file.infolist()} == {(2023, 11, 14, 22, 13, 20)}
        assert json.loads(file.read("MAR-INF/MANIFEST.json"))["createdOn"] == "14/11/2023 22:13:21"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(Exit, match="SOURCE_DATE_EPOCH=yesterday"):
        build_main(small, *TORCH, "--version", "2")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "99999999999")  # beyond what a zip can say
    build_main(small, *TORCH, "--version", "3")


# --- What an archive holds -------------------------------------------------------------------------------------------


def test_the_checksum_is_right(store: Path) -> None:
    for name in ARCHIVES:
        assert (store / f"{name}.sha256").read_text() == f"{digest(store / name)}  {name}\n"
    files = [f"{name}.sha256" for name in ARCHIVES]
    assert succeeded(run("sha256sum", "--check", "--strict", *files, cwd=store)).count(": OK") == 3


@pytest.mark.parametrize("name", ARCHIVES)
def test_the_members(bundle: Path, store: Path, name: str) -> None:
    """Nothing but what a worker needs; no pickle, no bytecode, no path that leads elsewhere."""
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "handler").rglob("*.py")}
    code -= {"handler/entry.py", "handler/torch_placeholder.py"}
    model = (
        {"model.safetensors"}
        if name == "reviews-torch.mar"
        else {"openvino_model.bin", "openvino_model.xml", "torch.py"}
    )
    facts = {"MAR-INF/MANIFEST.json", "digests.json", "LICENSE", "README.md", "golden.jsonl", "model-config.yaml"}
    facts |= {"label-shares.json"}
    with zipfile.ZipFile(store / name) as file:
        entries = file.infolist()
        names = [entry.filename for entry in entries]
        tokenizer = {"config.json", "tokenizer.json", "tokenizer_config.json"}
        measured = {"candidates.json"} if name == "reviews.mar" else set()
        assert set(names) == code | model | facts | tokenizer | measured | {"entry.py"}
        assert names == sorted(set(names))
        assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
        assert {entry.external_attr for entry in entries} == {0o100644 << 16}
        assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
        assert {(entry.extra, entry.comment, entry.create_system) for entry in entries} == {(b"", b"", 3)}
        for member in code:
            assert file.read(member) == (ROOT / member).read_bytes()
        assert file.read("entry.py") == (ROOT / "handler" / "entry.py").read_bytes()
        assert file.read("LICENSE") == (ROOT / "LICENSE").read_bytes()
        for member in ("golden.jsonl", "config.json", "tokenizer.json", "README.md"):
            assert file.read(member) == (bundle / member).read_bytes()
        listed = json.loads(file.read("digests.json"))
        assert listed == {
            member: hashlib.sha256(file.read(member)).hexdigest() for member in names if member != "digests.json"
        }


def test_the_manifest_and_the_settings(store: Path) -> None:
    for name in ARCHIVES:
        with zipfile.ZipFile(store / name) as file:
            manifest = json.loads(file.read("MAR-INF/MANIFEST.json"))
        assert manifest["model"] == {
            "modelName": name.removesuffix(".mar"),
            "modelVersion": "1.0",
            "handler": "entry.py",
            "configFile": "model-config.yaml",
        }
    chosen = [(settings(store / name)["backend"], settings(store / name)["precision"]) for name in ARCHIVES]
    assert chosen[0][0] == "openvino"
    assert chosen[1:] == [("openvino", "fp32"), ("torch", "fp32")]


# --- Names, versions and archives that are there already -------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../escape", "a/b", "a b", ".hidden", "-dash", "naïve", "x" * 101, "a\n", "%41"])
def test_bad_names(small: Path, tmp_path: Path, build_main: Build, name: str) -> None:
    with pytest.raises(Exit, match="--name"):
        build_main(small, f"--name={name}")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "version", ["", "v1", "1.", ".1", "1..2", "1.0-rc1", "1.2.3.4.5", "-1", "1.0\n", "../1", "١.٠"]
)
def test_bad_versions(small: Path, tmp_path: Path, build_main: Build, version: str) -> None:
    with pytest.raises(Exit, match="--version"):
        build_main(small, f"--version={version}")
    assert not (tmp_path / "store").exists()


def test_bad_stores_and_drops(small: Path, tmp_path: Path, build_main: Build) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Exit, match=r"--store .*file"):
        build_main(small, store=tmp_path / "file")
    for points in ("-1", "nan", "101"):
        with pytest.raises(Exit, match="--max-drop"):
            build_main(small, f"--max-drop={points}")


def test_an_archive_is_not_overwritten_unasked(small: Path, tmp_path: Path, build_main: Build) -> None:
    target = tmp_path / "store" / "small.mar"
    checksum = tmp_path / "store" / "small.mar.sha256"
    assert "version 1.0, torch fp32" in build_main(small)
    first = digest(target)
    build_main(small)  # the same content again is no conflict
    assert digest(target) == first

    config = (small / "model-config.yaml").read_text()
    (small / "model-config.yaml").unlink()
    (small / "model-config.yaml").write_text(config + "  max_inputs: 7\n")
    stamps = {path: path.stat().st_mtime_ns for path in (target, checksum)}
    with pytest.raises(Exit, match=r"version 1\.0 already, with other content; give another --version, or add --force"):
        build_main(small)
    assert {path: path.stat().st_mtime_ns for path in (target, checksum)} == stamps
    assert digest(target) == first

    assert "version 1.0 is replaced" in build_main(small, *TORCH, "--version", "1.1")
    second = digest(target)
    build_main(small, *TORCH, "--force")
    third = digest(target)
    assert len({first, second, third}) == 3
    assert settings(target)["max_inputs"] == 7
    assert checksum.read_text().split()[0] == third
    assert sorted(path.name for path in target.parent.iterdir()) == BUILT


def test_a_file_in_the_way_that_is_no_archive(small: Path, tmp_path: Path, build_main: Build) -> None:
    target = tmp_path / "store" / "small.mar"
    target.parent.mkdir()
    target.write_bytes(b"PK, cut off")
    with pytest.raises(Exit, match=r"not a readable archive; remove it, or add --force"):
        build_main(small)
    assert target.read_bytes() == b"PK, cut off"
    build_main(small, *TORCH, "--force")
    assert settings(target)["backend"] == "torch"


def test_the_version_is_part_of_the_digests(small: Path, tmp_path: Path, build_main: Build) -> None:
    """So that x-model-digest tells apart what was released as two versions."""
    found = []
    for version in ("1.0", "2.0"):
        build_main(small, *TORCH, "--version", version)
        with zipfile.ZipFile(tmp_path / "store" / "small.mar") as file:
            found.append(json.loads(file.read("digests.json")))
            assert json.loads(file.read("MAR-INF/MANIFEST.json"))["model"]["modelVersion"] == version
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"MAR-INF/MANIFEST.json"}


# --- Broken bundles --------------------------------------------------------------------------------------------------


def test_the_exit_code_and_the_message_of_a_process(tmp_path: Path) -> None:
    done = build(tmp_path / "nothing", tmp_path / "store")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"build_mar.sh: --bundle {tmp_path / 'nothing'}: there is no such folder")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "model-config.yaml",
            "golden.jsonl",
            "validation.jsonl",
        ),
        "metrics.json",
    ],
)
def test_a_bundle_that_lacks_a_file(small: Path, tmp_path: Path, build_main: Build, name: str) -> None:
    (small / name).unlink()
    with pytest.raises(Exit, match=f"{re.escape(name)} is missing"):
        build_main(small)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", None, "not fully covered"),
        ("model.safetensors", "", "header"),
        ("config.json", "{", "Expecting"),
        ("config.json", "{}", "id2label"),
        ("tokenizer.json", "{", "EOF"),
        ("model-config.yaml", "handler: [", "not valid YAML"),
        ("model-config.yaml", "minWorkers: 1\n", "no `handler:` section"),
        ("model-config.yaml", "handler: {task: text-classification, max_lenght: 64}", "max_lenght"),
        ("model-config.yaml", "handler: {task: text-classification, max_length: long}", "model-config.yaml"),
        ("model-config.yaml", "handler: {task: poetry, max_length: 128}", "poetry"),
        ("golden.jsonl", "", "empty"),
        ("golden.jsonl", "nonsense\n", "not JSON"),
        ("golden.jsonl", '{"inputs": "text"}\n', "predictions"),
        ("validation.jsonl", "", "does not belong to the validation scores"),
        ("validation.jsonl", '{"inputs": "no target"}\n', "target"),
        ("metrics.json", "{}", "labels"),
        ("metrics.json", "{", "Expecting"),
    ],
)
def test_a_bundle_with_a_broken_file(
    small: Path, tmp_path: Path, build_main: Build, name: str, content: str | None, words: str
) -> None:
    whole = (small / name).read_bytes()
    (small / name).unlink()
    (small / name).write_bytes(whole[: len(whole) // 2] if content is None else content.encode())
    with pytest.raises(Exit) as caught:
        build_main(small)
    message = str(caught.value).splitlines()[0]
    assert f"{name} is broken" in message
    assert words in message
    assert not (tmp_path / "store").exists()


# --- The gate --------------------------------------------------------------------------------------------------------


def written(store: Path) -> list[str]:
    return [path.name for path in store.iterdir()]


def change_third_example(bundle: Path, **changes: Any) -> None:
    rows = lines(bundle / "golden.jsonl")
    rows[2] |= changes
    write_lines(bundle / "golden.jsonl", rows)


def test_a_golden_set_that_was_changed_is_refused(small: Path, tmp_path: Path, build_main: Build) -> None:
    predictions = lines(small / "golden.jsonl")[2]["predictions"]
    shifted = [{**entry, "score": entry["score"] - 0.01} for entry in predictions]
    change_third_example(small, predictions=shifted)
    with pytest.raises(Exit, match=r"golden example 3 of \d+ drifts by 0\.01, more than the tolerance 0\.001"):
        build_main(small)
    renamed = [{**entry, "label": "mixed"} for entry in predictions]
    change_third_example(small, predictions=renamed)
    with pytest.raises(Exit, match=r"golden example 3 of \d+"):
        build_main(small)
    change_third_example(small, predictions=predictions, inputs=5)
    with pytest.raises(Exit, match="an input must be a string"):
        build_main(small)
    assert written(tmp_path / "store") == []


def test_auto_falls_back_and_says_why_each_choice_failed(small: Path, tmp_path: Path, build_main: Build) -> None:
    change_third_example(small, predictions=[{"label": "negative", "score": 1.0}])
    with pytest.raises(Exit) as caught:
        build_main(small, "--backend", "auto")
    message, *said = str(caught.value).splitlines()
    assert re.match(r"build_mar\.sh: none of torch fp32, .*openvino fp32.* passed the quality gate", message)
    for choice in ("openvino fp32", "torch fp32"):
        assert any(line.startswith(f"{choice} does not pass: golden example 3") for line in said), said
    assert "Traceback" not in str(caught.value)
    assert written(tmp_path / "store") == []


def test_other_weights_do_not_pass(small: Path, tmp_path: Path, build_main: Build) -> None:
    """Weights that load but are not those the golden set was recorded with."""
    content = bytearray((small / "model.safetensors").read_bytes())
    header = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + header])["classifier.weight"]["data_offsets"]
    content[8 + header + start : 8 + header + end] = bytes(end - start)
    (small / "model.safetensors").unlink()
    (small / "model.safetensors").write_bytes(content)
    with pytest.raises(Exit, match=r"golden example 1 of \d+ drifts"):
        build_main(small)
    assert written(tmp_path / "store") == []


def test_a_model_that_got_worse_is_refused_unless_it_is_allowed(small: Path, tmp_path: Path, build_main: Build) -> None:
    """Three validation answers are made wrong; one may always change."""
    rows = lines(small / "validation.jsonl")
    for row in rows[:3]:
        row["target"] = "negative" if row["target"] == "positive" else "positive"
    write_lines(small / "validation.jsonl", rows)
    with pytest.raises(Exit, match=r"validation accuracy falls from [\d.]+ to [\d.]+, more than 0\.5 points"):
        build_main(small)
    points = 100 * 3 / len(rows)
    with pytest.raises(Exit, match=r"validation accuracy falls"):
        build_main(small, *TORCH, "--max-drop", f"{points - 0.5}")
    assert written(tmp_path / "store") == []
    build_main(small, *TORCH, "--max-drop", f"{points + 0.5}")
    assert sorted(written(tmp_path / "store")) == BUILT


def test_force_builds_what_the_gate_refuses_and_warns(small: Path, tmp_path: Path, build_main: Build) -> None:
    change_third_example(small, predictions=[{"label": "negative", "score": 1.0}])
    printed = build_main(small, *TORCH, "--force")
    assert "warning: built because of --force, though golden example 3" in printed
    assert sorted(written(tmp_path / "store")) == BUILT
    with pytest.raises(Exit, match="golden example 3"):  # --force with `auto` still looks for one that passes
        build_main(small, "--force", "--backend", "auto")


# --- At the same time, and cut off -----------------------------------------------------------------------------------


def test_two_builds_of_one_name_at_the_same_time(small: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [ROOT / "build_mar.sh", "--bundle", small, "--store", store, *TORCH, "--version"]
    with subprocess.Popen([*command, "1.0"], env=OFFLINE, stderr=subprocess.PIPE, text=True) as one:
        two = run(*command, "1.1")
        _, error = one.communicate(timeout=120)
    assert one.returncode == 0, error
    succeeded(two)
    assert sorted(written(store)) == BUILT
    succeeded(run("sha256sum", "--check", "small.mar.sha256", cwd=store))


def test_a_store_is_written_by_one_build_at_a_time(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        with locked(tmp_path), pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def test_ctrl_c_writes_no_archive(small: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    command = [ROOT / "build_mar.sh", "--bundle", small, "--store", tmp_path / "store"]
    environment = {**OFFLINE, "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert "converting" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while not any((tmp_path / "tmp").rglob("tokenizer.json")):  # at work on the model
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "build_mar.sh: interrupted; no archive was written"
    assert "Traceback" not in error
    assert written(tmp_path / "store") == []
    assert [name for name in written(tmp_path / "tmp") if name.startswith("marble")] == []
