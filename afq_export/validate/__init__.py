"""What ships is what was measured: the ladder from the float model to the exported file in its real runtime.

    integer/      what the target's kernels compute, bit for bit
    rungs.py      the decoder on each rung: float, fake-quant, integer (with torch's or the runtime's float operators)
    evaluate.py   token losses, choices and divergences of all rungs on the same windows, block by block
    fold_check.py float against folded in float64
    layers.py     every linear alone in the real runtime against its integer model
    specification.py what an ONNX file means, apart from any kernel
    departures.py why the exported file and the integer reference choose differently at a token
    ladder.py     all of it -> ValidationReport

Shape letters: N windows, T tokens, D hidden, V vocabulary, I and O input and output features of a linear.
"""
