"""Which tokens are targets; and packed rows are trained on as if each stood alone."""

from __future__ import annotations

import copy
from itertools import groupby
from typing import Any

import pytest
import torch
from conftest import difference

from finequant.finetune.data.dataset import dataset_for_training, to_dataset
from finequant.finetune.data.row import Row
from finequant.finetune.data.splits import load_splits
from finequant.finetune.data.table import Rows
from finequant.finetune.data.tokens import IGNORED, Encoded, encode, encode_prompt
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Data

END = "<|im_end|>"
CONVERSATIONS = {
    "one turn": ["open the red door", "done"],
    "system": ["Be brief.", "open the red door", "done"],
    "three turns": ["open", "ok", "close the\n lamp", '{"do": "close"}', "paint", "ok"],
    "three turns and system": ["Be brief.", "open", "ok", "close", " ok \n", "paint", "ok"],
    "more bytes than characters": ["où est 東京?", "à l'est ✓ 🌊"],
    "other turns' words": ["say assistant\nok", "assistant\nok", "ok", "user"],
}

# Llama 3's template, without tools.
LLAMA_3_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'system' and date_string is defined %}"
    "{{ 'Today Date: ' + date_string + '\n\n' }}{% endif %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def conversation(*contents: str) -> Row:
    """Makes turns of user and assistant; of an odd number, the first is the system's."""
    roles = ["user", "assistant"] * (len(contents) // 2)
    roles = ["system", *roles] if len(contents) % 2 else roles
    turns = zip(roles, contents, strict=True)
    return Row("rows.jsonl:7", tuple({"role": role, "content": said} for role, said in turns))


def settings(**changes: Any) -> Data:
    return Data(train="rows.jsonl", **changes)


def target_texts(encoded: Encoded, tokenizer) -> list[str]:
    """Returns the text of every unbroken run of target tokens."""
    runs = groupby(encoded.labels, key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(labels)) for is_target, labels in runs if is_target]


