"""A bundle on devices, without climbing the ladder: for `device check`, and the same file timed, for `device bench`."""

from __future__ import annotations

from pathlib import Path

from afq_export.backends import backend
from afq_export.device import bench
from afq_export.device.names import DeviceRequest
from afq_export.device.open import open_device
from afq_export.device.program import program_of
from afq_export.device.session import Limits, open_session
from afq_export.errors import InputError
from afq_export.job import DEMO_EVALUATION, open_corpus, window_length
from afq_export.load.corpus import cut_windows
from afq_export.load.tokenizer import load_folder_tokenizer, tokenizer_digest
from afq_export.lower.bundle import Bundle, open_bundle
from afq_export.paths import bundle_folder
from afq_export.progress import Progress, silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint, open_checkpoint
from afq_export.runfolder import RunFolder
from afq_export.spec.catalog import load_target
from afq_export.spec.device import Bench, DeviceCheck
from afq_export.validate.devices import TRACED, check_bundle, open_devices
from afq_export.validate.ladder import protocol_of


def check_on_devices(path: str, text: str | None, on: DeviceRequest, progress: Progress = silent) -> DeviceCheck:
    """The bundle at `path`, or that of a run folder, on `on.windows` windows of a corpus, on every device.

    Raises InputError for a bundle or corpus that cannot be used, MissingToolError when a device is not there.
    """
    devices = open_devices(on.devices)
    bundle = open_bundle(bundle_folder(Path(path)), reports=False)
    target = load_target(str(bundle.folder / "target.toml"))
    tokenizer = load_folder_tokenizer(bundle.folder)
    length = window_length(on.window, target.shapes.context)
    if length <= TRACED:
        raise InputError("windows on devices are too short", where=f"--window {length}", why=f"at least {TRACED + 1}")
    corpus = open_corpus(text or DEMO_EVALUATION)
    windows = cut_windows(corpus, tokenizer, tokenizer_digest(tokenizer), length, on.windows)
    checkpoint = checkpoint_of(bundle)
    found = check_bundle(bundle, target, checkpoint, on, devices, windows.ids_NT, progress)
    return DeviceCheck(
        verdict="fail" if any(check.status == "failed" for check in found.checks) else "pass",
        bundle=path,
        linears=checkpoint is not None,
        protocol=protocol_of(windows),
        checks=found.checks,
        devices=found.reports,
    )


def checkpoint_of(bundle: Bundle) -> QuantizedCheckpoint | None:
    """The quantized checkpoint of the run folder that the bundle lies in, None when it lies in none."""
    folder = RunFolder(bundle.folder.resolve().parent)
    if not (folder.quantized / "quant.json").is_file() or folder.bundle.resolve() != bundle.folder.resolve():
        return None
    return open_checkpoint(folder.quantized)


def bench_on_device(
    path: str, on: DeviceRequest, prompt: int, tokens: int, repetitions: int, progress: Progress = silent
) -> Bench:
    """The bundle at `path` timed on the one device of `on`. Raises as `check_on_devices` does."""
    device = open_device(on.devices[0])
    bundle = open_bundle(bundle_folder(Path(path)), reports=False)
    program = program_of(bundle, own_runner=on.runner is not None)
    here = backend(bundle.backend).open_session(bundle)
    limits = Limits(here.vocab, here.context, here.prefill)
    with open_session(device, program, limits, runner=on.runner, keep=on.keep, threads=on.threads) as session:
        speeds = bench.measure(session, prompt, tokens, repetitions, progress)
    facts = device.facts()
    return Bench(
        bundle=path,
        device=device.name,
        processor=facts.processor,
        runtime=f"{bundle.runtime} {speeds.version}".strip(),
        emulated=device.emulated,
        claim=bench.NO_CLAIM if device.emulated else "",
        model_bytes=bundle.model_bytes,
        threads=on.threads,
        prompt_tokens=prompt,
        tokens=tokens,
        repetitions=repetitions,
        load=speeds.load,
        prefill=speeds.prefill,
        decode=speeds.decode,
        memory=speeds.memory,
        folder=session.folder if on.keep else "",
    )
