"""A decoder-only transformer: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU, residual dropout.

Token ids [batch, seq] go in, logits [batch, seq, vocab] come out, or the mean loss where the next tokens are given too;
with experts in place of the MLPs (`experts`) also what their routers tell, [blocks, 3].
Nothing here knows of devices, precision or ranks.
Weights and activations may be bf16: norms and rotations are computed in fp32 all the same. Every weight is drawn from
its own generator, seeded by (seed, name), and the dropout of a block from one seeded by (torch's seed, block), so the
bits depend on neither the order nor the layout. A part of the model has its weights under the names of the whole's;
between two parts go the vectors [batch, seq, hidden].

Cost: about 6 x parameters floating point operations per token and step (forward and backward), plus attention's
12 x layers x hidden_size x seq_len; 8 x parameters with full activation checkpointing (`selective`: see there).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from elastictrain.config import ModelSection, RopeScaling
from elastictrain.plan.layout import Recompute
from elastictrain.plan.part import Part
from elastictrain.workloads.experts import Balancing, Exchange, MixtureOfExperts, Router
from elastictrain.workloads.head_loss import streamed_cross_entropy
from elastictrain.workloads.seeding import seed_draws
from elastictrain.workloads.selective import cheap, selectively
from elastictrain.workloads.sharing import (
    Peers,
    SequencePeers,
    Vocabulary,
    embed,
    enter,
    leave,
    to_heads,
    to_positions,
)

INITIAL_STD = 0.02
"""Standard deviation of the initial weights."""


class Transformer(nn.Module):
    """Embedding, decoder blocks, final norm, head; or the part of them that one rank holds."""

    def __init__(
        self,
        model: ModelSection,
        vocab_size: int,
        recompute: Recompute = "none",
        part: Part | None = None,
        peers: Peers | None = None,
        exchange: Exchange | None = None,
        sequence: SequencePeers | None = None,
        balancing: Balancing | None = None,
    ) -> None:
        super().__init__()
        part = part or Part(range(model.num_layers), first=True, last=True)
        self.part, self.peers, self.balancing = part, peers, balancing
        self.recompute = recompute
        self.draws = model.dropout > 0
        self.head_dim = model.hidden_size // model.num_heads
        self.rope_theta, self.rope_scaling = model.rope_theta, model.rope_scaling
        tied_head = part.last and model.tie_embeddings
        vocabulary = Vocabulary(vocab_size, part.share(vocab_size), peers)
        self.embedding = Embedding(vocabulary, model.hidden_size) if part.first or tied_head else None
        self.blocks = nn.ModuleDict(
            {
                str(number): Block(model, part, peers, exchange, sequence, recompute == "selective")
                for number in part.blocks
            }
        )
        self.norm = RMSNorm(model.hidden_size, model.norm_eps) if part.last else None
        own_head = part.last and not tied_head
        self.head = Head(vocabulary, model.hidden_size) if own_head else None

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens, or the vectors of the part before; gives scores, or vectors for the part after or for `score`.

        With `targets` [batch, seq], the next tokens, it gives their mean loss.
        """
        hidden: Tensor = self.embedding(x) if self.part.first and self.embedding is not None else x
        first = x.shape[1] * self.part.sp_index
        rotation = rotary_table(x.shape[1], self.head_dim, self.rope_theta, x.device, first, self.rope_scaling)
        seed = torch.initial_seed() if self.draws and self.training else None
        told: list[Tensor] = []
        for number, block in self.blocks.items():
            if seed is not None:
                seed_draws(block_seed(seed, int(number), self.part.sp_index))
            if self.recompute == "full" and self.training:
                hidden, *routing = checkpoint(block, hidden, rotation, use_reentrant=False)
            else:
                hidden, *routing = block(hidden, rotation)
            told += routing
        if told and self.balancing is not None:
            hidden = self.balancing.attach(hidden, torch.stack(told))
        if self.norm is None:
            return hidden
        hidden = self.norm(hidden)
        if not self.part.first:
            return hidden
        found = self.score(hidden, targets)
        return (found, torch.stack(told)) if told else found

    def score(self, vectors: Tensor, targets: Tensor | None = None) -> Tensor:
        """What the last part of several makes of its own vectors: scores, of its share of the ids, or the loss."""
        head = self.embedding if self.head is None else self.head
        assert head is not None, "the last part has a head, or the embedding in its place"
        found: Tensor = head(enter(vectors, self.peers), targets)
        return found


