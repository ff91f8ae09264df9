"""The base model and its tokenizer."""

from __future__ import annotations

import os
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING

from finequant.finetune.architecture import check_architecture
from finequant.finetune.base_files import as_stored, missing_files, stored_weights
from finequant.finetune.gguf_base import dequantized, described
from finequant.recipes.base import locate_base
from finequant.recipes.errors import UserError, one_line
from finequant.recipes.hub import offline_reason
from finequant.recipes.schema import Model

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from finequant.finetune.architecture import Decoder, DecoderConfig

# A part of transformers' message -> what it means here.
REASONS = {
    "file named model.safetensors": "it has no safetensors weights; pickled ones (.bin) are not "
    "read, as they can run code: save it as safetensors first",
    "custom code": "it comes with its own Python code, which is not run; "
    "finequant takes transformers' own classes",
    "backend tokenizer": "it has no tokenizer that can be read; expected tokenizer.json",
    "not a valid JSON file": "its config.json is damaged, not valid JSON",
    "`model_type` key": "its config.json does not say what model it is (model_type)",
}


def load_config(model: Model) -> DecoderConfig:
    """Loads the base's configuration, corrected by its weight files; a GGUF file's is bfloat16.

    Raises:
        UserError: if it cannot be read, has an unknown architecture, or is already quantized.
    """
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig, model)
    check_architecture(config, model.base)
    if model.is_gguf:
        import torch

        config.dtype = torch.bfloat16  # more precise than the file's few bits per weight
        return config
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model.base: {model.base} is already quantized; name the float model it was made from"
        )
    return as_stored(config, model)


def check_files(model: Model) -> None:
    """Refuses a local base whose weight files are not there, without reading any.

    Raises:
        UserError: naming the first file that is missing, or saying that there are no safetensors.
    """
    if missing := missing_files(model):
        reason = REASONS["file named model.safetensors"]
        if missing != ["model.safetensors"]:
            reason = f"{missing[0]} is missing, copy or download it again"
        raise UserError(f"model.base: cannot load {model.base}: {reason}")


def load_generation_config(model: Model) -> GenerationConfig:
    """Loads the base's generation_config.json or, without one, derives it from its config.

    Raises:
        UserError: if the file of a local base is there, but damaged.
    """
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    folder, file = locate_base(model)
    try:
        if not file:
            revision = model.revision or "main"
            return GenerationConfig.from_pretrained(folder or model.base, revision=revision)
    except OSError as error:  # not there, or not JSON
        if folder and (there := folder / GENERATION_CONFIG_NAME).exists():
            raise UserError(
                f"model.base: {there}: cannot be read ({one_line(error)}): copy it again, or "
                "remove it"
            ) from None
    return GenerationConfig.from_model_config(load_config(model))


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Loads the base's tokenizer, with the recipe's chat template, if any, and a padding token.

    Raises:
        UserError: if it cannot be read, has more tokens than the embedding has rows, or comes from
            a GGUF file whose pre-tokenizer is not known.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model)
    _check_sizes(model, tokenizer)
    if model.chat_template:
        is_file = model.chat_template.endswith(".jinja")
        tokenizer.chat_template = (
            Path(model.chat_template).read_text(encoding="utf-8")
            if is_file
            else model.chat_template
        )
    if tokenizer.pad_token is None:
        # Llama 3 reserves a token for this; elsewhere padding is masked, so any token will do.
        reserved = "<|finetune_right_pad_id|>"
        usual = tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = reserved if reserved in tokenizer.get_vocab() else usual
    return tokenizer


def load_base(model: Model, dtype: torch.dtype, **options: object) -> Decoder:
    """Loads the base with all its weights in `dtype`.

    options: passed to `from_pretrained`; with `device_map="meta"`, only the names and shapes of the
        tensors are read and checked.

    Raises:
        UserError: if it cannot be read, has an unknown architecture, contains an adapter, or has
            weights that are not finite or do not match its configuration.
    """
    config = load_config(model)
    base = load_weights(model, _source(model, weights=True), config=config, dtype=dtype, **options)
    if getattr(base, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model.base: {model.base} has a LoRA adapter in it (adapter_config.json), which "
            "transformers adds to the base: name a folder without one"
        )
    if not model.is_gguf:  # a Hub model's files have been downloaded only now
        base.config.tie_word_embeddings = as_stored(config, model).tie_word_embeddings
    base.config.name_or_path = model.base
    return base


