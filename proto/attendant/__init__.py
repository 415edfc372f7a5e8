"""Attendant's contracts and thin client: all that a caller needs, and all that export and service share."""
