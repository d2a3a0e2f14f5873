"""Compiled code kept from run to run in one portable file, so that a run starts in seconds instead of minutes.

`key` says what decides the code, `pack` is the file, `compile_cache` is what a run opens.
"""
