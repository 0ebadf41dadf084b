"""A causal language model of Hugging Face `transformers`, read from a local folder.

The folder holds a config.json. Safetensors beside it are the starting point, or the `zero/` of a DeepSpeed universal
checkpoint (see `universal`); without weights the model is drawn anew from the seed. Nothing is downloaded, no code of
the folder runs. Dropout and the like are as that config.json has them; of `model.*` only `kind` and `path` count.

The loss is streamed where the model returns its head's logits as they are (`streamed_head`).

Cost: importing `transformers` takes seconds, which is why only this module and `streamed_head` do it.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.planning import STREAMED
from elastictrain.workloads import check_model_folder
from elastictrain.workloads.base import Batch
from elastictrain.workloads.causal import CausalLanguageModel
from elastictrain.workloads.selective import products_kept
from elastictrain.workloads.universal import is_universal, load_universal

try:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.utils import logging as transformers_logging

    from elastictrain.workloads.streamed_head import StreamedHead, has_plain_head, next_tokens_told
except ImportError as error:
    raise ConfigError(
        f"model.kind huggingface needs the package transformers ({error}): pip install elastictrain[hf]"
    ) from None

_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class HuggingFaceModel(CausalLanguageModel):
    """Workload for `model.kind: huggingface`."""

    def __init__(self, config: TrainConfig, vocab_size: int, most_layers: int | None = None) -> None:
        """`most_layers`: see `workloads.build_workload`."""
        super().__init__(config, vocab_size)
        check_model_folder(config)
        self.folder = Path(str(config.model.path))
        self.has_weights = any(self.folder.glob("*.safetensors"))
        self.is_universal = is_universal(self.folder)
        if not (self.has_weights or self.is_universal) and any(
            file for pattern in _PICKLED for file in self.folder.glob(pattern)
        ):
            raise ConfigError(
                f"model.path {self.folder} has weights only as pickle, which can run code when opened: save them as "
                "safetensors, or remove them to start from random weights"
            )
        self.model_config = self._read_config()
        self._check_sizes()
        if most_layers is not None:
            text = self.model_config.get_text_config()
            text.num_hidden_layers = min(most_layers, text.num_hidden_layers)
            self.has_weights = self.is_universal = False
        self.streams_loss = config.train.dtype in STREAMED and has_plain_head(self._draw_one_layer)

    def build(self, seed: int) -> nn.Module:
        """The folder's weights, or new ones from `seed`; torch's global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module: Any = self._load() if self.has_weights else self._draw()
        if self.is_universal:
            load_universal(module, self.folder)
        return self._prepared(module)

    def outline(self) -> nn.Module:
        """See `base.Workload.outline`: the folder's weights are not read again."""
        with no_init_weights():
            module = self._draw()
        for parameter in module.parameters():
            parameter._is_hf_initialized = True  # transformers' own mark of weights that have been loaded
        module.init_weights()  # what is no parameter, and ties
        return self._prepared(module)

    def _prepared(self, module: Any) -> nn.Module:
        if self.streams_loss:
            module.set_output_embeddings(StreamedHead(module.get_output_embeddings()))
        recompute = self.config.train.activation_checkpointing or "none"
        if recompute != "none":
            selective = {"context_fn": products_kept} if recompute == "selective" else {}
            module.gradient_checkpointing_enable({"use_reentrant": False, **selective})
        _keep_buffers(module)
        return cast(nn.Module, module.train())

    def blocks(self, module: nn.Module) -> Iterable[nn.Module]:
        """See `base.RepeatingWorkload.blocks`: what `transformers` itself would not have split over devices."""
        kinds = set(cast(Any, module)._no_split_modules or ())
        return [block for block in module.modules() if type(block).__name__ in kinds]

    def logits(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """The model's logits, without a key-value cache."""
        logits: Tensor = module(input_ids=tokens, use_cache=False).logits
        return logits

    def cross_entropy(self, module: nn.Module, batch: Batch) -> Tensor:
        """See `causal.CausalLanguageModel.cross_entropy`."""
        if not self.streams_loss:
            return super().cross_entropy(module, batch)
        with next_tokens_told(module, batch["tokens"][:, 1:]):
            return self.logits(module, self.part_input(batch))

    def _read_config(self) -> Any:
        try:
            found = AutoConfig.from_pretrained(self.folder, **_SAFE)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"model.path {self.folder}: transformers can't use its config.json: {error}") from None
        if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError(
                f"model.path {self.folder} holds a {found.model_type}, which transformers can't build as a causal "
                "language model; use a decoder such as llama, qwen3 or gpt2"
            )
        return found

    def _check_sizes(self) -> None:
        text = self.model_config.get_text_config()
        if text.vocab_size < self.vocab_size:
            raise ConfigError(
                f"the vocab_size {text.vocab_size} in {self.folder / 'config.json'} is smaller than the tokenizer's "
                f"{self.vocab_size}: lower data.vocab_size, or raise it in config.json"
            )
        positions = getattr(text, "max_position_embeddings", None)
        if positions is not None and self.config.data.seq_len > positions:
            raise ConfigError(
                f"data.seq_len {self.config.data.seq_len} exceeds the max_position_embeddings {positions} in "
                f"{self.folder / 'config.json'}: lower data.seq_len to at most {positions}"
            )

    def _draw(self) -> Any:
        return _drawn(self.model_config)

    def _draw_one_layer(self) -> Any:
        config = deepcopy(self.model_config)
        config.get_text_config().num_hidden_layers = 1
        return _drawn(config)

    def _load(self) -> Any:
        transformers_logging.disable_progress_bar()  # a worker's log is no terminal
        try:
            return AutoModelForCausalLM.from_pretrained(
                self.folder, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa", **_SAFE
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise ConfigError(f"model.path {self.folder}: transformers can't load its weights: {error}") from None


def _drawn(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(
        config, trust_remote_code=False, dtype=torch.float32, attn_implementation="sdpa"
    )


def _keep_buffers(module: nn.Module) -> None:
    """Keep float buffers in fp32 when an engine casts the module to bf16: the rotary frequencies must stay exact."""
    for owner in module.modules():
        exact = {name: b for name, b in owner.named_buffers(recurse=False) if b.dtype == torch.float32}
        if exact:
            owner.register_forward_pre_hook(partial(_restore_buffers, exact))


def _restore_buffers(exact: dict[str, Tensor], owner: nn.Module, _inputs: object) -> None:
    for name, value in exact.items():
        buffer = owner.get_buffer(name)
        if buffer.dtype != torch.float32:
            setattr(owner, name, value.to(buffer.device))
