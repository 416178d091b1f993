"""Where the demo's sentences come from."""

from __future__ import annotations

import pytest
from fusenc.bench.text import documentation_sentences, read_sentences


def test_documentation_gives_clean_sentences():
    sentences = documentation_sentences()
    assert len(sentences) >= 512 and len(set(sentences)) == len(sentences)
    assert all(s[0].isupper() and s.endswith(".") and "\n" not in s and "::=" not in s for s in sentences)
    assert sentences == documentation_sentences()


def test_read_sentences(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("  One.\n\nZwei: größer.\n", encoding="utf-8")
    assert read_sentences(file) == ["One.", "Zwei: größer."]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\xff", "folder"], ids=str)
def test_bad_files_are_explained(tmp_path, content):
    file = tmp_path / "text.txt"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^--text: "):
        read_sentences(file)
