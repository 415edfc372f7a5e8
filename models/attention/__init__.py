"""Attention mechanisms: pure functions, positions, and the modules that project around them.

Conventions, everywhere: batch first; boolean masks, True = attend; a query that may attend to nothing gets
exactly zero.
"""
