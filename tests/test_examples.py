"""The examples run as a user would run them."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_sentence_embeddings_finds_the_likely_sentence(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sleeps on the sofa.\nInterest rates rose again.\nRain is expected tomorrow.\n")
    command = [sys.executable, str(EXAMPLES / "sentence_embeddings.py"), "What will the weather be like?"]
    run = subprocess.run([*command, "--text", str(text), "--top", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Rain" in run.stdout and "cat" not in run.stdout
