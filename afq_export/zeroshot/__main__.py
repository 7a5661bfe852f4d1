"""lm-eval's own command line with bundles as the model `afq`: `python -m afq_export.zeroshot run --model afq ...`.

lm-eval finds models in its own package only, so somebody has to register ours before it looks.
"""

from __future__ import annotations

import sys

from afq_export.errors import AfqError
from afq_export.terminal import note
from afq_export.zeroshot.library import require_lm_eval


def main() -> int:
    """Runs lm-eval with this process' arguments. Returns the exit code."""
    try:
        require_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        from afq_export.zeroshot import model  # noqa: F401  (registers it)

        cli_evaluate()
    except AfqError as error:
        note(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
