"""Recipes: each turns a configuration into a trained checkpoint. `python -m models train NAME` runs one."""