def load_weights(model: Model, source: Path | str, **options: object) -> Decoder:
    """Loads a model, and refuses weights that do not match its configuration or are not finite.

    source: the folder or Hub id that `from_pretrained` loads.
    """
    from transformers import AutoModelForCausalLM

    # transformers fills missing weights with random numbers, so the loading info is checked.
    base, loading_info = from_pretrained(
        AutoModelForCausalLM,
        model,
        source,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    _check_weights(model, loading_info)
    _check_finite(model, base)
    return base


def load_on_disk(model: Model, has_embedding: bool) -> Decoder:
    """Loads a base in float32 exactly as plain `from_pretrained` does, including its config.json.

    The weights stay in their safetensors files: accelerate reads them for each use.

    has_embedding: whether the files contain the embedding. If they only have the head that it is
    tied to, the whole model is read into memory, because accelerate would look for the embedding in
    the files (seen with 1.14). To be removed once it looks for the head instead.
    """
    import torch
    from transformers import AutoModelForCausalLM

    where = {"": "disk"} if has_embedding else None
    return _from_pretrained(AutoModelForCausalLM, model, dtype=torch.float32, device_map=where)


def stored_dtype(config: DecoderConfig) -> torch.dtype:
    """Returns the dtype that the base's files state; float32 if they state none."""
    import torch

    return config.dtype or torch.float32


def _source(model: Model, weights: bool) -> Path | str:
    """Returns the folder of the base, or its id on the Hub.

    weights: whether the folder must contain the weights, for which a GGUF file is dequantized.
    """
    folder, file = locate_base(model)
    if file:
        return dequantized(model) if weights else described(model)
    return folder or model.base


def _from_pretrained(auto_class: type, model: Model, **options: object):
    weights = auto_class.__name__ == "AutoModelForCausalLM"
    return from_pretrained(auto_class, model, _source(model, weights), **options)


def from_pretrained(auto_class: type, model: Model, source: Path | str, **options: object):
    """Calls `auto_class.from_pretrained` for a base; weights are read from safetensors or GGUF.

    source: the base's folder or Hub id.

    Raises:
        UserError: saying why the base cannot be loaded, and what to do.
    """
    if auto_class.__name__ == "AutoModelForCausalLM" and "gguf_file" not in options:
        options["use_safetensors"] = True
        # Otherwise transformers asks a bot to convert the weights, and loads its pull request.
        os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    if not isinstance(source, Path):
        offline_reason()
    try:
        return auto_class.from_pretrained(
            source,
            revision=model.revision or "main",
            trust_remote_code=False,
            **options,
        )
    # transformers raises its own errors, those of the Hub client and of the file readers.
    except Exception as error:
        at = "" if isinstance(source, Path) else f" (revision {model.revision or 'main'})"
        raise UserError(
            f"model.base: cannot load {model.base}{at}: {why_not_loaded(error)}"
        ) from error


def why_not_loaded(error: Exception) -> str:
    """Says why a base could not be loaded, and what to do about it."""
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        StrictDataclassError,
    )
    from safetensors import SafetensorError

    for cause in (error, error.__cause__):
        if isinstance(cause, RepositoryNotFoundError):  # a gated one too
            return (
                "the Hub shows you no such model; for a gated or private one, accept its terms on "
                "its page, then run `hf auth login`"
            )
        if isinstance(cause, RevisionNotFoundError):
            return "the model has no such branch, tag or commit"
        if isinstance(cause, LocalEntryNotFoundError):
            reason = offline_reason() or "the connection broke"
            return f"not in the cache, and the Hub cannot be reached ({reason})"
    message = " ".join(str(error).split())
    if isinstance(error, (SafetensorError, JSONDecodeError, FileNotFoundError)):
        return f"a file is missing or damaged, copy or download it again ({message})"
    if isinstance(error, StrictDataclassError):
        return f"its config.json is invalid: {message.rpartition('Error: ')[2]}"
    for theirs, ours in REASONS.items():
        if theirs in message:
            return ours
    named = isinstance(error, (OSError, ValueError))
    return (message if named else f"{type(error).__name__}: {message}")[:300]


def _check_weights(model: Model, loading_info: dict[str, set]) -> None:
    """Refuses weights that are not exactly those that config.json describes."""
    problems = [
        f"{len(names)} {problem}, such as {min(names)}"
        for problem, names in (
            ("missing", loading_info["missing_keys"]),
            ("unknown", loading_info["unexpected_keys"]),
            ("of another shape", {name for name, *_ in loading_info["mismatched_keys"]}),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"model.base: the tensors of {model.base} do not fit its config.json: "
            f"{'; '.join(problems)}: copy or download it again"
        )


def _check_finite(model: Model, base: Decoder) -> None:
    """Refuses weights that are not finite; if bitsandbytes has packed them, it checks the files."""
    import torch
    from peft.utils.integrations import gather_params_ctx

    is_packed = any(not weight.is_floating_point() for weight in base.parameters())
    for name, weight in stored_weights(model) if is_packed else base.named_parameters():
        with gather_params_ctx(weight, modifier_rank=None):  # ZeRO-3 has split it by now
            extremes = torch.zeros(1) if weight.is_meta else torch.stack(weight.detach().aminmax())
        if not extremes.isfinite().all():
            raise UserError(
                f"model.base: {name} of {model.base} has values that are infinite or NaN: copy or "
                "download it again"
            )


def _check_sizes(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, load_config(model).vocab_size
    if tokens > rows:
        raise UserError(
            f"model.base: the tokenizer of {model.base} has {tokens} tokens, its embedding only "
            f"{rows} rows: use the tokenizer files that belong to these weights"
        )
