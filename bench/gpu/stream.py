"""A pytest plugin that writes each result to a file at once; results written before a kill are kept."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

BROKEN_CONTEXT = ("CUDA error", "illegal memory access", "device-side assert")
"""What a failure says after which every later test of the same process would fail too."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    parser.addoption("--stream", help="the file, one JSON object a line")
    parser.addoption("--sample", type=int, default=0, help="run so many of the chosen tests, evenly spread")


def pytest_configure(config: pytest.Config) -> None:
    """Register what writes, in the process that sees all results."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker())
    elif config.getoption("--stream"):
        config.pluginmanager.register(_Writer(config.getoption("--stream")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a sample."""
    count = config.getoption("--sample")
    if count and len(items) > count:
        kept = [items[i * len(items) // count] for i in range(count)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


class _Writer:
    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._parent = os.getppid()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            if not report.passed:
                line["reason"] = _reason(report)
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if os.getppid() != self._parent:
            pytest.exit("the run that started the tests has ended")


class _Worker:
    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and any(text in report.longreprtext for text in BROKEN_CONTEXT):
            os._exit(1)  # the report is sent; xdist starts another worker


def _reason(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (report.longreprtext if crash is None else str(crash.message)).strip().splitlines()
    return lines[0 if crash else -1][:300] if lines else "failed"
