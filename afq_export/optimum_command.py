"""`optimum-cli export afq ...`: the same command line under Hugging Face Optimum's own.

The wheel puts this file into the namespace `optimum.commands.register`, where optimum-cli looks for subcommands.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class AfqExportCommand(BaseOptimumCLICommand):
    """Passes everything after `afq` on to `afq-export`; the exit code is its."""

    COMMAND = CommandInfo(name="afq", help="Quantize with AffineQuant and export to integer programs (afq-export).")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="a command of afq-export and its options")

    def run(self) -> None:
        from afq_export.cli import call

        sys.exit(call(self.args.arguments))


REGISTER_COMMANDS = [(AfqExportCommand, ExportCommand)]
"""What optimum-cli reads."""
