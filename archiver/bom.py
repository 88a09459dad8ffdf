"""The bill of materials of an archive: a CycloneDX 1.6 ML-BOM, written beside it.

Plain JSON, because cyclonedx-python-lib has no `modelCard`. It has neither serial number nor time, and of the bundle's
provenance no command and no path: the same bundle gives the same bytes, and nobody's folders are told.
"""

import hashlib
import importlib.metadata
import json
import zipfile
from pathlib import Path
from typing import Any

import yaml
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.version import Version

from archiver import pack
from handler.digests import FILE_NAME, sha256
from training.errors import UserError

SUFFIX = ".cdx.json"
# What a worker and its server import, by backend.
_SERVING = {
    "openvino": ("numpy", "openvino", "tokenizers", "torchserve"),
    "torch": ("numpy", "safetensors", "tokenizers", "torch", "torchserve", "transformers"),
}


def render(bundle: Path, archive: Path) -> str:
    """The text of the bill of materials of an archive and the bundle it was built from.

    Raises UserError if the archive is not readable or a file of the bundle is broken.
    """
    model = pack.manifest(archive)["model"]
    with zipfile.ZipFile(archive) as file:
        handler = yaml.safe_load(file.read("model-config.yaml"))["handler"]
        # What a worker puts into every answer.
        digest = hashlib.sha256(file.read(FILE_NAME)).hexdigest()
    provenance = _read(bundle / "provenance.json")
    origin = provenance.get("base_model") or {}
    base, sets, packages = _base(origin), _data_sets(provenance), _packages(provenance, handler["backend"])
    component = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": model["modelName"],
        "version": model["modelVersion"],
        "hashes": _hashes(sha256(archive)),
        # Fine-tuned weights stay under the licence of those they started from.
        **_licences(origin.get("licence")),
        **({"pedigree": {"ancestors": base}} if base else {}),
        "modelCard": _model_card(bundle, handler["task"], [entry["bom-ref"] for entry in sets]),
        "properties": _properties(
            {
                "backend": handler["backend"],
                "precision": handler["precision"],
                "model-digest": digest,
                "trained-weights-sha256": provenance.get("weights_sha256"),
                "code-commit": (provenance.get("code") or {}).get("commit"),
                "code-sha256": (provenance.get("code") or {}).get("sha256"),
            }
        ),
    }
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": component},
        "components": [*sets, *packages],
        "dependencies": [{"ref": "model", "dependsOn": sorted(entry["bom-ref"] for entry in [*sets, *packages])}],
    }
    return json.dumps(bill, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _base(origin: dict[str, Any]) -> list[dict[str, Any]]:
    """The model that training started from, none if it is not known."""
    if not origin.get("name"):
        return []
    entry = {"type": "machine-learning-model", "bom-ref": "base-model", "name": origin["name"]}
    hashes = {"hashes": _hashes(origin["sha256"])} if origin.get("sha256") else {}
    return [{**entry, **hashes, **_licences(origin.get("licence"))}]


def _data_sets(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "type": "data",
            "bom-ref": f"data:{split}",
            "name": entry["file"],
            "hashes": _hashes(entry["sha256"]),
            "data": [{"type": "dataset", "name": split}],
        }
        for split, entry in sorted(provenance.get("data", {}).items())
    ]


def _packages(provenance: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    """What trained the model, as its provenance says, and what serves it, as installed here."""
    uses: dict[tuple[str, str], list[str]] = {}
    serving = {name: importlib.metadata.version(name) for name in _SERVING[backend]}
    for use, versions in (("serving", serving), ("training", provenance.get("versions", {}))):
        for name, version in versions.items():
            # A local label such as +cpu names one machine's wheel, not the release.
            uses.setdefault((name, Version(version).public), []).append(use)
    return [_package(name, version, roles) for (name, version), roles in sorted(uses.items())]


def _package(name: str, version: str, roles: list[str]) -> dict[str, Any]:
    # Python itself is not on PyPI.
    url = f"pkg:generic/python@{version}" if name == "python" else f"pkg:pypi/{name}@{version}"
    return {
        "type": "platform" if name == "python" else "library",
        "bom-ref": url,
        "purl": url,
        "name": name,
        "version": version,
        "properties": _properties({"used-for": ", ".join(roles)}),
    }


def _model_card(bundle: Path, task: str, sets: list[str]) -> dict[str, Any]:
    config, metrics = _read(bundle / "config.json"), _read(bundle / "metrics.json")
    parameters: dict[str, Any] = {"task": task, "datasets": [{"ref": ref} for ref in sets]}
    if config.get("model_type"):
        parameters["architectureFamily"] = config["model_type"]
    if config.get("architectures"):
        parameters["modelArchitecture"] = config["architectures"][0]
    measured = [
        {"type": name, "value": str(value), "slice": split}
        for split, scores in sorted(metrics.get("splits", {}).items())
        for name, value in sorted((scores or {}).items())
        if isinstance(value, int | float)
    ]
    return {"modelParameters": parameters, "quantitativeAnalysis": {"performanceMetrics": measured}}


def _licences(name: str | None) -> dict[str, Any]:
    """The field `licenses`: an SPDX expression where the name is one, as the hub writes it: in small letters."""
    if not name:
        return {}
    try:
        return {"licenses": [{"expression": canonicalize_license_expression(name)}]}
    except InvalidLicenseExpression:
        return {"licenses": [{"license": {"name": name}}]}


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _properties(values: dict[str, str | None]) -> list[dict[str, str]]:
    return [{"name": f"marble:{name}", "value": value} for name, value in sorted(values.items()) if value]


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the bundle, empty if there is no such file. Raises UserError if it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}); mend it, or train the model again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: it holds no JSON object; mend it, or train the model again")
    return value
