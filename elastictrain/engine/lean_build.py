"""`deepspeed.initialize` without what it does for nobody here.

    descriptions  ZeRO 3 writes one of all its arguments, with the values of all weights, and throws it away: 40 ms for
                  0.9 million parameters, 0.6 s for 110 million
    a collection  ZeRO 3 has Python look for garbage before it lays the weights out: 10 ms; the last engine's memory has
                  been freed by hand (`release`)
    a broadcast   of all weights from rank 0: they are about to be overwritten where a state is loaded next. Where none
                  is, it stays: a model of the user's own might not come out alike on all ranks

What does that is replaced in DeepSpeed's modules and torch's, and put back when the engine is built; a process builds
one at a time. Cost: microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from elastictrain.engine.lean_import import import_deepspeed


@contextmanager
def lean_build(loads_next: bool) -> Iterator[None]:
    """DeepSpeed builds engines so meanwhile; `loads_next`: a state is loaded before the engine takes a step."""
    import_deepspeed()
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import utils
    from deepspeed.runtime.zero.partition_parameters import Init

    with ExitStack() as replaced:
        enter = replaced.enter_context
        enter(_replaced(nn.Parameter, "__repr__", object.__repr__))
        enter(_replaced(utils, "gc", _NoGarbage))
        if loads_next:
            enter(_replaced(DeepSpeedEngine, "_broadcast_model", lambda self: None))
            enter(_replaced(Init, "_zero_init_param", _partition))
        yield


class _NoGarbage:
    @staticmethod
    def collect() -> int:
        return 0


def _partition(init: Any, parameter: Tensor) -> None:
    """What `Init._zero_init_param` does, but for its broadcast."""
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()  # type: ignore[attr-defined]  # DeepSpeed's, by now


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
