"""What was measured, with what and where, and what of it is not as it was."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import msgspec

from afq_export.backends.onnxruntime import SESSION_FILE
from afq_export.backends.openvino import PROPERTIES
from afq_export.extras import PARTS
from afq_export.job import versions
from afq_export.lower.bundle import REPORTS, Bundle
from afq_export.machine import cpu_flags, cpu_name
from afq_export.runtime.onnxruntime import read_options_file
from afq_export.runtime.openvino import read_options
from afq_export.runtime.qnn import FILE as QNN_FILE
from afq_export.runtime.qnn import read_host_file
from afq_export.spec.baseline import Facts, Machine, Speed
from afq_export.spec.catalog import load_target
from afq_export.spec.guard import Difference
from afq_export.spec.report import Artifact, Perplexity

VECTORS = ("test_data_set_", "model.")
"""Files of a bundle that another program brings along: not worth a line each."""


def this_machine(threads: int) -> Machine:
    """Where this process runs."""
    return Machine(platform.machine(), cpu_name(), cpu_flags(), threads)


def facts_of(bundle: Bundle, perplexity: Perplexity, machine: Machine, speed: Speed | None, runtime: str = "") -> Facts:
    """Facts of a bundle that was just measured on `machine`; `runtime`: its version, where it is not this machine's."""
    manifest = bundle.manifest
    return Facts(
        model=manifest.model,
        recipe=manifest.recipe,
        target=manifest.target,
        runtime=bundle.runtime,
        artifact=Artifact(bundle.model_bytes, manifest.files[bundle.model.name], bundle.model.name),
        files={name: digest for name, digest in manifest.files.items() if name not in REPORTS},
        settings=_settings(bundle),
        versions=versions(load_target(str(bundle.folder / "target.toml")).tools)
        | ({bundle.runtime: runtime} if runtime else {}),
        machine=machine,
        perplexity=perplexity,
        speed=speed,
    )


def same_arithmetic(before: Facts, now: Facts) -> str:
    """Empty when the same program must give the same bits, else what may change them."""
    return ", ".join(f"{d.name} {d.was} is {d.now}" for d in _arithmetic(before, now))


def same_speed(before: Facts, now: Facts) -> str:
    """Empty when two speeds can be compared, else why not."""
    was, is_now = before.machine, now.machine
    if was.cpu != is_now.cpu:
        return f"measured on {was.cpu}, this is {is_now.cpu}"
    return f"measured with {was.threads} threads, now {is_now.threads}" if was.threads != is_now.threads else ""


def changed_settings(before: Facts, now: Facts) -> tuple[Difference, ...]:
    """Options of the runtime that are not as they were."""
    return tuple(_between("", before.settings, now.settings))


def differences(before: Facts, now: Facts) -> tuple[Difference, ...]:
    """Every fact that differs and may be a cause: of what the bundle is first, then of what ran it."""
    flat = [
        {"model": f"{f.model.name} {f.model.digest}", "recipe": f.recipe, "target": f.target, "runtime": f.runtime,
         "artifact": f.artifact.sha256}
        for f in (before, now)
    ]  # fmt: skip
    files = [{n: d for n, d in f.files.items() if not n.startswith(VECTORS)} for f in (before, now)]
    machine = [msgspec.to_builtins(f.machine) for f in (before, now)]
    return (
        *_between("", *flat),
        *_between("option ", before.settings, now.settings),
        *_between("file ", *files),
        *_between("version of ", before.versions, now.versions),
        *_between("machine ", *({key: _words(value) for key, value in m.items()} for m in machine)),
    )


def _arithmetic(before: Facts, now: Facts) -> Iterator[Difference]:
    """What decides the last bits of a runtime's float operators; a provider or a simulator is a package of its own."""
    own = {part.package for part in PARTS}
    runtime = [
        {f.runtime: f.versions.get(f.runtime, "")} | {name: f.versions[name] for name in own & f.versions.keys()}
        for f in (before, now)
    ]
    machine = [
        {"architecture": m.architecture, "flags": _words(m.flags), "threads": str(m.threads)}
        for m in (before.machine, now.machine)
    ]
    yield from _between("", *runtime)
    yield from _between("", *machine)


def _between(prefix: str, before: dict[str, str], now: dict[str, str]) -> Iterator[Difference]:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield Difference(prefix + name, before.get(name), now.get(name))


def _settings(bundle: Bundle) -> dict[str, str]:
    """The bundle's options of its runtime, flat; empty where the runtime takes none from it."""
    files, found = bundle.manifest.files, {}
    if SESSION_FILE in files:
        found = msgspec.to_builtins(read_options_file(bundle.folder / SESSION_FILE))
        found |= found.pop("config")
    elif PROPERTIES in files:
        options = read_options(bundle.folder / PROPERTIES)
        found = {"device": options.device, "prefill_length": options.prefill, **options.properties}
    elif QNN_FILE in files:
        host = read_host_file(bundle.folder)
        found = {"htp_arch": host.htp_arch, "soc_model": host.soc_model, **host.provider}
    return {key: _words(value) for key, value in found.items()}


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
