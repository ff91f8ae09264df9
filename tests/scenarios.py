"""Overrides of the trainings that several processes do, and one process for comparison."""

STEPS = ["train.save_steps=2", "lora.dropout=0.1"]
TRAINED = ["train.epochs=1", "train.save_steps=2", "train.micro_batch_size=2"]
PACKED = ["data.packing=true", "data.max_length=64", "train.epochs=1", "train.micro_batch_size=2"]
LORA = ["train.save_steps=2", "train.max_steps=3"]
AWARE = [
    *STEPS,
    "quantize.method=gptq",
    "quantize.calibration={tokens: 256, length: 32}",
    "quantize.training={steps: 3, distillation: 0.5}",
]
SGD = ["quantize.embedding=8", "train.optimizer=sgd", "train.learning_rate=0.3"]
CHECKPOINTED = ["train.micro_batch_size=2", "train.gradient_checkpointing=true"]
BEST = ["train.save_steps=1", "train.eval_steps=1", "train.early_stopping_patience=3"]
FAST = ["train.learning_rate=300"]  # the third step overshoots
SHARDED = {
    "adapter learns": [*SGD, "train.save_steps=2", "quantize.training={steps: 3}"],
    "adapter learns, taught": [
        *SGD,
        *CHECKPOINTED,
        "quantize.training={steps: 3, distillation: 0.5}",
    ],
    "scales learn": [*SGD, *FAST, *BEST, "quantize.training={steps: 3, learns: scales}"],
    "scales learn, taught": [
        "quantize.embedding=8",
        "train.save_steps=1",
        "train.eval_steps=1",
        "quantize.training={steps: 3, learns: scales, distillation: 0.5}",
    ],
}
"""With SGD, gradients show in the result as they are; Adam divides small ones by their size."""

DATA_FREE = ["rtn", "hqq"]
GPTQ = [
    "quantize.method=gptq",
    "quantize.head=float",
    "quantize.calibration={tokens: 256, length: 32}",
]
CALIBRATED = [
    "quantize.method=gptq",
    "quantize.head=float",
    "quantize.layers={'*.1.*': float}",
    "quantize.calibration={tokens: 288, length: 32, steps: 6, scale_steps: 6}",
]

MEASURED = [
    "evaluate.batch_size=3",
    "evaluate.metrics=[exact_match, multiple_choice]",
    "evaluate.choices=completions",
]
