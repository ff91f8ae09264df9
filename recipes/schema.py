"""What a recipe may say: its sections, their keys, their defaults.

Every section is frozen, strict ("3" is no number) and refuses unknown keys. Field descriptions
end up in `finequant schema`, so editors show them while a recipe is being written.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Export = Literal["torchao", "compressed-tensors", "gguf", "executorch"]
Metric = Literal[
    "exact_match",
    "json_match",
    "f1",
    "tool_call_match",
    "tool_call_recall",
    "multiple_choice",
    "rouge",
    "bleu",
    "chrf",
]

# peft initialisations that need calibration data or an already quantized base.
UNSUPPORTED_INITS = {
    "loftq": "it needs a base that is quantized before training; here quantization comes after",
    "corda": "it needs a calibration pass over the base",
    "eva": "it needs a calibration pass over the base",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The base model: any LlamaForCausalLM."""

    base: str = Field(
        description="Hub id (org/name), local folder, or package:MODULE/FILE.gguf", min_length=1
    )
    revision: str | None = Field(None, description="Hub commit, tag or branch; pin a commit")
    chat_template: str | None = Field(
        None,
        description="Jinja template, or the path of a .jinja file; replaces the tokenizer's own",
    )


class Source(Section):
    """Rows from one place: a Hub dataset, or local files (JSON, JSON Lines, CSV, TSV, Parquet,
    Arrow, text; also compressed), a folder of them, or a pattern such as shards/*.parquet."""

    source: str = Field(
        description="Hub dataset id, or a file path relative to the recipe", min_length=1
    )
    name: str | None = Field(None, description="Hub dataset configuration")
    split: str = Field(
        "train", description="of a Hub dataset, or of a folder or file that has several"
    )
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "text"] = "auto"
    columns: dict[Literal["messages", "system", "tools", "prompt", "completion", "text"], str] = (
        Field(
            default_factory=dict,
            description="field: a column, a field inside it such as answers.text[0], or a "
            "template such as 'Question: {question}'",
        )
    )
    weight: float = Field(1.0, gt=0, description="how often each row is seen in an epoch")
    limit: Positive | None = Field(None, description="use this many rows, a seeded choice")

    @model_validator(mode="after")
    def _columns_make_a_row(self) -> Source:
        mapped = set(self.columns)
        whole = {"messages"} <= mapped or {"text"} <= mapped or {"prompt", "completion"} <= mapped
        if mapped and not whole:
            raise ValueError("columns must map messages, text, or both prompt and completion")
        return self


Sources = list[Source]
SourcesInput = Source | str | list[Source | str]


def one_source_is_a_list(value: Any) -> Any:
    """`source: rows.jsonl` may be written as `rows.jsonl`, and a list of one without its list."""
    entries = value if isinstance(value, list) else [value]
    return [{"source": entry} if isinstance(entry, str) else entry for entry in entries]


class Data(Section):
    """Rows to learn from and rows to measure on, and how they become tokens."""

    train: Annotated[Sources, Field(min_length=1)]
    validation: Sources = Field(default_factory=list)
    test: Sources = Field(default_factory=list)
    validation_fraction: Fraction = Field(
        0.05, description="of the training rows, where no validation source is given"
    )
    test_fraction: Fraction = Field(
        0.0, description="of the training rows, where no test source is given"
    )
    system: str | None = Field(None, description="system message for rows that have none")
    template_arguments: dict[str, Any] = Field(
        default_factory=dict, description="variables of the chat template, such as date_string"
    )
    max_length: Positive = Field(1024, description="tokens of a row, or of a pack")
    long_rows: Literal["truncate", "drop", "error", "split"] = Field(
        "truncate", description="split: texts only, into pieces of max_length"
    )
    loss_on: Literal["assistant", "all"] = "assistant"
    missing_end: Literal["error", "allow"] = Field(
        "error",
        description="where no token ends an answer (in the chat template) or a text (the "
        "tokenizer's EOS); allow: the model does not learn to stop",
    )
    packing: bool = Field(False, description="fill max_length with several rows, kept apart")
    bad_rows: Literal["error", "drop", "repair"] = Field(
        "error",
        description="rows that cannot be used: list them and stop, leave them out, or mend them "
        "(drop an empty turn, merge turns that a user or system repeats, cut turns after the last "
        "answer) and leave out what cannot be mended",
    )
    same_rows: Literal["prompt", "row"] | None = Field(
        None,
        description="what makes rows the same in splits, overlap and duplicates: the prompt, or "
        "the answer too; default: prompt, but row where training has fewer than 10 prompts",
    )
    duplicates: Literal["keep", "drop"] = Field("keep", description="repeated training rows")
    overlap: Literal["error", "drop"] = Field(
        "error", description="training rows that also occur in validation or test"
    )

    _sources = field_validator(
        "train", "validation", "test", mode="before", json_schema_input_type=SourcesInput
    )(one_source_is_a_list)


