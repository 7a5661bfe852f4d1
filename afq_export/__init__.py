"""AffineQuant to true-integer programs for phones, with proof that what ships is what was measured."""

__version__ = "0.1.0"
