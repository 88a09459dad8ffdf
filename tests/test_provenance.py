"""The bill of materials and the signature beside an archive: what they say, and that no change of them goes unseen."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import model_signing.verifying
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from archiver import bom, sign
from benchmarks.fault_injection.tampering import P256, flip, make_key
from server.archive import ArchiveError, verify
from training.errors import UserError

DIGEST = "ab" * 32


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    provenance = {
        "command": ["train.py", "--train-file", "/home/somebody/train.csv"],
        "base_model": {"name": "org/base", "sha256": DIGEST, "licence": "apache-2.0"},
        "data": {"train": {"file": "train.csv", "sha256": DIGEST}},
        "versions": {"torch": "2.13.0+cpu", "python": "3.11.7"},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (folder / "metrics.json").write_text(json.dumps({"splits": {"validation": {"accuracy": 0.5}, "test": None}}))
    return folder


@pytest.fixture
def signed(tmp_path: Path, bundle: Path) -> Path:
    """A signed archive of a folder of its own."""
    archive = tmp_path / "store" / "small.mar"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"modelName": "small", "modelVersion": "1.2"}}))
        settings = "handler: {task: text-classification, backend: torch, precision: fp32}"
        file.writestr("model-config.yaml", settings)
        file.writestr("digests.json", "{}")
    sign.write_checksum(archive)
    archive.with_name("small.cdx.json").write_text(bom.render(bundle, archive))
    sign.sign(archive, make_key(tmp_path / "key.pem", *P256))
    return archive


def test_the_bill_of_materials(signed: Path, bundle: Path) -> None:
    text = signed.with_name("small.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert bom.render(bundle, signed) == text
    assert "somebody" not in text
    bill = json.loads(text)
    model = bill["metadata"]["component"]
    assert (model["name"], model["version"], model["licenses"]) == ("small", "1.2", [{"expression": "Apache-2.0"}])
    assert model["pedigree"]["ancestors"][0]["hashes"] == [{"alg": "SHA-256", "content": DIGEST}]
    assert model["modelCard"]["modelParameters"]["datasets"] == [{"ref": "data:train"}]
    measured = [{"type": "accuracy", "value": "0.5", "slice": "validation"}]
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"] == measured
    assert {"pkg:pypi/torch@2.13.0", "pkg:generic/python@3.11.7"} <= {entry.get("purl") for entry in bill["components"]}


def staged(archive: Path) -> Path:
    """The four files that are signed, in a folder."""
    folder = archive.parent / "staged"
    folder.mkdir()
    for path in sign.files(archive)[:-1]:
        shutil.copyfile(path, folder / path.name)
    return folder


def check(folder: Path, archive: Path, key: Path) -> None:
    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key)
    config.set_hashing_config(sign.hashing_config()).verify(folder, sign.files(archive)[-1])


def test_the_signature_holds(signed: Path, tmp_path: Path) -> None:
    check(staged(signed), signed, tmp_path / "key.pub")


FILES = ("small.mar", "small.mar.sha256", "small.cdx.json", "small.manifest.json")
CHANGES: dict[str, Callable[[Path], object]] = {
    **{f"flip {name}": lambda folder, name=name: flip(folder / name) for name in FILES},
    **{f"remove {name}": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    **{f"rename {name}": lambda folder, name=name: (folder / name).rename(folder / f"x{name}") for name in FILES},
    "add": lambda folder: (folder / "more").touch(),
    "add .git": lambda folder: ((folder / ".git").mkdir(), (folder / ".git" / "x").touch()),
    "add .gitignore": lambda folder: (folder / ".gitignore").touch(),
    "symlink": lambda folder: (folder / "link").symlink_to(folder / "small.mar"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_breaks_the_signature(signed: Path, tmp_path: Path, change: str) -> None:
    folder = staged(signed)
    CHANGES[change](folder)
    with pytest.raises(ValueError):  # noqa: PT011 - the library words it in several ways
        check(folder, signed, tmp_path / "key.pub")


def test_another_key_does_not_fit(signed: Path, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other.pem", *P256).with_suffix(".pub")
    with pytest.raises(ValueError, match="Key mismatch"):
        check(staged(signed), signed, other)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("ed25519", "not an elliptic"), ("public", "a public key"), ("text", "no private key"), ("none", "read")],
)
def test_wrong_key_files(tmp_path: Path, kind: str, words: str) -> None:
    key = tmp_path / "key.pem"
    match kind:
        case "ed25519":
            make_key(key, "ed25519")
        case "public":
            key = make_key(key, *P256).with_suffix(".pub")
        case "text":
            key.write_text("hello")
    with pytest.raises(UserError, match=words):
        sign.check_private_key(key)


LINK = zipfile.ZipInfo("link.json")
LINK.external_attr = 0o120777 << 16
PACKED = zipfile.ZipInfo("zeros.json")
PACKED.compress_type = zipfile.ZIP_DEFLATED


@pytest.mark.parametrize(
    ("member", "words"),
    [
        *((name, "has a path") for name in ("../x", "/x", "a/../x", "a\\x", ".git/config", "a//x", "folder/")),
        ("GOLDEN.jsonl", "twice"),
        (LINK, "is a link"),
        (PACKED, "is compressed"),
    ],
)
def test_members_that_are_not_served(tmp_path: Path, member: str | zipfile.ZipInfo, words: str) -> None:
    archive = tmp_path / "small.mar"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("MAR-INF/MANIFEST.json", "model-config.yaml", "golden.jsonl"):
            file.writestr(name, "{}")
    sign.write_checksum(archive)
    assert verify("small", archive).path == archive
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(member, "0" * 100_000)
    sign.write_checksum(archive)
    with pytest.raises(ArchiveError, match=words):
        verify("small", archive)