def with_template(tokenizer, template: str | None):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def adding_bos(tokenizer):
    """Makes a tokenizer that puts BOS before every text, as Llama's do."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    bos = changed.bos_token
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, changed.bos_token_id)]
    )
    return changed


@pytest.fixture(scope="module")
def llama_3(tokenizer):
    changed = copy.deepcopy(tokenizer)
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    changed.add_special_tokens(
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "extra_special_tokens": [f"<|{name}|>" for name in names[2:]],
        }
    )
    changed.chat_template = LLAMA_3_TEMPLATE
    return adding_bos(changed)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_and_their_ends_are_the_only_targets(tokenizer, name):
    row = conversation(*CONVERSATIONS[name])
    encoded = encode(row, tokenizer, settings())
    answers = [turn["content"] for turn in row.messages if turn["role"] == "assistant"]
    assert target_texts(encoded, tokenizer) == [answer + END for answer in answers]
    assert encoded.input_ids == tokenizer.apply_chat_template(row.messages, return_dict=False)
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    assert all(label in (token, IGNORED) for token, label in pairs)
    assert encoded.full_length == len(encoded.input_ids)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_ends_where_the_last_answer_begins(tokenizer, name):
    row = conversation(*CONVERSATIONS[name])
    encoded = encode(row, tokenizer, settings())
    last = len(encoded.labels) - encoded.labels[::-1].index(tokenizer.eos_token_id)
    start = max(at for at, label in enumerate(encoded.labels[:last]) if label == IGNORED) + 1
    assert encode_prompt(row, tokenizer, settings()) == encoded.input_ids[:start]


def test_all_tokens_can_be_targets(tokenizer):
    encoded = encode(conversation("open", "ok"), tokenizer, settings(loss_on="all"))
    assert encoded.labels == encoded.input_ids
    assert encoded.input_ids == encode(conversation("open", "ok"), tokenizer, settings())[0]


def test_a_greeting_of_weight_0_is_no_target_if_all_else_is(tokenizer):
    contents = ("hello", "open", "ok")
    roles = ("assistant", "user", "assistant")
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    row = Row("rows.jsonl:7", tuple(turns), excluded=frozenset({0}))
    encoded = encode(row, tokenizer, settings(loss_on="all"))
    assert encoded.input_ids == tokenizer.apply_chat_template(turns, return_dict=False)
    (learned,) = target_texts(encoded, tokenizer)
    assert learned == tokenizer.decode(encoded.input_ids).partition("hello" + END)[2]


def test_raw_text_is_a_target_to_its_end(tokenizer):
    row = Row("rows.jsonl:1", text="open the red door")
    encoded = encode(row, tokenizer, settings())
    assert target_texts(encoded, tokenizer) == ["open the red door" + END]
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1


def test_raw_text_ends_once_where_the_tokenizer_ends_it_too(tokenizer):
    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    row = Row("rows.jsonl:1", text="open the red door")
    assert encode(row, ending, settings()) == encode(row, tokenizer, settings())


def test_a_tokenizer_that_adds_bos_does_not_double_it(tokenizer):
    template = "{{ bos_token }}" + tokenizer.chat_template
    doubling = adding_bos(with_template(tokenizer, template))
    row = conversation("open", "ok", "close", "ok")
    text = Row("rows.jsonl:1", text="open")
    assert doubling("open")["input_ids"][0] == tokenizer.bos_token_id
    for ids in (
        encode(row, doubling, settings()).input_ids,
        encode(row, doubling, settings(loss_on="all")).input_ids,
        encode_prompt(row, doubling, settings()),
        encode(text, doubling, settings()).input_ids,
    ):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_the_llama_3_template_has_its_targets(llama_3):
    row = conversation("Be brief.", "open", "ok", "close", " ok ")
    encoded = encode(row, llama_3, settings())
    assert target_texts(encoded, llama_3) == ["ok<|eot_id|>", "ok<|eot_id|>"]
    assert encoded.input_ids[0] == llama_3.bos_token_id
    assert encoded.input_ids.count(llama_3.bos_token_id) == 1
    prompt = encode_prompt(row, llama_3, settings())
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt) - 1] == IGNORED
    assert llama_3.decode(encoded.labels[len(prompt) :]) == "ok<|eot_id|>"


def test_template_arguments_reach_the_template(llama_3):
    row = conversation("Be brief.", "open", "ok")
    data = settings(template_arguments={"date_string": "26 Jul 2026"})
    told = "system<|end_header_id|>\n\nToday Date: 26 Jul 2026\n\nBe brief.<|eot_id|>"
    assert told in llama_3.decode(encode(row, llama_3, data).input_ids)
    assert told in llama_3.decode(encode_prompt(row, llama_3, data))
    assert "Today" not in llama_3.decode(encode(row, llama_3, settings()).input_ids)


@pytest.mark.parametrize("most", [5, 12, 1000])
def test_rows_are_cut_at_their_end(tokenizer, most):
    row = conversation("open the red door at 1 o'clock", "done", "close", "done")
    whole = encode(row, tokenizer, settings())
    cut = encode(row, tokenizer, settings(max_length=most))
    assert cut.full_length == whole.full_length
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:most], whole.labels[:most])
    assert len(cut.input_ids) == min(most, whole.full_length)


ROWS = [
    conversation("open", "ok"),
    Row("rows.jsonl:8", conversation("open", "ok " * 40).messages),
    Row("rows.jsonl:9", conversation("close", "ok").messages),
]


def test_long_rows_are_truncated_dropped_or_an_error(tokenizer, capsys):
    lengths = [encode(row, tokenizer, settings()).full_length for row in ROWS]
    assert max(lengths[0], lengths[2]) < 40 < lengths[1]
    rows = Rows.of(ROWS)
    rows.name = "train"
    cut = dataset_for_training(rows, tokenizer, settings(max_length=40), 64)
    assert [len(ids) for ids in cut["input_ids"]] == [lengths[0], 40, lengths[2]]
    assert [len(labels) for labels in cut["labels"]] == [lengths[0], 40, lengths[2]]
    line = "data.train: 1 row longer than data.max_length=40"
    assert capsys.readouterr().err == f"{line} cut to that length\n"
    drop = settings(max_length=40, long_rows="drop")
    left = dataset_for_training(rows, tokenizer, drop, 64)
    assert capsys.readouterr().err == f"{line} left out\n"
    assert [len(ids) for ids in left["input_ids"]] == [lengths[0], lengths[2]]
    dataset_for_training(rows, tokenizer, settings(max_length=200), 256)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError) as error:
        to_dataset(ROWS, tokenizer, settings(max_length=40, long_rows="error"))
    assert "1 row longer than data.max_length=40; raise it" in str(error.value)
    assert str(error.value).endswith(f"\n  rows.jsonl:8: {lengths[1]} tokens")


def test_long_texts_are_split_and_no_token_is_lost(tokenizer):
    book = Row("book.txt", (), "open the red door " * 20)
    whole = encode(book, tokenizer, settings(), whole=True).input_ids
    pieces = to_dataset([book], tokenizer, settings(max_length=16, long_rows="split"))["input_ids"]
    assert [token for piece in pieces for token in piece] == whole
    assert len(pieces) > 2
    assert all(len(piece) == 16 for piece in pieces[:-1])


def test_a_row_of_the_maximum_length_is_kept_whole(tokenizer):
    most = encode(ROWS[1], tokenizer, settings()).full_length
    for policy in ("drop", "error"):
        data = settings(max_length=most, long_rows=policy)
        assert len(to_dataset(ROWS, tokenizer, data)["labels"][1]) == most


def test_dropping_every_row_is_an_error(tokenizer):
    with pytest.raises(UserError, match="all 3 rows are longer than data.max_length=4.*raise"):
        to_dataset(ROWS, tokenizer, settings(max_length=4, long_rows="drop"))
    with pytest.raises(UserError, match="the only row is longer than data.max_length=4, and"):
        to_dataset(ROWS[:1], tokenizer, settings(max_length=4, long_rows="drop"))


def test_a_row_without_target_tokens_is_named(tokenizer):
    long = Row("rows.jsonl:8", conversation("open " * 40, "ok").messages)
    with pytest.raises(UserError) as error:
        to_dataset([ROWS[0], long], tokenizer, settings(max_length=30))
    assert "nothing is left to learn in 1 row:" in str(error.value)
    assert "raise data.max_length, or set data.long_rows=drop" in str(error.value)
    assert str(error.value).endswith("\n  rows.jsonl:8")


def test_the_first_token_of_a_row_is_no_target(tokenizer):
    """Nothing comes before it that could predict it."""
    with pytest.raises(UserError, match="nothing is left to learn in 1 row:"):
        to_dataset([Row("rows.jsonl:1", text="open")], tokenizer, settings(max_length=1))


FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}"
    "{{ message['role'] + ': ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_a_prompt_that_ends_in_a_space_keeps_it(tokenizer):
    """By themselves, byte-level tokenizers would join the space with the answer's first word."""
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    spaced = with_template(tokenizer, template)
    row = conversation("paint the door", "the red door", "close", "ok")
    encoded = encode(row, spaced, settings())
    assert target_texts(encoded, tokenizer) == ["the red door" + END, "ok" + END]
    assert tokenizer.decode(encoded.input_ids) == spaced.apply_chat_template(
        row.messages, tokenize=False
    )
    one = Row(row.where, row.messages[:2])
    prompt = encode_prompt(one, spaced, settings())
    assert encode(one, spaced, settings()).input_ids[: len(prompt)] == prompt
    assert encode(one, spaced, settings()).labels[len(prompt)] != IGNORED


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    forgetful = with_template(tokenizer, FORGETFUL)
    one, two = conversation("open", "ok"), conversation("open", "ok", "close", "done")
    assert target_texts(encode(one, forgetful, settings()), tokenizer) == ["ok" + END]
    with pytest.raises(UserError, match="rows.jsonl:7: the chat template writes earlier turns"):
        encode(two, forgetful, settings())
    # The message offers this way out.
    encoded = encode(two, forgetful, settings(loss_on="all"))
    assert tokenizer.decode(encoded.labels).endswith("assistant: done" + END)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
    ],
)
def test_a_template_that_fails_names_the_row(tokenizer, template, reason):
    broken = with_template(tokenizer, template)
    for read in (encode, encode_prompt):
        with pytest.raises(UserError) as error:
            read(conversation("open", "ok"), broken, settings())
        assert str(error.value).startswith("rows.jsonl:7: the chat template refuses this row: ")
        assert reason in str(error.value)
        assert "model.chat_template" in str(error.value)


