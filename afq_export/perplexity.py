"""Perplexity of anything that gives logits, with the protocol that makes it comparable, and the comparison."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from afq_export.backends import backend
from afq_export.errors import InputError
from afq_export.job import DEMO, DEMO_EVALUATION, open_corpus, window_length
from afq_export.load.corpus import Windows, cut_windows
from afq_export.load.model import open_model
from afq_export.load.tokenizer import load_folder_tokenizer, open_tokenizer, tokenizer_digest
from afq_export.lower.bundle import open_bundle
from afq_export.paths import Kind, bundle_folder, kind_of
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import open_checkpoint
from afq_export.report.tables import Table
from afq_export.runfolder import RunFolder
from afq_export.spec.report import SCHEMA_VERSION, Perplexity, Protocol, read_report
from afq_export.spec.request import recorded_request
from afq_export.spec.strict import Data
from afq_export.validate.evaluate import measure_one
from afq_export.validate.ladder import protocol_of
from afq_export.validate.rungs import FloatRung, Rung, fake_quant_rung

if TYPE_CHECKING:
    from afq_export.runtime.session import Session

WINDOWS = 40
"""Windows when nothing is said, as in `run`."""


class Measured(Data, kw_only=True):
    """`perplexity --json`: the figure of one rung, and how it was measured."""

    schema_version: int = SCHEMA_VERSION
    name: str
    rung: str
    perplexity: Perplexity
    protocol: Protocol


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: `rung` names it on the ladder, `context` is the longest window it takes."""

    name: str
    rung: str
    model: Rung | Session
    tokenizer: Any
    context: int


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Figures by rung that a file holds, and their protocol."""

    figures: dict[str, Perplexity]
    protocol: Protocol


def open_subject(name: str, tokenizer: str | None = None) -> Subject:
    """A float model of any form, a bundle (or the run folder around it), or a quantized checkpoint.

    `tokenizer`: a folder that has one, for a checkpoint outside of its run folder. Raises InputError.
    """
    path = Path(name)
    kind = kind_of(path) if path.exists() else Kind.MODEL
    if kind is Kind.MODEL:
        model = open_model(name)
        return Subject(model.name, "float", FloatRung(model), open_tokenizer(model), model.config.max_positions)
    if kind is Kind.QUANTIZED:
        checkpoint = open_checkpoint(path)
        found = load_folder_tokenizer(Path(tokenizer)) if tokenizer else _tokenizer_beside(path)
        return Subject(name, "fake_quant", fake_quant_rung(checkpoint), found, checkpoint.config.max_positions)
    bundle = open_bundle(bundle_folder(path))
    session = backend(bundle.backend).open_session(bundle)
    return Subject(name, "runtime", session, load_folder_tokenizer(bundle.folder), session.context)


def windows_for(subject: Subject, text: str | None, window: int | None, count: int | None) -> Windows:
    """The evaluation windows of a corpus for `subject`. `count` None: 40, 0: all. Raises InputError."""
    length = window_length(window, subject.context)
    taken = {None: WINDOWS, 0: None}.get(count, count)
    corpus = open_corpus(text or DEMO_EVALUATION)
    return cut_windows(corpus, subject.tokenizer, tokenizer_digest(subject.tokenizer), length, taken)


def measure(subject: Subject, windows: Windows, progress: Progress) -> Measured:
    """The perplexity of `subject` on `windows`."""
    figure = measure_one(subject.model, windows.ids_NT, progress).perplexity
    return Measured(name=subject.name, rung=subject.rung, perplexity=figure, protocol=protocol_of(windows))


def read_earlier(path: Path) -> Earlier:
    """What `perplexity --json` or a report.json says. Raises InputError when the file is neither."""
    try:
        data = path.read_bytes()
        if "rung" in json.loads(data):
            measured = msgspec.json.decode(data, type=Measured)
            return Earlier({measured.rung: measured.perplexity}, measured.protocol)
        report = read_report(data)
    except OSError as error:
        raise InputError("cannot read the earlier figures", where=str(path), why=error.strerror or "") from error
    except (ValueError, TypeError) as error:  # msgspec's errors are ValueErrors
        raise InputError(
            "not figures of this program", where=str(path), why=str(error),
            do="give a report.json or what `perplexity --json` printed",
        ) from error  # fmt: skip
    return Earlier({rung: figure for rung, figure in report.perplexity.items() if figure}, report.protocol)


def refuse_other_protocol(earlier: Protocol, now: Protocol) -> None:
    """Raises InputError naming what differs; the corpus' name may, its text may not."""
    old, new = (msgspec.to_builtins(protocol) for protocol in (earlier, now))
    differing = [key for key in old if key != "corpus" and old[key] != new[key]]
    if differing:
        why = "; ".join(f"{key} was {_short(old[key])}, is {_short(new[key])}" for key in differing)
        raise InputError("perplexities of different protocols cannot be compared", why=why, do="measure both alike")


def comparison_table(measured: Measured, earlier: Earlier) -> Table:
    """The earlier figures and how far the new one is from each."""
    now = measured.perplexity.value
    rows = tuple(
        (rung, f"{figure.value:.4f}", f"{figure.stderr:.4f}", f"{now / figure.value - 1:+.3%}")
        for rung, figure in earlier.figures.items()
    )
    return Table(("earlier", "perplexity", "stderr", "now over it"), rows, frozenset({1, 2, 3}))


def _tokenizer_beside(checkpoint: Path) -> Any:
    """The tokenizer of the run that the checkpoint is of: from its bundle, else from its model."""
    folder = RunFolder(checkpoint.resolve().parent)
    if (folder.bundle / "tokenizer.json").is_file():
        return load_folder_tokenizer(folder.bundle)
    if not (folder.path / "run.json").is_file():
        raise InputError("no tokenizer", where=str(checkpoint), do="name a folder that has one with --tokenizer")
    request = recorded_request(folder.read().get("request", {}))
    return open_tokenizer(open_model(request.model or DEMO))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
