"""Putting DeepSpeed's module globals back, so that a process can build engine after engine.

DeepSpeed expects one engine a process. What it leaves in its modules would make the next build fail, make a process
that has built before disagree with one that has not, or keep the last engine's objects alive. Each line says which, and
the tests fail without it. Cost: below 1 ms.
"""

from __future__ import annotations


def forget_group() -> None:
    """Drop DeepSpeed's references to a process group that has been destroyed."""
    from deepspeed.utils import groups

    # Its clone of the world group, which the next engine would use: "Group ... is not registered".
    groups._release_process_group_references(None)


def forget_engine() -> None:
    """Drop what DeepSpeed keeps of an engine that has been destroyed."""
    from deepspeed.runtime.pipe import p2p
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    # ZeRO 3 numbers parameters and modules per process (the latter in a mutable default argument), and ranks compare
    # their numbers: one that has built an engine before would not match one that has not.
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    # A stack of modules in forward, at whose bottom each build leaves its whole model.
    FWD_MODULE_STACK.clear()
    # The last pipeline's grid, and with it its groups.
    p2p._grid = None
    # lru_caches in the closures of decorated methods: their keys hold coordinators and modules.
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
