"""Perplexity equals plain logits, and lm-eval's own numbers."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import put_bos_in_front
from transformers import AutoModelForCausalLM, AutoTokenizer

from finequant.evaluate.metrics.corpora import Document, count, read_corpus
from finequant.evaluate.metrics.perplexity import (
    ScoredSequence,
    corpus_windows,
    measure,
    negative_log_likelihoods,
)
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Corpus

SENTENCES = [f"open the {what} at {hour} o'clock" for what in ("door", "box") for hour in range(30)]
# Two articles in the style of WikiText's tokenized raw text; the second is longer than a window.
PAGES = [
    " = The Red Lamp = \n \n The Red Lamp is a well @-@ known lamp , made in 1,234 parts . It 's "
    "4 @.@ 5 metres high ; its door ( blue ) opens at 3 o 'clock . \n \n = = History = = \n \n "
    'It was closed : " nobody painted it " . \n \n = = = After 12 = = = \n \n Nothing moved ! \n ',
    " = Grey Windows ( house ) = \n \n" + "".join(f" {s} . \n" for s in SENTENCES[:40]) + " \n",
]


@pytest.fixture(scope="module")
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


@pytest.fixture
def wikitext_file(tmp_path) -> Path:
    path = tmp_path / "wiki.raw"
    path.write_text(" \n" + "\n".join(PAGES), encoding="utf-8")
    return path


def corpus_of(source, **settings) -> Corpus:
    return Corpus(name="small", source=str(source), **settings)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mixed_sequences() -> list[ScoredSequence]:
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for length in (2, 90, 17, 1, 64, 17, 33):
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        scored = (torch.rand(length, generator=generator) < 0.5).tolist()
        sequences.append(ScoredSequence(ids, [False, *scored[1:]]))
    return [*sequences, ScoredSequence([5, 6, 7], [False] * 3)]


def plain(model, sequence: ScoredSequence) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([sequence.ids])).logits[0].double()
    logs = logits.log_softmax(-1)
    scored = [position for position, flag in enumerate(sequence.scored) if flag]
    return -sum(logs[position - 1, sequence.ids[position]].item() for position in scored)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_likelihoods_equal_plain_logits_whatever_the_batch(model, batch_size, monkeypatch, capsys):
    monkeypatch.setattr("finequant.evaluate.metrics.perplexity.LOGITS_CHUNK", 7)
    sequences = mixed_sequences()
    found = negative_log_likelihoods(model, sequences, batch_size, "test")
    assert found == pytest.approx([plain(model, sequence) for sequence in sequences], rel=1e-5)
    assert found[3] == found[-1] == 0.0
    assert capsys.readouterr() == ("", "")


def test_the_head_computes_only_scored_tokens(model):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    sequences = mixed_sequences()
    negative_log_likelihoods(model, sequences, 100, "test")
    hook.remove()
    assert sum(shape[0] for shape in seen) == sum(sum(sequence.scored) for sequence in sequences)


def test_perplexities_per_token_word_and_byte_share_one_sum(model):
    sequences = mixed_sequences()
    documents = [count("three words here"), Document("x", words=2, bytes=9)]
    assert documents[0][1:] == (3, 16)
    found = measure(model, sequences, documents, 4, "small")
    nll = sum(negative_log_likelihoods(model, sequences, 4, "test"))
    assert found["tokens"] == sum(sum(sequence.scored) for sequence in sequences)
    assert math.log(found["token"]) * found["tokens"] == pytest.approx(nll)
    assert math.log(found["word"]) * 5 == pytest.approx(nll)
    assert math.log(found["byte"]) * 25 == pytest.approx(nll)


def test_overflow_is_infinite_and_nothing_scored_is_an_error(model):
    document = Document("x", words=1, bytes=10**6)
    found = measure(model, mixed_sequences() * 2, [document], 4, "small")
    assert found["word"] == math.inf and found["byte"] < 2
    with pytest.raises(UserError, match="perplexity of small: no token to score"):
        measure(model, [ScoredSequence([1, 2], [False, False])], [count("a")], 4, "small")


def lm_eval_results(model, tokenizer, pages: list[str], folder: Path, max_length: int) -> dict:
    """Runs lm-eval's own model class, evaluator and `wikitext` functions on these pages."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    data = write_jsonl(folder / "pages.jsonl", [{"page": page} for page in pages])
    task = {
        "task": "wikitext_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": wikitext_detokenizer,
        "process_results": process_results,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in (
                ("word_perplexity", "weighted_perplexity"),
                ("byte_perplexity", "weighted_perplexity"),
                ("bits_per_byte", "bits_per_byte"),
            )
        ],
    }
    lm = HFLM(model, tokenizer=tokenizer, max_length=max_length, batch_size=2)
    manager = TaskManager(include_defaults=False)  # indexing lm-eval's own tasks takes seconds
    found = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    results = found["results"]["wikitext_local"]
    return {unit: results[f"{unit}_perplexity,none"] for unit in ("word", "byte")}


