"""Log-likelihoods with shared contexts equal those of lm-eval's own model class, item by item."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from finequant.evaluate.metrics import shared_context
from finequant.evaluate.metrics.lm_eval_model import SharedContextLM
from finequant.evaluate.metrics.shared_context import Continuation, log_likelihoods
from finequant.recipes.errors import UserError

CONTEXTS = [
    "open the red door at 1 o'clock and then",
    "close",
    "paint the green lamp at 11 o'clock and move the blue box, then close the grey window and",
    "close the",
]
CHOICES = [" red", " the green lamp at 12 o'clock", " o", " door", " close the red door"]


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def both(model, tokenizer):
    """both(max_length, batch_size) -> lm-eval's model class and ours, over the same model."""

    def make(max_length: int = 512, batch_size: int = 3) -> list[HFLM]:
        settings = {"tokenizer": tokenizer, "max_length": max_length, "batch_size": batch_size}
        return [kind(model, **settings) for kind in (HFLM, SharedContextLM)]

    return make


def greedy(model, context: list[int], length: int) -> list[int]:
    ids = list(context)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def token_requests(model, tokenizer) -> list[tuple]:
    """Contexts with several, one, and equal continuations, of one token and of many."""
    requests = []
    for number, text in enumerate(CONTEXTS):
        context = tokenizer(text)["input_ids"]
        endings = [tokenizer(choice)["input_ids"] for choice in CHOICES[: number + 2]]
        endings += [greedy(model, context, length) for length in (1, 2, 5)]
        requests += [((text, str(ending)), context, ending) for ending in endings]
    context = tokenizer(" ".join(CONTEXTS))["input_ids"]
    requests.append((("alone", "4"), context, greedy(model, context, 4)))
    # The first context again, as in a second task of the same call.
    return [*requests, requests[0], (("again", ""), requests[0][1], [7, 8, 9])]


def check_equal(found: list, expected: list) -> None:
    assert [log for log, _ in found] == pytest.approx([log for log, _ in expected], abs=1e-3)
    assert [best for _, best in found] == [best for _, best in expected]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("max_length", [512, 24, 13])
def test_equals_lm_eval_item_by_item(model, tokenizer, both, max_length, batch_size):
    requests = token_requests(model, tokenizer)
    theirs, ours = both(max_length, batch_size)
    expected = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    check_equal(found, expected)
    if max_length == 512:
        flags = [best for _, best in expected]
        assert 12 <= sum(flags) < len(flags)
    else:  # so that truncation did something
        assert any(len(context) + len(ids) > max_length + 1 for _, context, ids in requests)


def test_truncation_gives_each_length_a_context_of_its_own(both):
    _, ours = both(max_length=10)
    context = list(range(20, 30))
    kept = [ours._truncated(("", ""), context, [1] * length).context for length in (1, 2, 3, 10)]
    assert kept == [context, context[1:], context[2:], context[9:]]
    for length in (0, 11):
        with pytest.raises(UserError, match=f"a continuation has {length} tokens: .*lamp"):
            ours._truncated(("the", "lamp"), context, [1] * length)


def test_prompts_that_lose_their_beginning_are_counted(model, tokenizer, both, capsys):
    """lm-eval warns of each, among much else that is silenced."""
    settings = {"until": [], "max_gen_toks": 14}
    asked = [Instance("generate_until", {}, (text, settings), 0) for text in CONTEXTS]
    lengths = [len(ids) for ids in tokenizer(CONTEXTS)["input_ids"]]
    theirs, ours = both(max_length=24, batch_size=2)
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    cut = sum(length > 10 for length in lengths)
    assert 0 < cut < 4
    message = f"{cut} of 4 prompts lost the beginning, to fit into the base's 24 positions"
    assert capsys.readouterr().err.count(message) == 1
    ours._loglikelihood_tokens(token_requests(model, tokenizer), disable_tqdm=True)
    assert "prompts lost the beginning" in capsys.readouterr().err
    assert ours.generate_until(asked[1:2]) == theirs.generate_until(asked[1:2])
    assert "lost the beginning" not in capsys.readouterr().err


def test_many_continuations_take_several_rows(model, tokenizer, monkeypatch):
    asked = [Continuation(*request[1:]) for request in token_requests(model, tokenizer)] * 2
    whole = log_likelihoods(model, asked, 4, "")
    monkeypatch.setattr(shared_context, "MAX_CONTINUATION_TOKENS", 6)
    parted = log_likelihoods(model, asked, 4, "")
    assert len(shared_context._rows(asked)) > len({tuple(one.context) for one in asked})
    check_equal(parted, whole)


def test_each_context_is_read_once_and_logits_made_where_needed(model):
    read, made = [], []
    hooks = [
        model.model.embed_tokens.register_forward_hook(lambda _, i, __: read.append(i[0].numel())),
        model.lm_head.register_forward_hook(lambda _, i, __: made.append(len(i[0]))),
    ]
    context = list(range(50, 90))
    asked = [Continuation(context, ids) for ids in ([1, 2, 3], [4], [5, 6], [7])]
    log_likelihoods(model, asked, 4, "")
    for hook in hooks:
        hook.remove()
    assert sum(read) == len(context) + 2 + 1
    assert sum(made) == 1 + 2 + 1


def test_texts_with_and_without_a_context(both):
    """lm-eval tokenizes: an empty context, and one that ends in a space."""
    pairs = [("", "open the door"), ("", " close"), ("close ", "the red lamp"), (CONTEXTS[0], " o")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    theirs, ours = (lm.loglikelihood(requests, disable_tqdm=True) for lm in both())
    check_equal(ours, theirs)


def test_rolling_windows_equal_lm_eval(both):
    texts = [(" ".join(CONTEXTS * 3),), ("close the door",)]
    requests = [Instance("loglikelihood_rolling", {}, text, 0) for text in texts]
    theirs, ours = (lm.loglikelihood_rolling(requests, disable_tqdm=True) for lm in both(20))
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_answers_reach_lm_evals_cache(model, tokenizer, both, tmp_path):
    from lm_eval.api.model import CachingLM

    request = Instance("loglikelihood", {}, (CONTEXTS[0], " red"), 0)
    cached = CachingLM(both()[1], str(tmp_path / "answers.db"))
    first = cached.loglikelihood([request])
    assert len(cached.dbdict) == 1
    assert cached.loglikelihood([request]) == first


def test_bfloat16_stays_near_float32(model, tokenizer):
    import copy

    asked = [Continuation(*request[1:]) for request in token_requests(model, tokenizer)]
    exact = log_likelihoods(model, asked, 4, "")
    rough = log_likelihoods(copy.deepcopy(model).bfloat16(), asked, 4, "")
    for one, other in zip(exact, rough, strict=True):
        assert one.log == pytest.approx(other.log, rel=0.05, abs=0.5)


def test_no_requests_give_no_answers(model):
    assert log_likelihoods(model, [], 4, "") == []
