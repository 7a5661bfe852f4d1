"""Lowering to OpenVINO's own format (openvino_model.xml and .bin), written with its Python interface.

    graph                 the graph that the ONNX lowering's writers fill, in OpenVINO's operators
    linears, decoder      quantized linears, norms, rotation, attention with the cache as the program's state
    program, readback     the whole model, saved, read back and compared
    probe, float_parts    single linears, and single float operators, in the runtime

What the decoder is made of comes from the ONNX lowering (token rows, mask, positions, the families' functions): one
description, two formats. OpenVINO's reader of our ONNX files was tried first: it reads their linears right, but gave
other logits for a file with int4 token rows, and its programs have no state.
"""
