"""One thread for all tests: the models are tiny, and results do not depend on how many cores a machine has.

Set before torch is imported, so that processes that tests start take it over.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
