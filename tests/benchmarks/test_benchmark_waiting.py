"""The benchmark's model that stands for a device's work: it takes the device's time, and learns from real text."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from waiting import DEVICE_S

from elastictrain.config import TrainConfig
from elastictrain.runtime.home import settled
from elastictrain.workloads import build_workload

JOB = Path(__file__).parents[2] / "benchmarks" / "waiting.yaml"


def test_a_micro_batch_takes_as_long_as_the_device_would_and_can_be_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(JOB.parents[1])
    config = settled(TrainConfig.load(JOB))
    workload = build_workload(config, config.data.vocab_size)
    module = workload.build(seed=7)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    batch = {"tokens": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5]])}
    begun, losses = time.monotonic(), []
    for _ in range(4):
        loss = workload.loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert time.monotonic() - begun >= 4 * DEVICE_S
    assert losses[0] == pytest.approx(math.log(config.data.vocab_size), rel=0.1)
    assert losses[-1] < losses[0]