def test_reserved_template_arguments_are_refused(tokenizer):
    data = settings(template_arguments={"tokenize": True})
    with pytest.raises(UserError, match="rows.jsonl:7: .*tokenize.*data.template_arguments"):
        encode(conversation("open", "ok"), tokenizer, data)


def test_a_base_without_a_chat_template_is_refused(tokenizer):
    bare = with_template(tokenizer, None)
    with pytest.raises(UserError, match="model.chat_template: this base has no chat template"):
        encode(conversation("open", "ok"), bare, settings())
    assert encode(Row("rows.jsonl:1", text="open"), bare, settings()).input_ids


# Training: packed, padded, and as trl does it


@pytest.fixture
def trainer_of(recipe_file, tmp_path):
    """Builds the trainer of finetune/train.py; adapter and base are the same every time."""
    from finequant.finetune.arguments import training_arguments
    from finequant.finetune.model import load_base, load_tokenizer
    from finequant.finetune.trainer import build_trainer
    from finequant.recipes.load import load_recipe

    def build(*overrides: str):
        recipe = load_recipe(recipe_file, overrides)
        base = load_base(recipe.model, torch.float32)
        # As it is, attention hardly changes the tiny Llama's output, and a leak would not show.
        for name, weight in base.named_parameters():
            weight.data *= 6 if "proj" in name else 1
        splits = load_splits(recipe.data, recipe.seed)
        arguments = training_arguments(recipe, tmp_path / "checkpoints", torch.float32)
        tokenizer = load_tokenizer(recipe.model)
        trainer = build_trainer(recipe, arguments, base, tokenizer, splits)
        torch.manual_seed(0)
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        return trainer

    return build


