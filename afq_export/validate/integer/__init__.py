"""What a target's integer kernels compute, bit for bit: one module per family of kernels.

Shape letters: T tokens (all leading dimensions of the input), I input features, O output features, G groups along I.
"""
