"""Reads the texts for perplexity: files and Hub datasets -> documents, without torch."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finequant.recipes.errors import UserError
from finequant.recipes.schema import Corpus, Source
from finequant.recipes.sources import TABLES, kind_of, matching_files


class Document(NamedTuple):
    """An independent text, and the counts that its negative log-likelihood is divided by."""

    text: str
    words: int
    bytes: int


def count(text: str, original: str | None = None) -> Document:
    """Counts words and bytes by lm-eval's rules, in `original` if `text` was derived from it."""
    counted = text if original is None else original
    return Document(text, len(re.split(r"\s+", counted)), len(counted.encode("utf-8")))


def read_corpus(corpus: Corpus) -> list[Document]:
    """Reads the documents of a corpus; local sources must be absolute paths, as load_recipe makes
    them.

    `wikitext` gives the documents of lm-eval's task of that name, from the raw file, from
    Salesforce/wikitext (one row per line), or EleutherAI/wikitext_document_level (column `page`).

    Raises:
        UserError: if a file, column, or dataset is missing, is not UTF-8, or has no text at all.
    """
    texts = read_texts(corpus)
    if corpus.documents == "wikitext":
        return [article for text in texts for article in _articles(text)]
    if corpus.documents == "file" and not _text_files(corpus):
        texts = ["\n\n".join(texts)]
    return [count(text) for text in texts if text.strip()]


def read_texts(corpus: Corpus) -> list[str]:
    """Reads the texts of a corpus as they are stored: one per file, or one per row.

    Raises:
        UserError: if a file, column, or dataset is missing, is not UTF-8, or has no text at all.
    """
    if files := _text_files(corpus):
        if corpus.documents == "rows":
            raise UserError(
                f"{_where(corpus)}: documents: rows is for files of rows, and a text file has "
                "none: leave it out, or write each text as a row of a .jsonl file"
            )
        texts = [_read_text(file, corpus) for file in files]
    else:
        texts = _read_rows(corpus)
        if corpus.documents == "wikitext":
            texts = [_wikitext_file(texts)]
    if not any(text.strip() for text in texts):
        raise UserError(f"{_where(corpus)}: contains no text; expected at least one word")
    return texts


def _text_files(corpus: Corpus) -> list[Path]:
    """Lists the text files of a corpus; none if it has rows."""
    path = Path(corpus.source)
    is_text = path.is_absolute() and not path.is_dir() and kind_of(path)[0] not in TABLES
    return matching_files(path) if is_text else []


def _where(corpus: Corpus, file: Path | None = None) -> str:
    return f"perplexity corpus {corpus.name}: {file or corpus.source}"


def _read_text(path: Path, corpus: Corpus) -> str:
    from finequant.finetune.data.files import open_text

    try:
        with open_text(path) as file:
            return file.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{_where(corpus, path)}: cannot be read: {reason}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{_where(corpus, path)}: not UTF-8 text at byte {error.start}: save it as UTF-8"
        ) from None


def _read_rows(corpus: Corpus) -> list[str]:
    """Reads `corpus.column` of every row of a file, folder, or Hub dataset."""
    from finequant.finetune.data.readers import read_rows

    source = Source(
        source=corpus.source, name=corpus.config, split=corpus.split, revision=corpus.revision
    )
    try:
        rows = read_rows(source)
    except UserError as error:
        reason = str(error).removeprefix("data: ")
        raise UserError(f"perplexity corpus {corpus.name}: {reason}") from None
    texts = []
    for where, row in rows:
        text = row.get(corpus.column)
        if not isinstance(text, str):
            actual = f"it is {text!r:.60}" if corpus.column in row else f"it has {', '.join(row)}"
            raise UserError(
                f"perplexity corpus {corpus.name}: {where}: no text in column "
                f"{corpus.column!r}: {actual}\nName the column with the text: `column: ...`"
            )
        texts.append(text)
    return texts


def _wikitext_file(rows: list[str]) -> str:
    """Restores the raw file: rows of pages lack the last line end; rows of lines, the space that
    stands on a blank line."""
    return "".join(row if row.endswith("\n") else f"{row or ' '}\n" for row in rows)


def _articles(text: str) -> Iterator[Document]:
    """Splits before each title, by the rule that produced EleutherAI/wikitext_document_level.

    The rule takes every line ` = ... = ` for a title; 2 of the 62 in the test split are formulas.
    """
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if re.fullmatch(r"= (?!=).*(?<!=) =", line.strip()):
            pages.append([])
        pages[-1].append(line)
    for page in map("\n".join, pages):
        if page.strip():
            yield count(wikitext_detokenizer({"page": page}), original=page)
