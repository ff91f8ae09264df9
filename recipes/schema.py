"""The schema of recipes: sections, their keys, and the keys' defaults.

Every section is frozen, strict ("3" is not a number), and refuses unknown keys. Field descriptions
end up in `finequant schema`, so that editors show them while you write a recipe.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from finequant.recipes.methods import METHODS, known_method

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
LONGEST_NAME = 100
"""Files of exports are named after base, run and quantization, and a name has 255 characters."""

HUB_ID = r"^[\w.-]+/[\w.-]+$"
LANGUAGE = r"^([a-z]{2,3}|code|multilingual)$"
LICENSE = r"^[a-z0-9][a-z0-9.+-]*$"
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Export = Literal["torchao", "compressed-tensors", "gguf", "executorch", "onnx", "mlx"]
Method = Annotated[
    str, AfterValidator(known_method), WithJsonSchema({"enum": [*METHODS], "type": "string"})
]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Metric = Literal[
    "exact_match",
    "json_match",
    "number_match",
    "f1",
    "tool_call_match",
    "tool_call_recall",
    "multiple_choice",
    "rouge",
    "bleu",
    "chrf",
]

# peft initializations that need calibration data or an already quantized base.
UNSUPPORTED_INITS = {
    "loftq": "it needs a base that is quantized before training, not after",
    "corda": "it needs a calibration pass over the base",
    "eva": "it needs a calibration pass over the base",
}


def one_or_more(kind: Any, key: str | None = None) -> BeforeValidator:
    """Accepts a single entry without its list, and a string in place of a mapping of only this key.

    kind: the type of an entry, for the JSON schema.
    """
    written = kind | str if key else kind

    def listed(value: Any) -> list[Any]:
        entries = value if isinstance(value, list) else [value]
        return [{key: entry} if key and isinstance(entry, str) else entry for entry in entries]

    return BeforeValidator(listed, json_schema_input_type=written | list[written])


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The base model: a Llama, Mistral or Qwen whose class finetune/architecture.py lists."""

    base: str = Field(
        description="Hub id (org/name), local folder, or package:MODULE/FILE.gguf", min_length=1
    )
    revision: str | None = Field(None, description="Hub commit, tag or branch; pin a commit")
    chat_template: str | None = Field(
        None,
        description="Jinja template, or path of a .jinja file, that replaces the tokenizer's; "
        "chatml_tools.jinja comes with finequant",
    )
    load: Literal["float", "nf4"] = Field(
        "float",
        description="how training holds the base: in `train.precision`, or in 4 bits (QLoRA, by "
        "bitsandbytes); the adapter is merged into the float base either way",
    )

    @field_validator("chat_template")
    @classmethod
    def _template_or_file(cls, value: str | None) -> str | None:
        if value and "{" not in value and not value.endswith(".jinja"):
            raise ValueError(
                "expected a Jinja template, with {{ }} or {% %}, or the path of a .jinja file"
            )
        return value

    @property
    def is_gguf(self) -> bool:
        """Says whether the base is a GGUF file inside an installed package."""
        return self.base.startswith("package:")


class Source(Section):
    """A source of rows: a Hub dataset; a local file (JSON, JSON Lines, CSV, TSV, Parquet, Arrow, or
    text, also compressed); a folder of such files; or a pattern such as shards/*.parquet."""

    source: str = Field(
        description="Hub dataset id, or a file path relative to the recipe", min_length=1
    )
    name: str | None = Field(None, description="Hub dataset configuration")
    split: str = Field(
        "train", description="split of a Hub dataset, or of a folder or file that has several"
    )
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "text"] = Field(
        "auto", description="layout of the rows; auto: recognized by their columns"
    )
    columns: dict[Literal["messages", "system", "tools", "prompt", "completion", "text"], str] = (
        Field(
            default_factory=dict,
            description="where to find each field: a column, a path such as answers.text[0] or "
            "choices[gold], where the column gold holds a number or letter, or a template such as "
            "'Question: {question}'; {choices:lines} or {choices:letters} writes a list, one text "
            "per line",
        )
    )
    weight: float = Field(1.0, gt=0, description="how often each row is seen in an epoch")
    limit: Positive | None = Field(
        None, description="use this many rows, chosen by the seed; with streaming, the first ones"
    )
    streaming: bool = Field(
        False, description="read a Hub dataset as it arrives, and keep no copy of its files"
    )

    @model_validator(mode="after")
    def _columns_make_a_row(self) -> Source:
        if not self.columns:
            return self
        fields = self.columns.keys() - {"system", "tools"}
        if fields not in ({"messages"}, {"text"}, {"prompt", "completion"}):
            raise ValueError("columns must map messages, text, or both prompt and completion")
        if fields == {"text"} and len(self.columns) > 1:
            raise ValueError("columns: a text has no system message or tools: map text only")
        layout = "prompt_completion" if "prompt" in fields else min(fields)
        if self.format not in ("auto", layout):
            raise ValueError(f"columns map the layout {layout}, so format is not {self.format}")
        return self


