"""Zero-shot accuracy of the exported artifact: lm-eval asks and scores, the bundle's runtime answers."""
