"""The cases of `fusenc bench` under pytest-benchmark: ``pytest bench/ --benchmark-only``; ``-k`` chooses among them.

Every provider of every case has a test of its own, so they do not take turns; for ratios use the command. A provider
that is absent is skipped, one whose values are wrong fails.
"""

from __future__ import annotations

import pytest
from fusenc.bench import measure, timing
from fusenc.bench.cases import OPS, cases

DEVICE = timing.find_device()
CASES = [
    pytest.param(case, name, id=f"{case.key}, {name}")
    for case in cases(list(OPS), {}, DEVICE)
    for name in measure.chosen(case, DEVICE, None)
]


@pytest.mark.parametrize(("case", "provider"), CASES)
def test_case(benchmark, case, provider):
    outcomes: dict[str, measure.Outcome] = {}
    with case.within():
        sides = measure.checked(case, DEVICE, [provider], outcomes)
        if provider not in sides:
            outcome = outcomes[provider]
            (pytest.skip if outcome.status == measure.ABSENT else pytest.fail)(f"{outcome.status}: {outcome.reason}")
        benchmark.group = case.key
        benchmark(DEVICE.finished(sides[provider]))
