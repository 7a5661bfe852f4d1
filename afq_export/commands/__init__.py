"""One file per command. Each imports what it computes with inside its body: `--help` needs no torch."""
