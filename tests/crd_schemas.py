"""Writes crd_schemas.json: of the schemas of other projects' resources, the fields that our manifests use.

python tests/crd_schemas.py NAME@VERSION=CRD.yaml … -- MANIFEST.yaml …

The CRDs themselves are large (2 MB for one of KServe's). A field that is in no manifest yet is refused by the tests
until this has been run anew; so is one that is misspelt.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).with_suffix(".json")
# What says which values a field takes; texts for people are left out.
_KEPT = ("type", "enum", "format", "pattern", "minimum", "maximum", "minLength", "maxLength", "anyOf", "required")


def prune(schema: dict[str, Any], values: Sequence[Any]) -> dict[str, Any]:
    """The part of a schema that is about these values; it refuses all other fields."""
    kept = {key: schema[key] for key in _KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept = {"type": ["integer", "string"]}
    mappings = [value for value in values if isinstance(value, dict)]
    if "properties" in schema:
        used = sorted({name for value in mappings for name in value} & schema["properties"].keys())
        kept["properties"] = {
            name: prune(schema["properties"][name], [value[name] for value in mappings if name in value])
            for name in used
        }
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = prune(
            schema["additionalProperties"], [entry for value in mappings for entry in value.values()]
        )
    if "items" in schema:
        entries = [entry for value in values if isinstance(value, list) for entry in value]
        kept["items"] = prune(schema["items"], entries)
    return kept


def main(arguments: Sequence[str]) -> None:
    separator = arguments.index("--")
    objects = [
        value
        for path in arguments[separator + 1 :]
        for value in yaml.safe_load_all(Path(path).read_text(encoding="utf-8"))
    ]
    schemas = {}
    for argument in arguments[:separator]:
        source, _, path = argument.partition("=")
        crd = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["spec"]
        for version in crd["versions"]:
            name = f"{crd['group']}/{version['name']}/{crd['names']['kind']}"
            own = [value for value in objects if f"{value['apiVersion']}/{value['kind']}" == name]
            if own:
                schema = version["schema"]["openAPIV3Schema"]
                # A CRD leaves metadata to the API server.
                schema["properties"]["metadata"] = {"type": "object"}
                schemas[name] = {"from": source, "licence": "Apache-2.0", "schema": prune(schema, own)}
    OUT.write_text(json.dumps(schemas, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
