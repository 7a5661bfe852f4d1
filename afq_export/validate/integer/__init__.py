"""What a target's integer kernels compute, bit for bit: one module per runtime, linear.py to choose, dot.py for both.

Shape letters: T tokens (all leading dimensions of the input), I input features, O output features, G groups along I.
"""
