"""Latency of a network's layers on a target, over their channel counts.

:mod:`.shapes` finds the layers, :mod:`.sampling` decides which counts to time, :mod:`.bench` times them, :mod:`.store`
keeps each time, :mod:`.multiple` reads the staircase, :mod:`.surface` interpolates, and :mod:`.measure` does it all and
returns a :class:`.table.LatencyTable`.
"""