Sources = Annotated[list[Source], one_or_more(Source, "source")]


class Data(Section):
    """Rows for training and evaluation, and how they become tokens."""

    train: Annotated[list[Source], Field(min_length=1), one_or_more(Source, "source")] = Field(
        description="sources of training rows"
    )
    validation: Sources = Field(
        default_factory=list, description="sources of the rows on which training measures the loss"
    )
    test: Sources = Field(
        default_factory=list, description="sources of the held-out rows that models answer"
    )
    validation_fraction: Fraction = Field(
        0.05, description="share of the training rows to use if there is no validation source"
    )
    test_fraction: Fraction = Field(
        0.0, description="share of the training rows to hold out if there is no test source"
    )
    system: str | None = Field(None, description="system message for rows that have none")
    template_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="variables of the chat template, such as date_string; "
        "the template of the shipped model has them as defaults",
    )
    max_length: Positive = Field(1024, description="maximum tokens of a row, or of a pack")
    long_rows: Literal["truncate", "drop", "error", "split"] = Field(
        "truncate",
        description="what to do with rows beyond max_length; split: cut texts into pieces",
    )
    loss_on: Literal["assistant", "all"] = Field(
        "assistant", description="target tokens of the loss: the assistant's only, or all"
    )
    missing_end: Literal["error", "allow"] = Field(
        "error",
        description="what to do if no token ends an answer (in the chat template) or a text (the "
        "tokenizer's EOS); allow: the model does not learn to stop",
    )
    packing: bool = Field(
        False, description="pack several rows into max_length; they do not attend to each other"
    )
    bad_rows: Literal["error", "drop", "repair"] = Field(
        "error",
        description="what to do with unusable rows: list them and stop, drop them, or repair them "
        "(drop an empty turn, merge a user's or the system's repeated turns, cut turns after the "
        "last answer) and drop those that cannot be repaired",
    )
    same_rows: Literal["prompt", "row"] | None = Field(
        None,
        description="when rows count as the same in splits, overlap, and duplicates; prompt: if "
        "the prompts are equal; row: if the answers are, too; default: prompt, or row if training "
        "has fewer than 10 prompts",
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="what to do with repeated training rows"
    )
    overlap: Literal["error", "drop"] = Field(
        "error",
        description="what to do with training rows that also occur in validation or test, and with "
        "validation rows that also occur in test",
    )


