"""The `fusenc` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"fusenc: the command needs {error.name}; install it with: pip install 'fusenc[bench]'", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        from .commands import app

        app()
    except KeyboardInterrupt:  # before a command has begun what it keeps
        print("fusenc: stopped", file=sys.stderr)
        raise SystemExit(130) from None