@pytest.mark.parametrize("puts_bos_in_front", [False, True])
def test_wikitext_equals_lm_eval(model, tiny_base, wikitext_file, tmp_path, puts_bos_in_front):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    if puts_bos_in_front:
        put_bos_in_front(tokenizer)
    corpus = corpus_of(wikitext_file, documents="wikitext", max_length=100)
    sequences, documents = corpus_windows(read_corpus(corpus), tokenizer, corpus, 512)
    assert len(documents) == 2 and len(sequences) > 6
    found = measure(model, sequences, documents, 4, "small")
    expected = lm_eval_results(model, tokenizer, PAGES, tmp_path, max_length=100)
    assert {unit: found[unit] for unit in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("text", ["{} open the lamp", "open the lamp {}", "open the lamp"])
def test_a_text_that_contains_bos_is_scored_as_by_lm_eval(model, tiny_base, text):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    put_bos_in_front(tokenizer)
    text = text.format(tokenizer.bos_token).strip()
    sequences, _ = corpus_windows([count(text)], tokenizer, corpus_of("unused"), 512)
    found = negative_log_likelihoods(model, sequences, 4, "test")
    theirs = HFLM(model, tokenizer=tokenizer, max_length=64, batch_size=1)
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    assert found == pytest.approx([-log for log in theirs.loglikelihood_rolling(asked)], rel=1e-5)


def test_wikitext_articles_and_their_counts(wikitext_file):
    documents = read_corpus(corpus_of(wikitext_file, documents="wikitext"))
    assert [document.bytes for document in documents] == [len(page.encode()) for page in PAGES]
    assert "well-known lamp, made" in documents[0].text
    assert "== History ==" in documents[0].text


def test_wikitext_from_rows_of_lines_and_of_pages(wikitext_file, tmp_path):
    expected = read_corpus(corpus_of(wikitext_file, documents="wikitext"))
    text = wikitext_file.read_text(encoding="utf-8")
    lines = [line if line.strip() else "" for line in text.splitlines(keepends=True)]
    for name, rows in {"lines": lines, "pages": PAGES}.items():
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"page": row} for row in rows])
        found = read_corpus(corpus_of(path, documents="wikitext", column="page"))
        assert found == expected, name


def test_windows_score_every_token_once(tokenizer):
    text = " ".join(SENTENCES[:30])
    corpus = corpus_of("unused", max_length=64)
    sequences, _ = corpus_windows([count(text)], tokenizer, corpus, max_positions=40)
    ids = [t for sequence in sequences for t, s in zip(*sequence, strict=True) if s]
    assert ids == tokenizer.encode(text)
    assert max(len(sequence.ids) for sequence in sequences) == 41
    assert sequences[0].ids[0] == tokenizer.bos_token_id
    assert not any(sequence.scored[0] for sequence in sequences)


def test_words_and_bytes_are_those_of_the_kept_windows(tokenizer):
    whole = [count(" ".join(SENTENCES[:3])), count(" ".join(SENTENCES[3:40])), count("never seen")]
    every, _ = corpus_windows(whole, tokenizer, corpus_of("unused", max_length=64), 512)
    first = corpus_of("unused", max_length=64, windows=3)
    sequences, documents = corpus_windows(whole, tokenizer, first, 512)
    assert sequences == every[:3]
    assert documents[0] == whole[0] and len(documents) == 2
    assert whole[1].text.startswith(documents[1].text)
    assert documents[1] == count(documents[1].text) and documents[1].bytes < whole[1].bytes


