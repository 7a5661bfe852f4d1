"""Devices that run an exported file: for now 64-bit ARM processors, emulated.

A device needs few things: to be set up, to run a program on files that both sides see, and to say what it is. The
session of a device (`arm64/session.py`) is made of those; one comparison (`validate/devices.py`) serves any session.
"""
