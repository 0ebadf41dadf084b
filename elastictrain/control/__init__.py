"""The supervisor as a pure state machine: what to do about what happened, without clock, I/O or Ray."""