class Lora(Section):
    """The adapter, in peft's words."""

    rank: Positive = Field(16, validation_alias=AliasChoices("rank", "r"))
    alpha: float = Field(32, gt=0)
    dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = Field(
        "default", description="default, gaussian, orthogonal, olora, pissa or pissa_niter_N"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_rank(cls, value: Any) -> Any:
        if isinstance(value, dict) and {"rank", "r"} <= value.keys():
            raise ValueError("r is another name of rank; give one of them")
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
        if self.use_dora and self.init_lora_weights.startswith(("pissa", "olora")):
            raise ValueError(
                f"use_dora cannot be combined with init_lora_weights '{self.init_lora_weights}': "
                "peft cannot turn the result into an adapter of the unchanged base"
            )
        if self.init_lora_weights == "orthogonal" and self.rank % 2:
            raise ValueError(f"orthogonal initialisation needs an even rank, not {self.rank}")
        return self


def micro_batch_size(batch_size: int) -> int:
    """The largest divisor of the batch size up to 8."""
    return max(rows for rows in range(1, 9) if batch_size % rows == 0)


class Train(Section):
    """Optimisation. Machine options (device, processes) belong to accelerate."""

    epochs: float = Field(1.0, gt=0)
    max_steps: Positive | None = Field(None, description="stop after so many optimizer steps")
    batch_size: Positive = Field(
        16, description="rows per optimizer step, over all processes and accumulation steps"
    )
    micro_batch_size: Positive = Field(
        default_factory=lambda section: micro_batch_size(section.get("batch_size", 1)),
        description="rows per forward pass of one process; decides memory, not the result; "
        "default: the largest divisor of batch_size up to 8",
    )
    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = Field(0.03, description="share of all steps")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: str = Field("adamw_torch", description="a name of transformers' `optim`")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 where the hardware computes in it"
    )
    gradient_checkpointing: bool = False
    eval_steps: Positive | None = Field(None, description="default: at the end of each epoch")
    early_stopping_patience: Positive | None = Field(
        None, description="stop after so many evaluations without a lower loss; keep the best"
    )
    save_steps: Positive | None = Field(None, description="default: at the end of each epoch")
    save_total_limit: Positive = 2
    logging_steps: Positive = 10
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _quantization_aware_has_moved(cls, value: Any) -> Any:
        if isinstance(value, dict) and "quantization_aware" in value:
            raise ValueError(
                "quantization_aware is now quantize.training: {steps, learns, learning_rate, "
                "distillation}, a stage of its own after plain LoRA; steps is required"
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

    steps: Positive = Field(description="optimizer steps")
    learns: Literal["adapter", "scales"] = Field(
        "adapter",
        description="a LoRA that moves weights from code to code, or the scales of the codes; "
        "a scale's learning rate is relative to the scale",
    )
    learning_rate: float | None = Field(None, gt=0, description="default: train.learning_rate")
    distillation: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="weight of the divergence from the tuned model in the loss; the rest is the "
        "cross-entropy with the answers",
    )


