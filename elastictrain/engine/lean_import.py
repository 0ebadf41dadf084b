"""DeepSpeed and torch's optimizers without what they bring along for nobody here.

DeepSpeed's autotuner imports MLflow, its Muon has torch.compile at work while it is imported, and an optimizer's first
calls import torch's compiler, to be left alone by it. A worker uses none of that, unless it compiles its model's blocks
(`compiled`), and then the compiler is imported as usual. Saves half of the 5 s of processor time that a worker takes to
start, and 150 MB of its memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import unwrap
from typing import Any

import torch
from torch.optim import Adam, Optimizer

from elastictrain.uncollected import uncollected
from elastictrain.untracked import refuse_telemetry

_LEFT_ALONE = (Optimizer.add_param_group, Optimizer.load_state_dict, Optimizer.state_dict)
_MARK = "__dynamo_disable"
"""Where torch keeps what it calls instead of a function that its compiler is to leave alone."""


@cache
def import_deepspeed() -> None:
    """Import what every engine needs of it; at once when that was done before."""
    refuse_telemetry()
    with uncollected(), _without("mlflow"), _nothing_compiled():
        import deepspeed.runtime.zero.muon.original_muon
        import deepspeed.runtime.zero.utils  # noqa: F401 - for what it imports
    if "torch._dynamo" not in sys.modules:
        for method in _LEFT_ALONE:
            function = getattr(method, "__wrapped__", None)
            if function is not None and not hasattr(function, _MARK):
                setattr(function, _MARK, function)
        Adam.step = _steps(unwrap(Adam.step))  # type: ignore[method-assign]  # on purpose


def _steps(plainly: Callable[..., Any]) -> Callable[..., Any]:
    """As torch wraps an optimizer's step, but for a word to its compiler before and after, which imports it."""

    def step(self: Optimizer, closure: Callable[[], float] | None = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plainly(self, closure)

    return step


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Importing this package fails meanwhile, unless it has been imported."""
    missing = name not in sys.modules
    if missing:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python takes for "not there"
    try:
        yield
    finally:
        if missing:
            del sys.modules[name]


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """torch.compile gives back what it is given meanwhile."""

    def as_it_is(function: Any = None, **_: Any) -> Callable[..., Any]:
        return (lambda other: other) if function is None else function

    compile, torch.compile = torch.compile, as_it_is  # type: ignore[assignment]  # it has overloads
    try:
        yield
    finally:
        torch.compile = compile
