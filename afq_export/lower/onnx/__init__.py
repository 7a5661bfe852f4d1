"""Lowering to one generation-ready ONNX file with quantize and dequantize nodes, for ONNX Runtime.

    interface             inputs, outputs, axes: what optimum and onnxruntime-genai expect
    operand -> decoder    the families' own functions write the graph; linears.py writes the quantized ones
    program               the whole model, checked, saved, read back
    readback, coverage    what is really in the file, compared with the checkpoint
    probe, float_parts    single linears, and single float operators, in the runtime
    genai, vectors, ort_format    side files of the bundle

Every operator is in the standard ONNX domain, so that onnx.checker checks the whole file. Opset 23 is the first that
has what a decoder is made of as single operators: RMSNormalization, RotaryEmbedding and Attention.
"""
