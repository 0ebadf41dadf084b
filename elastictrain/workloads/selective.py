"""Selective activation checkpointing: what costs a matrix product is kept, what is cheap is made again.

The idea is that of Korthikanti et al. 2022 (arXiv:2205.05198, section 5). Cheap is what lies between the products:
norms, SwiGLU's gating, the copy that puts attention's heads side by side. Autograd would keep their results for the
products that read them; within `selectively` it keeps how to make them, and their inputs, which are there anyway.

    selectively(block, stream)
        normed = cheap(norm, stream)
        y = linear(normed)                  keeps the recipe of `normed`, not `normed`

No matrix product, attention or collective is done twice, and no random number is drawn again (dropout's masks are
kept), so losses and gradients are those of a plain pass, bit for bit.

torch's own way is a policy over operators (`create_selective_checkpoint_contexts`). In a compiled block it costs
nothing, so there it is used. Else it runs in Python at each operator, twice, and repeats collectives: on a small model
it took 1.1 of the time of full recomputation, where `cheap` took 0.8. So it is for models whose code is not ours
(`products_kept`).

Cost: a Python call for each tensor that autograd keeps; in the backward pass norms and gatings are made twice, once
for the products that read them and once for their own gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

T = TypeVar("T")

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
_within = threading.local()


def selectively(function: Callable[..., T], *inputs: Tensor) -> T:
    """`function(*inputs)`, which keeps no result of `cheap` for the backward pass."""
    if torch.compiler.is_compiling():
        found: T = checkpoint(function, *inputs, use_reentrant=False, context_fn=products_kept)
        return found
    recipes = _Recipes()
    with torch.autograd.graph.saved_tensors_hooks(recipes.kept_of, _made_again):
        _within.recipes = recipes
        try:
            return function(*inputs)
        finally:
            _within.recipes = None


def cheap(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, a new tensor that may be made again in the backward pass; it draws no random numbers."""
    recipes = None if torch.compiler.is_compiling() else getattr(_within, "recipes", None)
    return function(*inputs) if recipes is None else recipes.make(function, inputs)


def products_kept() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """torch's contexts for a forward pass and its repetition that does no matrix product and no attention again."""
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]  # torch's
    return contexts


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in _KEPT and not _drops(operator, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _drops(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it draws random numbers: left out in the repetition, it would leave its own to those that follow."""
    told = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
    return bool(told.get("dropout_p"))


class _Recipes:
    """Of what one pass has made cheaply, by the storage that it lies in."""

    def __init__(self) -> None:
        self._by_storage: dict[int, tuple[StorageWeakRef, _Recipe]] = {}

    def make(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """A result whose own gradient, too, keeps no more than the inputs."""
        made: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        storage = made.untyped_storage()
        recipe = _Recipe(function, tuple(x.detach() for x in inputs))
        # as long as a weak reference is there, no other storage has this address
        self._by_storage[storage._cdata] = StorageWeakRef(storage), recipe  # type: ignore[no-untyped-call]  # torch's
        return made

    def kept_of(self, tensor: Tensor) -> Tensor | _Kept:
        """What is kept of a tensor that an operator wants in its backward pass."""
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        return tensor if found is None else found[1].view_like(tensor)


class _Recipe:
    """How to make a tensor again: once, for all who want it."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._function, self._inputs = function, inputs
        self._num_wanted = 0
        self._made: Tensor | None = None

    def view_like(self, tensor: Tensor) -> _Kept:
        """This tensor, which is a view of what the recipe makes."""
        self._num_wanted += 1
        return _Kept(self, tensor.size(), tensor.stride(), tensor.storage_offset())

    def take(self) -> Tensor:
        """Whole, and forgotten when all who want it have it."""
        made = self._made
        if made is None:
            with torch.no_grad():
                made = self._function(*self._inputs)
        self._num_wanted -= 1
        self._made = made if self._num_wanted > 0 else None
        return made


class _Kept(NamedTuple):
    """A view of what a recipe makes."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _made_again(kept: Tensor | _Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.recipe.take().as_strided(kept.size, kept.stride, kept.offset)
