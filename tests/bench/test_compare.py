"""`fusenc bench compare`: what counts as a difference."""

from __future__ import annotations

import json
import math
import random

import pytest
from fusenc.bench import commands, compare, intervals, results
from fusenc.bench.measure import Outcome
from fusenc.bench.results import Record, Results
from typer.testing import CliRunner


def noisy(generator, median, rounds, spread=0.1):
    return [median * generator.lognormvariate(0.0, spread) for _ in range(rounds)]


def run_of(generator, figures=60, rounds=11, spread=0.1, slower=None, against=("eager",), processes=0.02):
    """A result as one process might give it: rounds that scatter, a machine whose speed drifts, and what differs
    between processes."""
    found = Results({"commit": "a"}, "cpu")
    for i in range(figures):
        drift = [1.0 + 0.5 * math.sin(0.3 * i + 0.2 * j + generator.random() * 0.01) for j in range(rounds)]
        outcomes = {}
        for name, median in (("eager", 2e-3), ("fusenc", 1e-3 * (1.3 if i == slower else 1.0))):
            median *= generator.uniform(1 - processes, 1 + processes)
            times = noisy(generator, median, rounds, spread)
            outcomes[name] = Outcome("measured", seconds=[d * t for d, t in zip(drift, times, strict=True)])
        found.records.append(
            Record("stub", str(i), "float32", "forward", list(against), {}, 0.0, 0.0, 0, "", {}, outcomes)
        )
    return found


def test_two_runs_of_one_build_do_not_differ():
    generator = random.Random(0)
    for _ in range(10):
        changes = compare.compare(run_of(generator), run_of(generator))
        assert {change.verdict for change in changes} == {compare.SAME} and len(changes) == 60


@pytest.mark.parametrize("order", [1, -1], ids=["slower", "faster"])
def test_a_change_of_thirty_percent_is_found_and_nothing_else(order):
    generator = random.Random(1)
    pair = [run_of(generator, spread=0.03), run_of(generator, spread=0.03, slower=17)]
    changes = compare.compare(*pair[::order])
    found = [change for change in changes if change.verdict != compare.SAME]
    assert [change.key for change in found] == ["stub: 17"] and found[0].yardstick == "eager"
    assert found[0].verdict == (compare.SLOWER if order == 1 else compare.FASTER)
    assert (
        found[0].ratio == pytest.approx(1.3**order, rel=0.07) and found[0].band[0] < found[0].ratio < found[0].band[1]
    )


def test_without_a_yardstick_seconds_are_compared():
    generator = random.Random(2)
    before, after = (run_of(generator, 3, 25, 0.01, slower, ()) for slower in (None, 1))
    changes = compare.compare(before, after)
    assert [c.provider for c in changes] == ["eager", "fusenc"] * 3
    assert all(change.yardstick == "" for change in changes)


def test_too_few_rounds_tell_nothing():
    generator = random.Random(3)
    changes = compare.compare(run_of(generator, rounds=5), run_of(generator, rounds=5, slower=2))
    assert {change.verdict for change in changes} == {compare.UNKNOWN}


def test_the_band_holds_the_true_ratio_as_often_as_it_says():
    generator = random.Random(4)
    missed = 0
    for _ in range(1000):
        a, b = noisy(generator, 1.0, 12), noisy(generator, 1.2, 9)
        _, low, high = intervals.of_ratio(a, b, 0.9)
        missed += not low <= 1.2 <= high
    assert 0.07 < missed / 1000 < 0.12  # ranks are whole numbers: at most 0.1 but for chance
    missed = 0
    for _ in range(1000):
        low, high = intervals.of_median(noisy(generator, 1.0, 25), 0.9)
        missed += not low <= 1.0 <= high
    assert 0.02 < missed / 1000 < 0.08  # 0.043 is the nearest to 0.1 that ranks give


