"""The contents that a format must hold, as the recipe predicts them, or those of quantized/.

A format's `check_fits` takes them, so the same check runs before the first stage and at export.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from finequant.finetune.architecture import EMBEDDING, architecture_name, norm_names
from finequant.quantize.scheme import Plan, layer_plan, undecided
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Quantize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.architecture import DecoderConfig

SILU = ("silu", "swish")
"""transformers' names of the activation that makes an MLP SwiGLU."""


class Contents(NamedTuple):
    """Everything except weights that decides whether a format can hold a quantized model."""

    config: DecoderConfig
    bits: dict[str, int | None]
    """Bits by quantized layer; None if a budget will choose."""
    group_sizes: dict[str, int]
    """Group sizes by quantized layer."""
    tokenizer: dict[str, Any]
    """The content of tokenizer.json."""

    def scheme(self, name: str) -> tuple[int | None, int | None]:
        """Returns bits and group size of a layer; (None, None) for one in float."""
        return self.bits.get(name), self.group_sizes.get(name)

    def linear_bits(self) -> set[int]:
        """Returns the bits of linear layers and head, as far as they are decided."""
        return {bits for name, bits in self.bits.items() if bits and name != EMBEDDING}

    def linear_group_sizes(self) -> set[int]:
        """Returns the group sizes of linear layers and head."""
        return {size for name, size in self.group_sizes.items() if name != EMBEDDING}


def planned(
    quantize: Quantize, config: DecoderConfig, tokenizer: PreTrainedTokenizerBase
) -> Contents:
    """Predicts what `quantize` will write for a base, by the recipe's plan.

    Raises:
        UserError: for a plan that does not fit the base.
    """
    plan: Plan = layer_plan(quantize, config)
    schemes = {name: scheme for name, scheme in plan.items() if scheme}
    later = undecided(quantize, plan) if quantize.budget else []
    return Contents(
        config,
        {name: None if name in later else scheme.bits for name, scheme in schemes.items()},
        {name: scheme.group_size for name, scheme in schemes.items()},
        json.loads(tokenizer.backend_tokenizer.to_str()),
    )


def check_block(name: str, reader: str, config: DecoderConfig) -> None:
    """Refuses blocks that the programs which read a format do not compute.

    reader: these programs.

    Raises:
        UserError: for an MLP without SiLU, or biases in the attention of a Qwen3.
    """
    if config.hidden_act not in SILU:
        raise UserError(
            f"{name}: the activation of this base's MLP is {config.hidden_act!r} (hidden_act), and "
            f"{reader} only computes 'silu': remove {name} from quantize.exports"
        )
    kind = architecture_name(config)
    if kind == "Qwen3ForCausalLM" and config.attention_bias:
        raise UserError(
            f"{name}: the attention of this base has biases (attention_bias), which {reader} does "
            f"not read in a {kind}: remove {name} from quantize.exports"
        )


def check_norms(name: str, config: DecoderConfig) -> None:
    """Refuses an architecture with norms that a format's decoder graph lacks.

    Raises:
        UserError: naming these norms.
    """
    if norms := norm_names(config):
        raise UserError(
            f"{name}: a {architecture_name(config)} has {' and '.join(norms)}, which the graph of "
            f"this export lacks: remove {name} from quantize.exports"
        )