def loss_and_gradient(trainer, batches, compute_loss=None) -> tuple[float, torch.Tensor]:
    """Computes both, summed over all rows as one optimizer step would sum them."""
    compute_loss = compute_loss or trainer.compute_loss
    trainer.model.train()
    trainer.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1))
        loss.backward()
        total += loss.item()
    trained = [weight.grad for weight in trainer.model.parameters() if weight.requires_grad]
    return total, torch.cat([gradient.flatten() for gradient in trained])


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_packed_rows_are_trained_on_as_if_each_stood_alone(trainer_of, loss_on):
    overrides = ["data.max_length=200", f"data.loss_on={loss_on}"]
    padded = trainer_of(*overrides)
    packed = trainer_of(*overrides, "data.packing=true")
    batches = list(packed.get_train_dataloader())
    starts = sum(int((batch["position_ids"] == 0).sum()) for batch in batches)
    assert starts == 48
    assert len(packed.train_dataset) < 24  # at least two rows per pack

    loss, gradient = loss_and_gradient(packed, batches)
    expected, expected_gradient = loss_and_gradient(padded, padded.get_train_dataloader())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(gradient, expected_gradient) < 1e-4

    # What a leak would look like: the rows of a pack read as one text.
    for batch in batches:
        length = batch["position_ids"].shape[1]
        batch["position_ids"] = torch.arange(length)[None]
        batch["cu_seq_lens_q"] = torch.tensor([0, length], dtype=torch.int32)
        batch["max_length_q"] = length
    leaking, leaking_gradient = loss_and_gradient(packed, batches)
    assert abs(leaking - expected) > 0.001 * expected
    assert difference(leaking_gradient, expected_gradient) > 0.1


def test_the_first_token_of_a_packed_row_is_not_predicted_by_the_row_before(trainer_of):
    packed = trainer_of("data.packing=true", "data.loss_on=all")
    batch = next(iter(packed.get_train_dataloader()))
    first = batch["position_ids"] == 0
    assert first.sum() > 4
    assert set(batch["labels"][first].tolist()) == {IGNORED}
    assert IGNORED not in batch["labels"][~first]


def test_packed_validation_rows_stand_alone_too(trainer_of):
    losses = [
        trainer_of(*packing).evaluate()["eval_loss"] for packing in ([], ["data.packing=true"])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("count", [None, 100])
def test_the_loss_on_a_cpu_is_that_of_trl(trainer_of, packing, count):
    from trl import SFTTrainer

    trainer = trainer_of(f"data.packing={packing}")
    if trainer.accelerator.device.type != "cpu":
        pytest.skip("elsewhere it is trl's own")
    batch = next(iter(trainer.get_train_dataloader()))
    number = None if count is None else torch.tensor(count)

    def ours(model, inputs, **_):
        return trainer.compute_loss(model, inputs, num_items_in_batch=number)

    def theirs(model, inputs, **_):
        return SFTTrainer.compute_loss(trainer, model, inputs, num_items_in_batch=number)

    loss, gradient = loss_and_gradient(trainer, [batch], ours)
    expected, expected_gradient = loss_and_gradient(trainer, [batch], theirs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(gradient, expected_gradient) < 1e-4
    assert expected_gradient.norm() > 1e-3


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(tokenizer, template):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    row = Row("rows.jsonl:1", messages=({"role": "user", "content": "a"},))
    with pytest.raises(UserError, match="rows.jsonl:1: the chat template refuses this row"):
        encode_prompt(row, own, Data(train="rows.jsonl"))