def test_intervals_are_those_of_the_books(monkeypatch):
    # Conover, table A7: with 25 and 25 values, statistics from 212 on are no evidence at 5 %; with 5 and 5 from 3 on.
    assert intervals._rank(25, 25, 0.05) == 212 and intervals._rank(5, 5, 0.05) == 3
    exact = [intervals._rank(30, 30, outside) for outside in (0.05, 5e-5)]
    with monkeypatch.context() as patch:
        patch.setattr(intervals, "EXACT", 0)
        normal = [intervals._rank.__wrapped__(30, 30, outside) for outside in (0.05, 5e-5)]
    assert all(0.9 * e < n <= e for e, n in zip(exact, normal, strict=True))
    assert sum(intervals._ways(7, 9)) == math.comb(16, 7)
    # The median of 25 values lies between the 8th and the 18th with 95 %.
    assert intervals.of_median(list(range(1, 26))) == (8, 18)
    assert intervals.of_median([3.0]) == (3.0, 3.0) and intervals.of_median([1.0, 2.0, 4.0]) == (1.0, 4.0)


def written(tmp_path, name, found):
    file = tmp_path / name
    file.write_text(results.text(found))
    return file


def compared(*arguments):
    done = CliRunner().invoke(commands.app, ["bench", "compare", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("status", ["wrong values", "failed", "out of memory", "absent"])
def test_a_time_that_is_lost_is_no_pass(tmp_path, status):
    before, after = (run_of(random.Random(seed), 5, 25, 0.02) for seed in (6, 7))
    after.records[2].outcomes["fusenc"] = Outcome(status, "for a reason")
    files = written(tmp_path, "a.json", before), written(tmp_path, "b.json", after)
    code, output = compared(*files)
    if status == "absent":
        assert code == 0 and "0 slower, 0 faster, 4 same" in output and "without" not in output
    else:
        assert code == 1 and f"{status}: for a reason" in output and "1 without a time now" in output
    assert compared(*files[::-1])[0] == 0


def test_nothing_in_common_is_no_pass(tmp_path):
    found, other = (run_of(random.Random(8), 3, 25, 0.02) for _ in range(2))
    for record in other.records:
        record.name += " of another size"
    code, output = compared(written(tmp_path, "a.json", found), written(tmp_path, "b.json", other))
    assert code == 2 and "nothing to compare" in output and "b.json" in output


DAMAGED = {
    "machine": lambda whole, ours: whole.update(machine=None),
    "cases": lambda whole, ours: whole.update(cases={"a": 1}),
    "a text": lambda whole, ours: ours.update(seconds="abc"),
    "zero": lambda whole, ours: ours.update(seconds=[0.0] * 25),
    "negative": lambda whole, ours: ours.update(seconds=[-1.0] * 25),
    "not a number": lambda whole, ours: ours.update(seconds=[float("nan")] * 25),
    "fewer rounds": lambda whole, ours: ours.update(seconds=[1.0]),
    "no rounds": lambda whole, ours: ours.update(seconds=[]),
    "status": lambda whole, ours: ours.update(status="zzz"),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_named(tmp_path, damage):
    file = written(tmp_path, "a.json", run_of(random.Random(9), 3, 25, 0.02))
    whole = json.loads(file.read_text())
    damage(whole, whole["cases"][1]["providers"]["fusenc"])
    (tmp_path / "b.json").write_text(json.dumps(whole))
    code, output = compared(file, tmp_path / "b.json")
    assert code == 2 and "b.json is no result file of fusenc bench" in output


def test_the_exit_status_says_whether_anything_became_slower(tmp_path):
    generator = random.Random(5)
    before = written(tmp_path, "a.json", run_of(generator, 5, 25, 0.02))
    changed = run_of(generator, 4, 25, 0.02, slower=3)
    changed.machine["commit"] = "b"
    after = written(tmp_path, "b.json", changed)

    def fusenc(*arguments):
        return CliRunner().invoke(commands.app, ["bench", "compare", *map(str, arguments)])

    done = fusenc(before, after)
    assert done.exit_code == 1 and "1 slower, 0 faster, 3 same" in done.output
    assert "commit: a, then b" in done.output and "Not compared, of" in done.output
    assert fusenc(after, before).exit_code == 0 and fusenc(before, before).exit_code == 0
    assert fusenc(before).exit_code == 2
    assert fusenc(before, tmp_path / "none.json").exit_code == 2
    (tmp_path / "old.json").write_text('{"fusenc_bench": 0}')
    done = fusenc(before, tmp_path / "old.json")
    assert done.exit_code == 2 and "is of version 0, expected 2" in done.output
