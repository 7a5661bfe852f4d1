"""Devices that run an exported file, and the one session that serves them all.

transport         what a device offers: facts, folder, push, run, pull
host, ssh, adb    devices with a shell (remote.py), and arm64/: emulated ARM cores
names, open       a device by its name
runners/          what runs there: C++ for .pte and .onnx, Python for .onnx
build, kit        a runner for a device, compiled once and kept in the cache
program, session  an exported file there: logits, losses, linears, kernels
bench, listing    how fast it is; what there is and what is missing
"""
