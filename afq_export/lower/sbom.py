"""sbom.cdx.json: what a bundle contains and what made it, in CycloneDX 1.6 (https://cyclonedx.org/specification)."""

from __future__ import annotations

import datetime
import re
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.spdx import fixup_id, is_expression

from afq_export.spec.report import ManifestModel

SBOM = "sbom.cdx.json"
EPOCH = datetime.datetime.fromtimestamp(0, datetime.UTC)
"""The same inputs give the same bytes: the time of a bundle is not in it."""


def sbom(model: ManifestModel, quantized: str, versions: Mapping[str, str]) -> str:
    """The document. `quantized`: sha256 of the quantized checkpoint; `versions`: packages that made the bundle."""
    bundle = Component(
        name=model.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="bundle",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=quantized)],
        properties=[Property(name="afq-export:hash-of", value="quant.json, which names that of every tensor file")],
        licenses=_licences(model.origin.licence),
    )
    source = Component(
        name=model.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="source-model",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=model.digest)],
        licenses=_licences(model.origin.licence),
        description=f"base model: {model.origin.base_model}" if model.origin.base_model else None,
    )
    tools = [
        Component(
            name=name, version=number, type=ComponentType.LIBRARY, bom_ref=f"made-with:{name}", licenses=_package(name)
        )
        for name, number in versions.items()
        if number != "not installed"
    ]
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"afq-export:{quantized}"))
    bom.metadata.timestamp, bom.metadata.component = EPOCH, bundle
    bom.components.update([source, *tools])
    bom.register_dependency(bundle, [source, *tools])
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def _package(name: str) -> list[DisjunctiveLicense | LicenseExpression]:
    """What an installed package says of its licence."""
    try:
        facts = metadata(name)
    except PackageNotFoundError:
        return []
    classified = [line.split(" :: ")[-1] for line in facts.get_all("Classifier", []) if line.startswith("License ::")]
    return _licences(facts.get("License-Expression") or facts.get("License") or ", ".join(classified))


def _licences(text: str) -> list[DisjunctiveLicense | LicenseExpression]:
    """An SPDX id or expression where `text` is one, else its first line as a name."""
    line = re.sub(r"\s+", " ", text.strip().splitlines()[0])[:200] if text.strip() else ""
    if not line:
        return []
    known = fixup_id(line)
    if known:
        return [DisjunctiveLicense(id=known)]
    return [LicenseExpression(line)] if is_expression(line) else [DisjunctiveLicense(name=line)]