class Calibration(Section):
    """Text whose activations gptq keeps."""

    data: Sources = Field(default_factory=list, description="default: the training rows")
    tokens: Positive = Field(16384, description="more cost time and give a better model")
    length: Annotated[int, Field(gt=1)] = Field(512, description="tokens of a sequence")
    steps: Annotated[int, Field(ge=0)] = Field(
        0, description="in which each block then learns what the float block gives; 0: none"
    )

    _sources = field_validator("data", mode="before", json_schema_input_type=SourcesInput)(
        one_source_is_a_list
    )


Bits = Annotated[int, Field(ge=1, le=8)]
GroupSize = Annotated[int, Field(ge=32, le=256)]


class Layer(Section):
    """What is particular to some layers; what is left out is as in the rest of the section."""

    bits: Bits | None = None
    group_size: GroupSize | None = None


# With a discriminator, mistakes in a mapping are not also reported as not being a word.
LayerOrFloat = Annotated[
    Annotated[Layer, Tag("mapping")] | Annotated[Literal["float"], Tag("word")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "mapping"),
]


class Quantize(Section):
    """Symmetric groupwise integer weights, int8 asymmetric per-token dynamic activations."""

    bits: Bits = Field(4, description="1 is for measuring: codes -1 and 0, nothing positive")
    group_size: GroupSize = Field(
        32, description="weights that share a scale; must divide in_features of every layer"
    )
    layers: dict[str, LayerOrFloat] = Field(
        default_factory=dict,
        description="pattern of layer names, such as '*.down_proj': {bits, group_size} or float; "
        "the last that matches counts",
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="bits per rounded weight, scales included: chooses each layer's bits by "
        "measured sensitivity, in place of `bits`",
    )
    head: Literal["quantize", "float"] = Field(
        "quantize",
        description="lm_head; where it is tied to the embedding, `quantize` unties it",
    )
    embedding: Literal["float", 8, 4] = Field(
        "float", description="bits of its weights, which have no activations; unties the head"
    )
    method: Literal["rtn", "hqq", "gptq"] = Field(
        "rtn", description="round to nearest, half-quadratic, or calibrated block by block"
    )
    scale: Literal["max", "search"] = Field(
        "max", description="of rtn and gptq: reaches the largest weight, or has the least error"
    )
    calibration: Calibration = Calibration()
    training: QuantizationAwareTraining | None = Field(
        None, description="quantization-aware training, from the codes of `method`; default: none"
    )
    rotate: bool = Field(
        False,
        description="turns the hidden states, so that outliers spread over all places; it is "
        "folded into the weights and costs nothing at run time",
    )
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="embedding, norms and arithmetic; auto: as the base is stored"
    )
    keep_merged: bool = Field(False, description="also keep the merged float checkpoint")
    exports: list[Export] = Field(
        default_factory=list,
        description="further formats of the same codes, in exports/; torchao is quantized/ itself",
    )
    cache_length: Positive = Field(
        2048,
        description="of the executorch export: tokens of its static key-value cache, prompt and "
        "answer together; at most the base's positions",
    )

    @field_validator("exports")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f"each format once; found {', '.join(value)}")
        return value


