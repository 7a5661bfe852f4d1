"""Lowering to Qualcomm's HTP: two static ONNX graphs without a float tensor, and the contexts compiled from them.

    parts, linears     what a block is made of, as nodes; `arch.static` names every tensor on the way
    decoder            the float graph of prefill or decode, written by the families' own functions
    grids              ... and every tensor of it put on its grid
    program            both graphs, the host's tables, the contexts: all files of a bundle
    readback           which integers are really in a graph, compared with the checkpoint
    probe, show        linears alone, and every operator of a graph, in the simulator

Graph and operands are those of lower/onnx; only what quantized tensors look like is Qualcomm's own.
"""
