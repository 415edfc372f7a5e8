"""Readers of pretrained models: each translates a foreign format once, here, and refuses what it does not know."""