class Lora(Section):
    """The adapter, in peft's terms."""

    rank: Positive = Field(
        16, validation_alias=AliasChoices("rank", "r"), description="rank of the update B A; or `r`"
    )
    alpha: float = Field(32, gt=0, description="the update is scaled by alpha / rank")
    dropout: Fraction = Field(0.0, description="dropout on the adapter's input")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear",
        description="layers that get an adapter: all linear layers but the head, or name endings "
        "such as q_proj",
    )
    use_rslora: bool = Field(
        False, description="rank-stabilized LoRA: scales by alpha / sqrt(rank), arXiv:2312.03732"
    )
    use_dora: bool = Field(
        False, description="DoRA: also trains the weights' magnitudes, arXiv:2402.09353"
    )
    init_lora_weights: str = Field(
        "default", description="default, gaussian, orthogonal, olora, pissa, or pissa_niter_N"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_rank(cls, value: Any) -> Any:
        if isinstance(value, dict) and {"rank", "r"} <= value.keys():
            raise ValueError("r is another name for rank; give only one of them")
        return value

    @field_validator("init_lora_weights")
    @classmethod
    def _known_init(cls, value: str) -> str:
        if value in UNSUPPORTED_INITS:
            raise ValueError(f"'{value}' is not supported: {UNSUPPORTED_INITS[value]}")
        if not re.fullmatch("default|gaussian|orthogonal|olora|pissa|pissa_niter_[0-9]+", value):
            raise ValueError("expected default, gaussian, orthogonal, olora, pissa, pissa_niter_N")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Lora:
        if self.use_dora and self.changes_base:
            raise ValueError(
                f"use_dora cannot be combined with init_lora_weights '{self.init_lora_weights}': "
                "peft cannot turn the result into an adapter of the unchanged base"
            )
        if self.init_lora_weights == "orthogonal" and self.rank % 2:
            raise ValueError(f"orthogonal initialization needs an even rank, not {self.rank}")
        return self

    @property
    def changes_base(self) -> bool:
        """Says whether initialization moves part of the base into the adapter (PiSSA, OLoRA)."""
        return self.init_lora_weights.startswith(("pissa", "olora"))

    def targets(self, layer: str) -> bool:
        """Says whether a linear layer gets a LoRA; like peft, compares target modules with the end
        of its name, and leaves out the head unless it is named."""
        if self.target_modules == "all-linear":
            return layer != "lm_head"
        return any(f".{layer}".endswith(f".{target}") for target in self.target_modules)


def micro_batch_size(batch_size: int) -> int:
    """Returns the largest divisor of the batch size up to 8."""
    return max(rows for rows in range(1, 9) if batch_size % rows == 0)


class Train(Section):
    """Optimization. Machine options (device, processes) belong to accelerate."""

    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: Positive | None = Field(
        None, description="stop after this many optimizer steps, whatever `epochs` says"
    )
    batch_size: Positive = Field(
        16, description="rows per optimizer step, over all processes and accumulation steps"
    )
    micro_batch_size: Positive = Field(
        default_factory=lambda section: micro_batch_size(section.get("batch_size", 1)),
        description="rows per forward pass of one process; decides memory, not the result; "
        "default: the largest divisor of batch_size up to 8",
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate, after warmup")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate schedule after warmup"
    )
    warmup: Fraction = Field(0.03, description="share of the steps that warm up linearly")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of the optimizer")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    optimizer: str = Field("adamw_torch", description="optimizer, a value of transformers' `optim`")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="arithmetic; auto: bf16 if the hardware computes in it natively"
    )
    kernels: Literal["auto", "liger", "plain"] = Field(
        "auto",
        description="kernels of norms and MLPs; auto: Liger's if installed and on a CUDA GPU",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    eval_steps: Positive | None = Field(
        None, description="steps between evaluations; default: at the end of each epoch"
    )
    early_stopping_patience: Positive | None = Field(
        None, description="stop after this many evaluations without a lower loss; keep the best"
    )
    save_steps: Positive | None = Field(
        None, description="steps between checkpoints; default: at the end of each epoch"
    )
    save_total_limit: Positive = Field(2, description="checkpoints to keep")
    logging_steps: Positive = Field(10, description="steps between log entries")
    report_to: Annotated[list[Tracker], one_or_more(Tracker)] = Field(
        default_factory=list, description="experiment trackers to log to"
    )

    @model_validator(mode="before")
    @classmethod
    def _quantization_aware_has_moved(cls, value: Any) -> Any:
        if isinstance(value, dict) and "quantization_aware" in value:
            raise ValueError(
                "quantization_aware is now quantize.training: {steps, learns, learning_rate, "
                "distillation}, a separate stage after plain LoRA; steps is required"
            )
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Train:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.early_stopping_patience and self.eval_steps != self.save_steps:
            raise ValueError(
                "early_stopping_patience keeps the best checkpoint, so save_steps "
                f"({self.save_steps}) must equal eval_steps ({self.eval_steps})"
            )
        return self


class QuantizationAwareTraining(Section):
    """Training of the merged model through the fake-quantized weights that `quantize` ships."""

    steps: Positive = Field(description="number of optimizer steps")
    learns: Literal["adapter", "scales"] = Field(
        "adapter",
        description="what is trained: a LoRA that moves weights from code to code, with lora's "
        "rank, alpha, and target_modules, but no dropout or DoRA; or the scales of the codes, at a "
        "learning rate relative to each scale",
    )
    learning_rate: float | None = Field(None, gt=0, description="default: train.learning_rate")
    distillation: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="weight of the divergence from the tuned model in the loss; the rest is the "
        "cross-entropy with the answers",
    )


