"""64-bit ARM processors under qemu's user emulation: real ARM kernels of the runtimes, on any Debian machine.

What runs is the runtimes' own aarch64 code, on processors that qemu names: which kernel family is chosen, and every
bit that it computes, are a phone's. Speed, memory, temperature and what is no CPU are not.
"""
