"""`python -m afq_export`."""

from afq_export.cli import main

main()