class Calibration(Section):
    """The text whose activations a calibrated method uses."""

    data: Sources = Field(default_factory=list, description="sources; default: the training rows")
    tokens: Positive = Field(
        16384, description="number of tokens; more take longer and give a better model"
    )
    length: Annotated[int, Field(gt=1)] = Field(
        512, description="tokens per sequence; the default is lowered to the base's positions"
    )
    steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="optimizer steps that train each block to reproduce the float block's "
        "output; 0: none",
    )
    scale_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="optimizer steps, of 1,024 tokens each, that finally train all scales together "
        "to reproduce the float model's predictions; the whole model is in memory; 0: none",
    )


Bits = Annotated[int, Field(ge=1, le=8)]
GroupSize = Annotated[int, Field(ge=32, le=256)]


class Layer(Section):
    """Settings for some layers; keys that are left out come from the section `quantize`."""

    bits: Bits | None = Field(None, description="bits per code")
    group_size: GroupSize | None = Field(None, description="weights that share a scale")


# With a discriminator, pydantic does not also report an invalid mapping as an invalid word.
LayerOrFloat = Annotated[
    Annotated[Layer, Tag("mapping")] | Annotated[Literal["float"], Tag("word")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "mapping"),
]


def _rotates(quantize: dict[str, Any]) -> bool:
    """Returns whether to rotate by default: a rotated head needs its own weights, but a float head
    may be tied to the embedding, and an 8-bit head shares the codes of an 8-bit embedding."""
    head = quantize.get("head")
    for pattern, layer in quantize.get("layers", {}).items():  # the last match wins
        head = layer if fnmatchcase("lm_head", pattern) else head
    return head != "float" and (head, quantize.get("embedding")) != (8, 8)


EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"method": "rtn", "rotate": False},
    "balanced": {},
    "best": {"calibration": {"tokens": 32768, "steps": 32, "scale_steps": 100}},
}
"""Defaults of the section `quantize` that differ from those of balanced."""


class Quantize(Section):
    """Symmetric groupwise integer weights; int8 asymmetric per-token dynamic activations."""

    effort: Literal["fast", "balanced", "best"] = Field(
        "balanced",
        exclude=True,  # the keys whose defaults it decides are dumped instead
        description="defaults of other keys; fast: rounds to nearest, in seconds; balanced: "
        "calibrates a rotated model; best: also trains blocks and scales, loses about half as "
        "much on plain text, and takes twice as long on a GPU, many times as long on a CPU",
    )

    bits: Bits = Field(
        4, description="bits per code; 1 is for experiments only: its codes are -1 and 0"
    )
    group_size: GroupSize = Field(
        32, description="weights that share a scale; must divide in_features of every layer"
    )
    layers: dict[str, LayerOrFloat] = Field(
        default_factory=dict,
        description="exceptions by a pattern of layer names, such as '*.down_proj': {bits, "
        "group_size}, or float; the last match wins",
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="average bits per quantized weight, scales included; instead of `bits`, each "
        "layer gets bits according to its measured sensitivity",
    )
    head: Literal["quantize", "float", 8] = Field(
        "quantize",
        description="lm_head: quantized like other layers, float, or at 8 bits; quantizing it "
        "unties it from the embedding",
    )
    embedding: Literal["float", 8, 4] = Field(
        "float",
        description="bits of the embedding's weights; quantizing it unties the head, except that "
        "8 with `head: 8` gives one table in formats that can share it",
    )
    method: Method = Field(
        "gptq",
        description="; ".join(f"{name}: {entry.description}" for name, entry in METHODS.items()),
    )
    scale: Literal["max", "search"] = Field(
        "search",
        description="scales for rtn and gptq; max: from a group's largest weight; search: those "
        "with the least error",
    )
    calibration: Calibration = Field(
        Calibration(), description="text for a calibrated method, and for a budget"
    )
    training: QuantizationAwareTraining | None = Field(
        None, description="quantization-aware training, from the codes of `method`; default: none"
    )
    rotate: bool = Field(
        default_factory=_rotates,
        description="rotate the hidden states so that outliers spread over all channels; the "
        "rotation is folded into the weights and costs nothing at run time; default: true if the "
        "head is quantized and does not share a table with the embedding",
    )
    scale_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="dtype of the scales; every export stores bfloat16 exactly"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of embedding, norms, and arithmetic; auto: the base's, but bfloat16 for "
        "a GGUF file, and float32 for float64",
    )
    keep_merged: bool = Field(False, description="also write the merged float checkpoint")
    exports: Annotated[list[Export], one_or_more(Export)] = Field(
        default_factory=list,
        description="further formats for the same codes, in exports/; torchao is quantized/ itself",
    )
    cache_length: Positive = Field(
        2048,
        description="tokens of prompt and answer together in the executorch and onnx exports, "
        "whose cache or rotary tables have a fixed length; at most the base's positions, sliding "
        "window, or original positions (LongRoPE)",
    )

    @model_validator(mode="before")
    @classmethod
    def _effort_decides_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("effort") not in EFFORTS:
            return value
        defaults = EFFORTS[value["effort"]]
        calibration = value.get("calibration", {})
        if isinstance(calibration, dict) and "calibration" in defaults:
            value = value | {"calibration": defaults["calibration"] | calibration}
        return defaults | value

    @property
    def reads_calibration_text(self) -> bool:
        """Says whether the method, or the training of all scales, reads calibration text."""
        return METHODS[self.method].is_calibrated or self.calibration.scale_steps > 0

    @field_validator("exports")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f"list each format once, not {', '.join(value)}")
        return value


