"""Real sentences to work on: a text file of the user's, or the prose of Python's own documentation and docstrings."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_MARKUP = re.compile(r"[\"*`“”]+")

_MOST_WORDS = 30


def documentation_sentences() -> list[str]:
    """English sentences from the reference manual that comes with CPython (`pydoc_data.topics`), in its order.

    Headings, code, grammar, tables, lists and very long sentences are left out, and each sentence occurs once.
    """
    from pydoc_data.topics import topics

    return _sentences(topics.values())


def docstring_sentences() -> list[str]:
    """English sentences from the docstrings of CPython's standard library, some thousands, in the order of its modules;
    chosen as by `documentation_sentences`."""
    texts = []
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(module.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return _sentences(texts)


def _sentences(texts: Iterable[str]) -> list[str]:
    sentences: dict[str, None] = {}
    for text in texts:
        for paragraph in text.split("\n\n"):
            lines = paragraph.strip("\n").split("\n")
            if any(not line or not line[0].isalpha() for line in lines) or "::=" in paragraph:
                continue
            for sentence in _SENTENCE_END.split(_MARKUP.sub("", " ".join(lines))):
                words = sentence.split()
                letters = sum(c.isalpha() or c == " " for c in sentence)
                whole = sentence[:1].isupper() and sentence[-1] == "." and "  " not in sentence
                if whole and 3 <= len(words) <= _MOST_WORDS and letters > 0.9 * len(sentence):
                    sentences.setdefault(sentence)
    return list(sentences)


def read_sentences(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, blank ones left out.

    Raises:
        ValueError: the file is missing, no file, not UTF-8, or holds no text; the message says which.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"--text: no file at {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--text: {path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"--text: {path} cannot be read ({error.strerror})") from None
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise ValueError(f"--text: {path} holds no text, expected one sentence a line")
    return sentences