class Block(nn.Module):
    """Attention, then SwiGLU or experts; each reads a normed copy of the residual stream and adds to it."""

    def __init__(
        self,
        model: ModelSection,
        part: Part,
        peers: Peers | None,
        exchange: Exchange | None,
        sequence: SequencePeers | None,
        selective: bool,
    ) -> None:
        super().__init__()
        self.selective = selective
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.attention = Attention(model, part, peers, sequence)
        self.mlp_norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.mlp: nn.Module
        if model.num_experts is None:
            self.mlp = SwiGLU(model, part, peers)
        else:
            held = {number: SwiGLU(model, part, None) for number in part.experts(model.num_experts)}
            self.mlp = MixtureOfExperts(Router(model.hidden_size, model.num_experts), held, model, exchange, peers)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, hidden: Tensor, rotation: Tensor) -> tuple[Tensor, ...]:
        """The stream, and what the router tells if there is one."""
        if self.selective and self.training:
            return selectively(self._through, hidden, rotation)
        return self._through(hidden, rotation)

    def _through(self, hidden: Tensor, rotation: Tensor) -> tuple[Tensor, ...]:
        hidden = hidden + self.dropout(self.attention(cheap(self.attention_norm, hidden), rotation))
        mixed = self.mlp(cheap(self.mlp_norm, hidden))
        mixed, *routing = mixed if isinstance(mixed, tuple) else (mixed,)
        return hidden + self.dropout(mixed), *routing