class Corpus(Section):
    """A text to measure perplexity on."""

    name: Annotated[str, Field(pattern=NAME)] = Field(description="name in the report")
    source: str = Field(
        description="text file, or a pattern of several; file or folder of rows, as for "
        "data.train; or Hub dataset id",
        min_length=1,
    )
    config: str | None = Field(None, description="Hub dataset configuration")
    split: str = Field(
        "test", description="split of a Hub dataset, or of a folder or file that has several"
    )
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    column: str = Field("text", description="column of the rows that holds the text")
    documents: Literal["file", "rows", "wikitext"] = Field(
        "file",
        description="what counts as a document: the whole file, each row, or each ' = Title = ' "
        "article (wikitext also undoes the tokenization, as lm-eval does)",
    )
    max_length: Annotated[int, Field(gt=1)] = Field(2048, description="tokens of a window")
    windows: Positive | None = Field(None, description="score only the first N windows")


class Task(Section):
    """An lm-eval task by name."""

    task: str = Field(description="name of an lm-eval task, group, or tag")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="examples in the prompt; default: the task's own number"
    )
    limit: Positive | None = Field(None, description="use the first N documents only")
    apply_chat_template: bool = Field(
        False,
        description="ask through the chat template, with examples as earlier turns, like "
        "lm-eval's --apply_chat_template",
    )


class Gate(Section):
    """Limits on what quantization may cost; a run that exceeds them exits with code 1."""

    max_perplexity_increase: float | None = Field(
        None, ge=0, description="quantized / tuned - 1: 0.05 allows five percent"
    )
    max_accuracy_drop: float | None = Field(
        None, ge=0, description="tuned - quantized: 0.02 allows two percentage points"
    )
    min_same_answers: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of held-out rows to which each export, in its own runtime, must give "
        "the same answer as quantized: 0.98 allows two of a hundred to differ",
    )


