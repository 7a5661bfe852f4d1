"""Lowering to one ExecuTorch program for Cortex-M: linears as CMSIS-NN's int8 kernels, portable operators between.

module      the decoder in torch, with ExecuTorch's cortex_m operators; runs here by their reference implementation
program     exported, with its memory planned
readback    the integers of a finished program, compared with the checkpoint
probe       linears alone, and the whole decoder, computed here
"""
