"""The command line: which commands there are, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import locale
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from afq_export import __version__, terminal
from afq_export.commands import (
    baseline,
    calibrate,
    check,
    device,
    doctor,
    evaluate,
    generate,
    inspect,
    lower,
    perplexity,
    plan,
    quantize,
    recipes,
    report,
    run,
    sensitivity,
    targets,
    validate,
)
from afq_export.errors import AfqError, InputError

STOPPED = "stopped"
GOES_ON = "; the same command continues where it stopped"
GOES_ON_WITHOUT = "; without --fresh the same command continues where it stopped"
STAGES = ("run", "calibrate", "quantize", "lower")
INTERNAL, INTERRUPTED, TERMINATED = 70, 130, 143
"""Exit codes: a bug (sysexits.h EX_SOFTWARE), Ctrl-C, SIGTERM."""

app = typer.Typer(
    name="afq-export",
    help="AffineQuant to true-integer programs for phones, with the proof that what ships is what was measured.",
    epilog="Exit codes: 0 done, 1 a check failed, 2 wrong input, 3 a tool is missing, 70 a bug, 130 stopped.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for module, panel in (
    (run, "From a model to a bundle"),
    (plan, "From a model to a bundle"),
    (sensitivity, "From a model to a bundle"),
    (calibrate, "The stages alone"),
    (quantize, "The stages alone"),
    (lower, "The stages alone"),
    (validate, "The stages alone"),
    (perplexity, "What comes out"),
    (generate, "What comes out"),
    (check, "What comes out"),
    (report, "What comes out"),
    (evaluate, "What comes out"),
    (inspect, "What there is"),
):
    app.command(module.__name__.rpartition(".")[2], rich_help_panel=panel)(module.command)
app.add_typer(baseline.app, rich_help_panel="What comes out")
app.add_typer(device.app, rich_help_panel="What comes out")
app.add_typer(targets.app, rich_help_panel="What there is")
app.add_typer(recipes.app, rich_help_panel="What there is")
app.command("doctor", rich_help_panel="What there is")(doctor.command)


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda given: _print_version(given), help="Version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks, and what libraries say; may stand last.")] = False,
) -> None:
    pass


def main() -> NoReturn:
    """The program's entry point."""
    if locale.getencoding().lower().replace("-", "") != "utf8" and not sys.flags.utf8_mode:
        # torch and others read files of their own in the locale's encoding, which UTF-8 mode overrules.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", "afq_export", *sys.argv[1:]])
    signal.signal(signal.SIGTERM, _terminate)
    if "--debug" not in sys.argv:
        terminal.quieten()
    sys.exit(call(sys.argv[1:]))


def call(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; all errors are printed.

    `--debug` may stand anywhere, so that it can be added to the line that failed. Without arguments: the help.
    """
    debug, as_json = "--debug" in arguments, "--json" in arguments
    given = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        code = app(given, prog_name="afq-export", standalone_mode=False) or 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Terminated:
        return _fail(_stopped(given), {"what": STOPPED}, TERMINATED, as_json)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error, as_json)
    return _fail(_stopped(given), {"what": STOPPED}, INTERRUPTED, as_json) if code == INTERRUPTED else code


def _stopped(arguments: Sequence[str]) -> str:
    """The line for a command that was stopped, with what to do where something is kept."""
    if arguments[0] not in STAGES:
        return STOPPED
    return STOPPED + (GOES_ON_WITHOUT if "--fresh" in arguments else GOES_ON)


class Terminated(BaseException):
    """SIGTERM, as an exception: what is half-written is removed on the way out."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def _report(error: Exception, as_json: bool) -> int:
    """Prints one line for `error` and returns its exit code."""
    known = _known(error)
    if known is None:
        text = " ".join(str(error).split()) or "no message"
        line = f"internal error: {type(error).__name__}: {text} (run with --debug for the traceback)"
        return _fail(line, {"what": "internal error", "why": f"{type(error).__name__}: {text}"}, INTERNAL, as_json)
    parts = {"what": known.what, "where": known.where, "why": known.why, "do": known.do}
    return _fail(f"error: {known}", parts, known.exit_code, as_json)


def _known(error: Exception) -> AfqError | None:
    """`error` as one that the user can act on, None when it is a bug."""
    if isinstance(error, AfqError):
        return error
    if isinstance(error, typer.BadParameter.__bases__[0]):  # every usage error of the parser
        path = error.ctx.command_path if error.ctx else "afq-export"
        return InputError(error.format_message().rstrip("."), do=f"see {path} --help")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return InputError("out of memory", do="`afq-export plan` estimates what a run takes; use fewer samples.windows")
    if "No space left on device" in str(error):  # safetensors and torch wrap the OSError in types of their own
        return InputError("the disk is full", do="free space and run the same command again")
    if isinstance(error, OSError) and error.errno is not None:
        code = errno.errorcode.get(error.errno, "")
        return InputError("cannot read or write", where=str(error.filename or code), why=error.strerror or str(error))
    return None


def _fail(line: str, parts: dict[str, Any], code: int, as_json: bool) -> int:
    terminal.note(line)
    if as_json:
        given = {key: value for key, value in parts.items() if value}
        with contextlib.suppress(OSError):
            terminal.emit("", {"error": given | {"exit_code": code}}, as_json=True)
    return code


def _print_version(given: bool) -> None:
    if given:
        print(f"afq-export {__version__}")
        raise typer.Exit
