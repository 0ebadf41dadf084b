"""Parallel layouts (pure): which are legal for a world size, and the arithmetic when none is."""
