"""Putting DeepSpeed's module globals back, so that a process can build engine after engine.

DeepSpeed expects one engine a process. What it leaves behind in modules would make the next build fail or keep the
last engine alive (29 MB, 4 sockets and 6 threads a round for ZeRO 3). Each line says which. Cost: below 1 ms.
"""

from __future__ import annotations


def forget_group() -> None:
    """Drop DeepSpeed's references to a process group that has been destroyed."""
    import deepspeed
    import deepspeed.comm.comm as comm
    from deepspeed.utils import groups

    # Clones of the destroyed world group, which the next engine would use ("Group ... is not registered").
    groups._release_process_group_references(None)
    # The communication backend, which init_distributed keeps when it finds one.
    comm.cdb = None
    # deepspeed.initialize leaves its communication module here, and takes it for a sign of an earlier set-up.
    deepspeed.dist = None


def forget_engine() -> None:
    """Drop what DeepSpeed keeps of an engine that has been destroyed."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    # ZeRO 3 numbers parameters per process, and lays out its traces and gradients by these numbers.
    Init.param_id = 0
    Init.num_persisted_parameters = 0
    Init.num_persisted_elements = 0
    Init.apply_param_persistence = False
    # A stack of modules in forward, to which each build adds the whole model for good.
    parameter_offload.FWD_MODULE_STACK.clear()
    # A mutable default argument that numbers modules per process.
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    # lru_caches in the closures of decorated methods: their keys hold every coordinator, and so every engine.
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