class Evaluate(Section):
    """How to compare base, tuned, and quantized on the same inputs."""

    perplexity: Annotated[list[Corpus], one_or_more(Corpus)] = Field(
        default_factory=list, description="corpora to measure perplexity on"
    )
    tasks: Annotated[list[Task], one_or_more(Task, "task")] = Field(
        default_factory=list, description="lm-eval tasks to run"
    )
    task_folder: str | None = Field(None, description="folder with your own lm-eval task files")
    metrics: Annotated[list[Metric], one_or_more(Metric)] = Field(
        default_factory=lambda: ["exact_match"],
        description="metrics for answers to the held-out rows",
    )
    choices: list[str] | Literal["completions"] | None = Field(
        None,
        description="for multiple_choice: a list of answers, or `completions`: all in the data",
    )
    limit: Positive | None = Field(
        None, description="use this many held-out rows, chosen by the seed"
    )
    max_new_tokens: Positive = Field(128, description="maximum tokens of an answer")
    batch_size: Positive = Field(16, description="sequences per forward pass")
    divergence_tokens: Positive = Field(
        2048, description="tokens on which quantized is compared with tuned"
    )
    exports: bool = Field(
        True, description="also measure the exports; false: report only the size of each file"
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        5, description="rows whose answers the report shows side by side"
    )
    gate: Gate = Field(Gate(), description="limits on what quantization may cost")

    @model_validator(mode="after")
    def _combinations(self) -> Evaluate:
        names = [corpus.name for corpus in self.perplexity]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated or "held_out" in names:
            raise ValueError(
                "each perplexity corpus needs a unique name other than held_out; "
                f"found {', '.join(names)}"
            )
        if "multiple_choice" in self.metrics and not self.choices:
            raise ValueError("the metric multiple_choice needs `choices`")
        return self


HubId = Annotated[str, Field(pattern=HUB_ID)]
Language = Annotated[str, Field(pattern=LANGUAGE)]


class Publish(Section):
    """Where the result goes on the Hugging Face Hub, and what its page says."""

    repo_id: HubId | None = Field(None, description="repository: your-name/model-name")
    private: bool = Field(True, description="create a private repository")
    license: Annotated[str, Field(pattern=LICENSE)] | None = Field(
        None,
        description="the base's license, as the Hub names it; default: what the base states",
    )
    license_name: str | None = Field(None, description="name of the license if it is `other`")
    license_link: str | None = Field(None, description="link to the license if it is `other`")
    license_folder: str | None = Field(
        None,
        description="folder with LICENSE, NOTICE, and USE_POLICY, if they are not beside the base",
    )
    base_model: HubId | None = Field(
        None, description="Hub id of the base, if model.base is a folder or a package"
    )
    language: Annotated[list[Language], one_or_more(Language)] = Field(
        default_factory=list, description="languages of the model, such as en"
    )
    tags: Annotated[list[str], one_or_more(str)] = Field(
        default_factory=list, description="further tags for the model's page"
    )
    description: str | None = Field(None, description="what the model is for, in your own words")
    rows: bool = Field(
        False, description="also publish report.html, which shows held-out rows and answers"
    )

    @model_validator(mode="after")
    def _other_licenses_have_a_name(self) -> Publish:
        named = bool(self.license_name and self.license_link)
        if (self.license == "other") != named or bool(self.license_name) != bool(self.license_link):
            raise ValueError(
                "license: other needs license_name and license_link, which no other license takes"
            )
        return self


class Recipe(Section):
    """One recipe drives fine-tuning, quantization, evaluation, and publishing."""

    name: Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME)] = Field(
        description="name of the run"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="seed of splits, row order, adapter initialization, and dropout"
    )
    output_dir: str | None = Field(
        None, description="run directory, as seen from where the command runs; default: runs/NAME"
    )
    model: Model = Field(description="the base model")
    data: Data = Field(description="training and evaluation rows")
    lora: Lora = Field(Lora(), description="the adapter")
    train: Train = Field(Train(), description="how the adapter is trained")
    quantize: Quantize = Field(Quantize(), description="how the merged model is quantized")
    evaluate: Evaluate = Field(Evaluate(), description="what is measured")
    publish: Publish = Field(Publish(), description="where the result is published")

    @field_validator("output_dir")
    @classmethod
    def _home_in_full(cls, folder: str | None) -> str | None:
        try:
            return str(Path(folder).expanduser()) if folder else folder
        except RuntimeError:
            raise ValueError("no such user: write the folder's whole path") from None

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        evaluates = self.data.validation or self.data.validation_fraction
        if self.train.early_stopping_patience and not evaluates:
            raise ValueError(
                "train.early_stopping_patience needs validation rows: set data.validation, or "
                "data.validation_fraction to more than 0"
            )
        if self.quantize.training and self.quantize.budget:
            raise ValueError(
                "quantize.training cannot be combined with quantize.budget, which chooses the plan "
                "after training: quantize once without training, then copy `plan` of "
                "quantization.json to quantize.layers"
            )
        return self
