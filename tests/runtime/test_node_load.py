"""The load of this machine, as the kernel tells it."""

from __future__ import annotations

import time

import psutil

from elastictrain.runtime.node_load import LoadMeter


def test_a_busy_processor_shows_and_memory_is_what_the_kernel_says() -> None:
    meter = LoadMeter()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    load = meter.look("here")
    assert load.node == "here"
    assert 0 < load.cpu_share <= 1
    assert load.memory_bytes == psutil.virtual_memory().total
    assert 0 < load.memory_used_bytes < load.memory_bytes


def test_looking_twice_at_once_is_no_load_and_no_error() -> None:
    meter = LoadMeter()
    for _ in range(100):
        assert 0 <= meter.look("here").cpu_share <= 1
