"""coremltools warns while it is imported, and here warnings are errors: it is imported first, in quiet."""

import pytest

from afq_export.errors import MissingToolError
from afq_export.runtime.library import load_coremltools

try:
    load_coremltools()
except MissingToolError as error:
    pytest.skip(str(error), allow_module_level=True)