class Attention(nn.Module):
    """Causal attention; `num_kv_heads` key and value heads serve `num_heads` query heads in equal groups.

    Split over ranks by heads, whole groups of them. Ranks that share a sequence share the heads here; where there are
    too few of keys and values for that, some ranks have the same.
    """

    def __init__(self, model: ModelSection, part: Part, peers: Peers | None, sequence: SequencePeers | None) -> None:
        super().__init__()
        self.peers, self.sequence = peers, sequence
        self.head_dim = model.hidden_size // model.num_heads
        num_kv_heads = model.num_kv_heads or model.num_heads
        self.grouped = num_kv_heads != model.num_heads
        self.copies = part.sp // math.gcd(part.sp, len(part.share(num_kv_heads)))
        of_queries = len(part.share(model.num_heads)) * self.head_dim
        of_keys = len(part.share(num_kv_heads)) * self.head_dim
        self.query = nn.Linear(model.hidden_size, of_queries, bias=False)
        self.key = nn.Linear(model.hidden_size, of_keys, bias=False)
        self.value = nn.Linear(model.hidden_size, of_keys, bias=False)
        self.output = nn.Linear(of_queries, model.hidden_size, bias=False)

    def forward(self, hidden: Tensor, rotation: Tensor) -> Tensor:
        hidden = enter(hidden, self.peers)
        query, key, value = (
            project(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [batch, heads, seq, head_dim]
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        if self.copies > 1:
            key, value = (x.repeat_interleave(self.copies, dim=1) for x in (key, value))
        query, key, value = to_heads((query, key, value), self.sequence)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        mixed = to_positions(mixed, self.sequence)
        return leave(self.output(cheap(_side_by_side, mixed)), self.peers)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); without `peers` its part's share of it, a term of the sum."""

    def __init__(self, model: ModelSection, part: Part, peers: Peers | None) -> None:
        super().__init__()
        self.peers = peers
        width = len(part.share(model.intermediate_size or math.ceil(model.hidden_size * 8 / 3 / 32) * 32))
        self.gate = nn.Linear(model.hidden_size, width, bias=False)
        self.up = nn.Linear(model.hidden_size, width, bias=False)
        self.down = nn.Linear(width, model.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = enter(hidden, self.peers)
        return leave(self.down(cheap(_gated, self.gate(hidden), self.up(hidden))), self.peers)


def _side_by_side(heads: Tensor) -> Tensor:
    """[batch, heads, seq, head_dim] to [batch, seq, heads x head_dim]."""
    return heads.transpose(1, 2).flatten(2)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    """x / rms(x) x weight, computed in fp32 whatever the input's type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(hidden.dtype)


class Head(nn.Linear):
    """Vectors to logits, or to the mean loss."""

    def __init__(self, vocabulary: Vocabulary, hidden_size: int) -> None:
        super().__init__(hidden_size, len(vocabulary.rows), bias=False)
        self.vocabulary = vocabulary

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        return scored(x, self.weight, targets, self.vocabulary)


class Embedding(nn.Module):
    """Ids to vectors; and vectors to logits or the mean loss, when it is the output head too.

    Both uses go through this module's own forward: ZeRO-3 gathers a module's weights around that and nowhere else.
    Split over ranks by ids: logits are those of a rank's own.
    """

    def __init__(self, vocabulary: Vocabulary, hidden_size: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.weight = nn.Parameter(torch.empty(len(vocabulary.rows), hidden_size))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if x.is_floating_point():
            return scored(x, self.weight, targets, self.vocabulary)
        return embed(x, self.weight, self.vocabulary)


def scored(vectors: Tensor, weight: Tensor, targets: Tensor | None, vocabulary: Vocabulary) -> Tensor:
    """The scores of the next tokens, or the mean loss of these."""
    return (
        F.linear(vectors, weight) if targets is None else streamed_cross_entropy(vectors, weight, targets, vocabulary)
    )


def rotary_table(
    seq_len: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    first: int = 0,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """Cosines and sines, fp32 [2, seq_len, head_dim / 2]; position t turns pair i by t / theta^(2i / head_dim).

    `first` is the first of the positions; with `scaling` seldom turning pairs turn slower.

    Made anew in each forward pass: it costs next to nothing there, while a buffer would lose its precision when an
    engine casts the module to bf16.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is not None:
        turns = scaling.trained_positions * frequency / (2 * math.pi)
        kept = ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    positions = torch.arange(first, first + seq_len, dtype=torch.float32, device=device)
    angle = torch.outer(positions, frequency)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + head_dim / 2]) of [batch, heads, seq, head_dim], in fp32."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def block_seed(seed: int, number: int, share: int = 0) -> int:
    """64 bits for the dropout of block `number` in a forward pass under `seed`, on this share of the sequences."""
    where = f"block {seed} {number}" + (f" share {share}" if share else "")
    return int.from_bytes(hashlib.blake2b(where.encode(), digest_size=8).digest(), "little")


SPLIT_DIMENSIONS = {
    "embedding": 0, "head": 0, "query": 0, "key": 0, "value": 0, "output": 1, "gate": 0, "up": 0, "down": 1,
}  # fmt: skip
"""Which dimension of a layer's weight is split over the ranks that share it; norms are not."""


def split_dimension(name: str) -> int | None:
    """Of the parameter of this name; None if it is not split."""
    return SPLIT_DIMENSIONS.get(name.split(".")[-2])


def initialise(module: Transformer, seed: int, num_layers: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Fill every weight from (seed, name): norms one, matrices normal, what adds to the residual stream smaller.

    The 2 x num_layers additions to the stream are scaled so that its variance at the end is that of one; that is the
    whole model's number, and `shapes` are the whole's, whatever part this is.
    """
    residual_std = INITIAL_STD / math.sqrt(2 * num_layers)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            nn.init.ones_(parameter)
            continue
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        adds_to_stream = name.endswith(("attention.output.weight", ".down.weight"))
        dimension = split_dimension(name) if module.part.tp > 1 else None
        whole = parameter.data if dimension is None else torch.empty(shapes[name])
        nn.init.normal_(whole, std=residual_std if adds_to_stream else INITIAL_STD, generator=generator)
        if dimension is not None:
            mine = module.part.share(shapes[name][dimension])
            parameter.data.copy_(whole.narrow(dimension, mine.start, len(mine)))
