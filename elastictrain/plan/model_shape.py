"""What the planner knows of a decoder-only transformer: its sizes, and what follows from them by counting (pure).

Parameters are exact, by part: for this project's transformer they equal the real module's (tested). Floating point
operations are those of the matrix products, 2 x m x n x k each, as Narayanan et al. 2021 (arXiv:2104.04473, appendix)
count them: a backward pass takes twice its forward pass. By convention a causal mask is not discounted in them; what
is really computed may be less (`skips_masked`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a transformer."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    seq_len: int
    """Tokens of a sample that are predicted."""
    head_dim: int | None = None
    """Width of a head; None means hidden_size / num_heads."""
    tie_embeddings: bool = True
    dropout: bool = False
    """Whether there is any: its masks are kept for the backward pass."""
    gated_mlp: bool = True
    """SwiGLU's three matrices, or GELU's two."""
    num_experts: int = 1
    """MLPs in each layer; more than one means a router that chooses among them."""
    experts_per_token: int = 1
    capacity_factor: float = 1.0
    """Room of each expert, used or not, over its even share of the tokens."""
    learned_positions: bool = False
    skips_masked: bool = True
    """Attention computes only the scores that the causal mask leaves, as fused kernels do."""
    biases: bool = False
    """Linear layers and norms have biases, as in GPT-2 and 3."""
    streams_loss: bool = False
    """The loss never holds the scores of all tokens."""

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * (self.head_dim or self.hidden_size // self.num_heads)

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * (self.head_dim or self.hidden_size // self.num_heads)

    @property
    def attention_parameters(self) -> int:
        """Of one layer: query, key, value and output projection."""
        matrices = 2 * self.hidden_size * (self.query_size + self.kv_size)
        return matrices + self.biases * (self.query_size + 2 * self.kv_size + self.hidden_size)

    @property
    def expert_parameters(self) -> int:
        """Of one MLP."""
        matrices = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        return matrices + self.biases * (self.intermediate_size + self.hidden_size)

    @property
    def dense_layer_parameters(self) -> int:
        """Of one layer, without the MLP or MLPs: attention, two norms, the router."""
        norms = 2 * self.hidden_size * (1 + self.biases)
        return self.attention_parameters + norms + self.router_parameters

    @property
    def router_parameters(self) -> int:
        """Of one layer; none without experts."""
        return self.hidden_size * self.num_experts if self.num_experts > 1 else 0

    @property
    def layer_parameters(self) -> int:
        """Of one layer, all its experts included."""
        return self.dense_layer_parameters + self.num_experts * self.expert_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of the token embedding, and of learned positions."""
        return self.hidden_size * (self.vocab_size + self.learned_positions * self.seq_len)

    @property
    def head_parameters(self) -> int:
        """Of the output head: the final norm, and a matrix unless the embedding serves as one."""
        norm = self.hidden_size * (1 + self.biases)
        return norm + (0 if self.tie_embeddings else self.hidden_size * self.vocab_size)

    @property
    def num_parameters(self) -> int:
        """All of them."""
        return self.embedding_parameters + self.num_layers * self.layer_parameters + self.head_parameters

    def by_part(self) -> dict[str, int]:
        """Parameters by part of the model; they add up to `num_parameters`."""
        return {
            "embedding": self.embedding_parameters,
            "attention": self.num_layers * self.attention_parameters,
            "mlp": self.num_layers * self.num_experts * self.expert_parameters,
            "norms and routers": self.num_layers * (self.dense_layer_parameters - self.attention_parameters),
            "head": self.head_parameters,
        }

    def attention_flops_per_token(self, causal: bool = False) -> float:
        """Forward pass of one layer: scores and mixing of values over the whole sequence, or half of it if `causal`."""
        return 4 * self.query_size * self.seq_len * (0.5 if causal else 1.0)

    @property
    def expert_room(self) -> float:
        """Places in experts for each token; 1 for a single MLP."""
        return self.experts_per_token * (self.capacity_factor if self.num_experts > 1 else 1)

    def layer_flops_per_token(self, causal: bool = False, empty_room: bool = False) -> float:
        """Forward pass of one layer, of the experts that a token goes to; with `empty_room` all that is computed."""
        projections = 4 * self.hidden_size * (self.query_size + self.kv_size)
        experts = self.expert_room if empty_room else self.experts_per_token
        mlp = 2 * (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size * experts
        return projections + mlp + 2 * self.router_parameters + self.attention_flops_per_token(causal)

    @property
    def head_flops_per_token(self) -> float:
        """Forward pass of the output head."""
        return 2 * self.hidden_size * self.vocab_size

    def flops_per_token(self, causal: bool = False, recompute: bool = False) -> float:
        """Forward and backward pass of the whole model; with `recompute`, each layer's forward pass once more."""
        layers = self.num_layers * self.layer_flops_per_token(causal)
        return layers * (4 if recompute else 3) + 3 * self.head_flops_per_token
