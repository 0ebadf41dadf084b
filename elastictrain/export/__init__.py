"""Checkpoints in formats that others read."""