def test_a_tokenizer_without_bos_and_eos_is_an_error(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.bos_token = None
    corpus = corpus_of("unused")
    sequences, _ = corpus_windows([count("a lamp")], tokenizer, corpus, 512)
    assert sequences[0].ids[0] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        corpus_windows([count("a lamp")], tokenizer, corpus, 512)


def test_documents_are_read_from_files_and_rows(tmp_path):
    text = tmp_path / "text.md"
    text.write_text("first\n\nsecond é", encoding="utf-8")
    assert read_corpus(corpus_of(text)) == [Document("first\n\nsecond é", 3, 16)]
    table = write_jsonl(tmp_path / "rows.jsonl", [{"body": t} for t in ("first", " ", "second é")])
    rows = read_corpus(corpus_of(table, documents="rows", column="body"))
    assert rows == [Document("first", 1, 5), Document("second é", 2, 9)]
    (joined,) = read_corpus(corpus_of(table, column="body"))
    assert joined.text == "first\n\n \n\nsecond é"


@pytest.mark.parametrize(
    "name",
    ["r.ndjson", "R.JSONL", "r.json.gz", "r.tsv", "r.csv", "r.arrow", "folder/r.jsonl", "t.txt.gz"],
)
def test_a_corpus_may_be_any_file_that_training_reads(tmp_path, name):
    import pyarrow

    path, rows = tmp_path / name, [{"text": "first"}, {"text": "second é"}]
    path.parent.mkdir(exist_ok=True)
    if name == "r.arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif name == "t.txt.gz":
        path.write_bytes(gzip.compress("first\n\nsecond é".encode()))
    else:
        is_table = path.suffix in (".tsv", ".csv")
        lines = ["text", "first", "second é"] if is_table else [json.dumps(row) for row in rows]
        content = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    source = path.parent if name.startswith("folder") else path
    assert read_corpus(corpus_of(source)) == [Document("first\n\nsecond é", 3, 16)]


def test_a_folder_of_texts_is_read_by_the_pattern_that_its_error_names(tmp_path):
    for name, text in (("a", "first"), ("b", "second é")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"name the pattern '{tmp_path}/*.txt'")):
        read_corpus(corpus_of(tmp_path))
    texts = [Document("first", 1, 5), Document("second é", 2, 9)]
    assert read_corpus(corpus_of(tmp_path / "*.txt")) == texts
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"perplexity corpus small: .*/c\.txt: not UTF-8 text at"):
        read_corpus(corpus_of(tmp_path / "*.txt"))


def test_a_corpus_is_the_test_split_of_a_folder_that_has_several(tmp_path):
    """The training texts were read, whatever `split` said."""
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"rows of {split}"}])
    assert [document.text for document in read_corpus(corpus_of(tmp_path))] == ["rows of test"]
    (of_train,) = read_corpus(corpus_of(tmp_path, split="train"))
    assert of_train.text == "rows of train"


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("empty.txt", b" \n", {}, "empty.txt: contains no text"),
        ("empty.raw", b" \n", {"documents": "wikitext"}, "empty.raw: contains no text"),
        ("lines.txt", b"a\nb\n", {"documents": "rows"}, "lines.txt: documents: rows is for files"),
        ("latin.txt", b"caf\xe9", {}, "latin.txt: not UTF-8 text at byte 3"),
        ("cut.txt.gz", gzip.compress(b"a lamp", mtime=0)[:-4], {}, "cut.txt.gz: cannot be read: "),
        ("absent.txt", None, {}, "absent.txt: cannot be read: No such file"),
        ("rows.jsonl", b'{"a": "x", "b": 2}\n', {}, "rows.jsonl:1: .*'text': it has a, b"),
        ("rows.jsonl", b'{"a": "x", "b": 2}\n', {"column": "b"}, "column 'b': it is 2"),
    ],
)
def test_an_unreadable_corpus_is_an_error(tmp_path, name, content, settings, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"perplexity corpus small: .*{message}"):
        read_corpus(corpus_of(tmp_path / name, **settings))


def test_a_hub_dataset_is_read(monkeypatch):
    from datasets import Dataset

    rows = Dataset.from_list([{"page": page} for page in PAGES])
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    corpus = corpus_of("org/set", config="raw", column="page", documents="wikitext")
    assert len(read_corpus(corpus)) == 2
    assert asked == [(("org/set", "raw"), {"split": "test", "revision": None, "streaming": False})]


def test_an_unreachable_hub_dataset_is_an_error(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError, match="org/set, split test: .*Couldn't reach") as error:
        read_corpus(corpus_of("org/set"))
    assert str(error.value).startswith("perplexity corpus small: cannot load the dataset org/set,")
    assert "check its id, name, split and revision" in str(error.value)