class Corpus(Section):
    """A text to measure perplexity on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    source: str = Field(
        description="text file, .jsonl, .json, .csv, .parquet or Hub dataset id", min_length=1
    )
    config: str | None = Field(None, description="Hub dataset configuration")
    split: str = Field("test", description="Hub dataset split")
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    column: str = "text"
    documents: Literal["file", "rows", "wikitext"] = Field(
        "file",
        description="what stands alone: everything as one text, each row, or each ' = Title = ' "
        "article (wikitext also undoes the tokenisation, as lm-eval does)",
    )
    max_length: Annotated[int, Field(gt=1)] = Field(2048, description="tokens of a window")
    windows: Positive | None = Field(None, description="score only the first N windows")


class Task(Section):
    """An lm-eval task by name."""

    task: str
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Positive | None = None
    apply_chat_template: bool = Field(
        False,
        description="ask through the chat template, examples as earlier turns; as lm-eval's "
        "--apply_chat_template",
    )


class Gate(Section):
    """What quantization may cost; a run beyond it exits with code 1."""

    max_perplexity_increase: float | None = Field(
        None, ge=0, description="quantized over tuned, minus 1: 0.05 allows five percent"
    )
    max_accuracy_drop: float | None = Field(
        None, ge=0, description="tuned minus quantized, absolute: 0.02 allows two points"
    )


class Evaluate(Section):
    """Base, tuned and quantized on the same inputs."""

    perplexity: list[Corpus] = Field(default_factory=list)
    tasks: list[Task] = Field(default_factory=list)
    task_folder: str | None = Field(None, description="folder with lm-eval task YAML of your own")
    metrics: list[Metric] = Field(
        default_factory=lambda: ["exact_match"], description="of answers to the held-out rows"
    )
    choices: list[str] | Literal["completions"] | None = Field(
        None, description="for multiple_choice: the answers, or all that occur in the data"
    )
    limit: Positive | None = Field(None, description="held-out rows to answer, the first N")
    max_new_tokens: Positive = 128
    batch_size: Positive = Field(16, description="sequences per forward pass")
    divergence_tokens: Positive = Field(
        2048, description="tokens on which quantized is compared with tuned"
    )
    samples: Annotated[int, Field(ge=0)] = Field(5, description="answers to show side by side")
    gate: Gate = Gate()

    @field_validator("tasks", mode="before", json_schema_input_type=Task | str | list[Task | str])
    @classmethod
    def _a_name_is_a_task(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        return [{"task": entry} if isinstance(entry, str) else entry for entry in entries]

    @model_validator(mode="after")
    def _combinations(self) -> Evaluate:
        names = [corpus.name for corpus in self.perplexity]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated or "held_out" in names:
            raise ValueError(
                "each perplexity corpus needs a name of its own, other than held_out; "
                f"found {', '.join(names)}"
            )
        if "multiple_choice" in self.metrics and not self.choices:
            raise ValueError("the metric multiple_choice needs `choices`")
        return self


HubId = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
Language = Annotated[str, Field(pattern=r"^([a-z]{2,3}|code|multilingual)$")]


class Publish(Section):
    """Where the result goes on the Hugging Face Hub, and what its page says of it."""

    repo_id: HubId | None = Field(None, description="your-name/model-name")
    private: bool = True
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")] | None = Field(
        None, description="of the base, as the Hub names it; default: what the base says itself"
    )
    license_name: str | None = Field(None, description="where license is `other`")
    license_link: str | None = Field(None, description="where license is `other`")
    license_folder: str | None = Field(
        None, description="folder with the base's LICENSE, NOTICE and USE_POLICY; default: the base"
    )
    base_model: HubId | None = Field(
        None, description="Hub id of the base, where model.base is a folder or a package"
    )
    language: list[Language] = Field(default_factory=list, description="such as en")
    tags: list[str] = Field(default_factory=list)
    description: str | None = Field(None, description="what the model is for, in your words")

    @field_validator("language", "tags", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _other_licences_have_a_name(self) -> Publish:
        named = bool(self.license_name and self.license_link)
        if (self.license == "other") != named or bool(self.license_name) != bool(self.license_link):
            raise ValueError("license: other, license_name and license_link belong together")
        return self


class Recipe(Section):
    """One recipe drives fine-tuning, quantization, evaluation and publishing."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output_dir: str | None = Field(None, description="the run directory; default runs/NAME")
    model: Model
    data: Data
    lora: Lora = Lora()
    train: Train = Train()
    quantize: Quantize = Quantize()
    evaluate: Evaluate = Evaluate()
    publish: Publish = Publish()

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        evaluates = self.data.validation or self.data.validation_fraction
        if self.train.early_stopping_patience and not evaluates:
            raise ValueError(
                "train.early_stopping_patience needs validation rows: give data.validation or "
                "a data.validation_fraction above 0"
            )
        if self.quantize.training and self.quantize.budget:
            raise ValueError(
                "quantize.training cannot be combined with quantize.budget, which chooses the plan "
                "after training: quantize once without training, then copy `plan` of "
                "quantization.json to quantize.layers"
            )
        return self
