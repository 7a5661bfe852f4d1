"""The decoder as a TOSA-INT program: our integers in CONV2D and MATMUL, everything between them in integers too.

    graph.py        operators and tensors, in our own form; shapes and types are checked as they are appended
    scale.py        real factors as RESCALE's multiplier and shift
    parts.py        norm, softmax, rotation, nonlinearity: the integer algorithms
    operand.py      stand-in for a tensor, so that the families' own functions write the graph
    decoder.py      the whole decoder, and its inputs and outputs
    host.py         what the host looks up around a call
    file.py, read.py    TOSA flatbuffers, written and read back
    vela.py         the command stream for an Ethos-U, and Vela's estimates
    program.py      the .pte around it
    probe.py        linears alone

The same graph is executed by `validate/integer/tosa.py` (numpy) and by the TOSA reference model (`runtime/tosa.py`),
and compiled by Vela.
"""
