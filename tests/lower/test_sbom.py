"""The bill of materials is valid CycloneDX, the same for the same bundle, and names licences as SPDX does."""

from __future__ import annotations

import json

import pytest

from afq_export.lower.sbom import _licences, sbom
from afq_export.spec.report import ManifestModel, Origin

MODEL = ManifestModel("m", "a" * 64, Origin("apache-2.0", "owner/name"))
VERSIONS = {"torch": "2.13.0", "safetensors": "0.5", "gguf": "not installed"}


def test_what_is_in_it() -> None:
    text = sbom(MODEL, "b" * 64, VERSIONS)
    assert text == sbom(MODEL, "b" * 64, dict(reversed(VERSIONS.items())))
    found = json.loads(text)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    bundle = found["metadata"]["component"]
    assert bundle["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert bundle["hashes"] == [{"alg": "SHA-256", "content": "b" * 64}]
    parts = {part["name"]: part for part in found["components"]}
    assert set(parts) == {"m", "torch", "safetensors"}
    assert parts["m"]["hashes"][0]["content"] == "a" * 64 and "owner/name" in parts["m"]["description"]
    assert parts["torch"]["version"] == "2.13.0"
    assert parts["safetensors"]["licenses"]
    assert {d["ref"]: len(d.get("dependsOn", ())) for d in found["dependencies"]}["bundle"] == 3


def test_it_passes_the_schema() -> None:
    validation = pytest.importorskip("cyclonedx.validation.json", reason="cyclonedx[json-validation] is not installed")
    from cyclonedx.exception import MissingOptionalDependencyException
    from cyclonedx.schema import SchemaVersion

    try:
        problem = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom(MODEL, "b" * 64, VERSIONS))
    except MissingOptionalDependencyException:
        pytest.skip("cyclonedx[json-validation] is not installed")
    assert problem is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("apache-2.0", {"id": "Apache-2.0"}),
        ("llama3.2", {"name": "llama3.2"}),
        ("Some long text\nof a licence", {"name": "Some long text"}),
        ("Apache-2.0 OR MIT", {"value": "Apache-2.0 OR MIT"}),
    ],
)
def test_licences(text: str, kind: dict[str, str]) -> None:
    (found,) = _licences(text)
    assert {name: getattr(found, name) for name in kind} == kind
    assert _licences(" \n") == []
