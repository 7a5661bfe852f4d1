"""ValidationReport -> pages: report.md, the model card, the lines that `run` prints. One set of tables for all."""
