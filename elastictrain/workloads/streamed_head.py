"""The streamed loss (`head_loss`) for a causal language model of `transformers`, without a change of its own code.

Such a model calls its head last and returns what that gave. So its head is replaced by one with the same weight, under
the same name, that gives the mean loss in place of logits while it is told the next tokens. All else of a forward pass
is the model's own, and ZeRO 3 gathers the head's weight around the head as ever.

That is right only where the model does nothing to its logits. `has_plain_head` asks the model's own code: the model is
built without memory, what is below its head is replaced by a vector, and the head's very output must come out. A
soft cap, a scale or a bias of the head shows so, whatever a config calls it. Cost: some 50 ms, once for a workload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import MoEModelOutputWithPastAndCrossAttentions

from elastictrain.workloads.head_loss import streamed_cross_entropy


class StreamedHead(nn.Linear):
    """Vectors to logits; to the mean loss while the next tokens are told."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight
        self.next_tokens: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.next_tokens is None:
            return F.linear(x, self.weight)
        return streamed_cross_entropy(x, self.weight, self.next_tokens)


@contextmanager
def next_tokens_told(module: nn.Module, ids: Tensor) -> Iterator[None]:
    """Have the module's head give the mean loss of these [batch, seq] until the block ends."""
    head = next(part for part in module.modules() if isinstance(part, StreamedHead))
    head.next_tokens = ids
    try:
        yield
    finally:
        head.next_tokens = None


def has_plain_head(build: Callable[[], Any]) -> bool:
    """Whether the model that `build` makes returns what a head without a bias gives, and nothing else."""
    try:
        with torch.device("meta"):
            return _returns_what_its_head_gives(build())
    except Exception:  # noqa: BLE001 - a model's own code, which may want more than a vector: then it keeps its loss
        return False


def _returns_what_its_head_gives(model: Any) -> bool:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    below = MoEModelOutputWithPastAndCrossAttentions(last_hidden_state=torch.zeros(1, 1, head.in_features))
    model.get_decoder().forward = lambda *_inputs, **_options: below
    gave: list[Tensor] = []
    head.register_forward_hook(lambda _head, _inputs, output: gave.append(output))
    logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits
    return len(gave) == 1 and logits is gave[0]
