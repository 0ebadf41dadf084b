"""What the planner knows of the machines: devices, memory, speeds, links (pure; frozen pydantic models).

A cluster file is the YAML of a `Cluster`; `clusters/hardware/` holds examples. Speeds are what the maker states, in one
direction and per device; what share of them is reached is `Efficiency`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["fp32", "bf16"]

ASSUMED_DRIVE_BYTES_PER_S = 2e9
"""Of drives whose speed nobody told, where offload to them is asked for."""
TIME_ERROR = 0.15
"""How far predicted seconds of a step were from measured ones at most; docs/plan.md says where."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Link(_Section):
    """A way between devices."""

    bytes_per_s: float = Field(gt=0)
    """Bytes a second that one device can send, while it receives as many."""
    latency_s: float = Field(default=0.0, ge=0)
    """Seconds until the first byte arrives."""


class Device(_Section):
    """One accelerator, or one worker's share of a host without any."""

    name: str
    """For people."""
    memory_bytes: int = Field(gt=0)
    """Memory that weights, gradients, optimizer state and activations can take."""
    flops: dict[Dtype, float]
    """Peak floating point operations a second of matrix products, without sparsity, by train.dtype."""
    memory_bytes_per_s: float = Field(gt=0)
    """Bandwidth of that memory: what elementwise work and optimizer updates run at."""
    reserved_bytes: int = Field(default=0, ge=0)
    """Memory that the process takes before its first tensor: the runtime's context, the collectives' own buffers."""
    fragmentation: float = Field(default=0.0, ge=0, lt=1)
    """Share of activations and buffers that the allocator loses between tensors."""


class Efficiency(_Section):
    """What no data sheet says: what share of stated speeds is reached, and what takes time whatever the size.

    The defaults are for data-centre GPUs; `benchmarks/plan_time.py` measures them for a machine.
    """

    matmul: float = Field(default=0.7, gt=0)
    """Share of the device's peak that matrix products reach."""
    memory: float = Field(default=0.8, gt=0)
    """Share of its memory bandwidth that elementwise work reaches."""
    network: float = Field(default=0.8, gt=0)
    """Share of the links' bandwidth that collectives reach."""
    overlap: float = Field(default=0.0, ge=0, le=1)
    """Share of data-parallel communication that hides behind computing."""
    micro_batch_s: float = Field(default=0.0, ge=0)
    """Fixed seconds of each micro-batch: launches, hooks, Python."""
    step_s: float = Field(default=0.0, ge=0)
    """Fixed seconds of each step."""
    gathered_layer_s: float = Field(default=0.0, ge=0)
    """Fixed seconds of each layer and micro-batch at ZeRO 3, whose hooks run around every module."""


class Cluster(_Section):
    """Equal nodes with equal devices."""

    name: str
    """For people."""
    num_nodes: int = Field(ge=1)
    """Nodes."""
    devices_per_node: int = Field(ge=1)
    """Devices of each node: workers that it has room for."""
    device: Device
    """Each of them."""
    within_node: Link
    """Between devices of a node (NVLink, shared memory)."""
    between_nodes: Link
    """Between nodes, as each device's share of its node's network."""
    host_link: Link
    """Between a device and its host's memory (PCIe)."""
    host_memory_bytes: int = Field(ge=0)
    """Memory of one node's host, for offloaded state; 0 where it is the devices' own."""
    host_memory_bytes_per_s: float = Field(gt=0)
    """Its bandwidth, shared by the node's devices: what an optimizer on the host runs at."""
    efficiency: Efficiency = Efficiency()
    """What of these speeds is reached."""
    nvme_bytes_per_s: float = Field(default=0.0, ge=0)
    """Reading speed of a node's NVMe drives together, shared by its devices; 0 means none."""
    time_error: float = Field(default=TIME_ERROR, ge=0)
    """How far off the seconds of a step may be that these speeds give: of two steps closer than that, neither is known
    to be the faster."""

    @property
    def one_memory(self) -> bool:
        """Whether the devices' memory is their host's: then offload to it makes no room."""
        return self.host_memory_bytes == 0

    @property
    def drive_bytes_per_s(self) -> float:
        """Reading speed of a node's drives, told or assumed."""
        return self.nvme_bytes_per_s or ASSUMED_DRIVE_BYTES_PER_S

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        return self.num_nodes * self.devices_per_node

    def link(self, span: int) -> Link:
        """The slowest link of a group whose ranks lie within `span` consecutive devices."""
        return self.within_node if span <= self.devices_per_node else self.between_nodes
