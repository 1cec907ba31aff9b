"Measuring is tested on a machine of paper, whose clock only work moves; memory in real processes"
import json
import math
import sys

import pytest

from synseg import stopwatch
from synseg.stopwatch import Entry, Machine, Table, compare, missing, peak_memory


class Paper(Machine):
    "Seconds pass where work is done; while `disturbed(t)` a neighbour takes one core"
    def __init__(self, disturbed=lambda t: False):
        self.t, self.o, self.disturbed = 0.0, 0.0, disturbed

    def seconds(self):
        return self.t

    def others(self):
        return self.o

    def work(self, seconds):
        for _ in range(8):
            slow = self.disturbed(self.t)
            self.t += seconds / 8 * (1 + slow)
            self.o += seconds / 4 * slow


class Tick(Paper):
    "A clock that moves a second whenever it is read"
    def seconds(self):
        self.t += 1
        return self.t


def race(machine, **options):
    return compare([Entry("race", "ours", lambda i: machine.work(1.0)), Entry("race", "theirs", lambda i: machine.work(3.0), peer=True)],
                   machine=machine, **options)


def test_ratio_of_medians_and_its_range():
    table = race(Paper(), rounds=3)
    assert all(math.isclose(v, 3) for v in table.speedup("race", "ours"))
    assert table.speedup("race", "theirs") == (1, 1, 1)
    assert table.repeated == 0 and table.warning() is None and [r.others for r in table.rounds] == [0, 0, 0]


def test_disturbed_rounds_are_made_again():
    table = race(Paper(lambda t: 10 <= t < 15), rounds=4)
    assert table.repeated >= 1 and table.warning() is None
    assert all(math.isclose(s, 1) for s in table.seconds("race", "ours"))


def test_a_neighbour_who_stays_is_told():
    table = race(Paper(lambda t: t > 5), rounds=4, repeats=2)
    assert "in 4 of 4 rounds" in table.warning() or "in 3 of 4 rounds" in table.warning()
    assert "up to 1.0" in table.warning() and table.warning() in str(table)
    assert table.repeated == 2 * table.metrics()["disturbed_rounds"]
    assert math.isclose(table.speedup("race", "ours")[0], 3, rel_tol=0.05)


def test_a_machine_that_does_not_tell_is_believed():
    class Silent(Paper):
        def others(self):
            return None
    table = race(Silent(lambda t: t > 5), rounds=2)
    assert table.warning() is None and [r.others for r in table.rounds] == [None, None] and table.repeated == 0


def test_order_is_shuffled_and_repeats_with_the_seed():
    def orders(seed):
        heard = []
        entries = [Entry("g", name, lambda i, n=name: heard.append((i, n))) for name in "abcd"]
        compare(entries, rounds=6, seed=seed, least=0, machine=Tick())
        rounds = [heard[k:k + 4] for k in range(4, len(heard), 4)]
        assert [[i for i, _ in r] for r in rounds] == [[n] * 4 for n in range(6)]
        assert all(sorted(n for _, n in r) == list("abcd") for r in rounds)
        return ["".join(n for _, n in r) for r in rounds]
    assert len(set(orders(0))) > 1 and orders(0) == orders(0) != orders(1)


def test_what_comes_before_is_not_timed_and_short_calls_are_repeated():
    machine, calls = Paper(), []
    entry = Entry("g", "a", lambda i: (calls.append("call"), machine.work(0.04)), before=lambda: (calls.append("before"), machine.work(5)))
    table = compare([entry], rounds=1, least=0.1, machine=machine)
    assert math.isclose(table.median("g", "a"), 0.04)
    assert calls == ["before", "call"] * (1 + 3)


def test_figures_follow_the_round():
    table = compare([Entry("g", "a", lambda i: i * 10, figures=lambda result: dict(score=result))], rounds=3, least=0, machine=Tick())
    assert table.figures("g", "a") == dict(score=[0, 10, 20]) and "score 10" in str(table)


def test_plain_values():
    found = race(Paper(), rounds=2).metrics()
    assert json.loads(json.dumps(found)) == found
    row = found["groups"]["race"]["ours"]
    assert math.isclose(row["speedup"], 3) and row["median_seconds"] == 1 and not row["peer"]
    assert found["disturbed_rounds"] == 0 and found["other_cores"] == [0, 0]


def test_groups_without_a_peer_have_no_ratio():
    machine = Paper()
    table = compare([Entry("g", "a", lambda i: machine.work(1))], rounds=1, machine=machine)
    assert table.speedup("g", "a") is None and "a" in str(table)


@pytest.mark.parametrize("entries,rounds,part", [([], 1, "0 entries"), ([Entry("g", "a", print)], 0, "0 rounds"),
                                                 ([Entry("g", "a", print)] * 2, 1, "own name"),
                                                 ([Entry("g", n, print, peer=True) for n in "ab"], 1, "two peers")])
def test_what_cannot_be_compared(entries, rounds, part):
    with pytest.raises(ValueError, match=part):
        compare(entries, rounds)


def test_the_real_machine():
    machine = Machine()
    before, start = machine.others(), machine.seconds()
    sum(range(3_000_000))
    assert machine.seconds() > start
    if before is None:
        pytest.skip("this system does not count its cores' seconds")
    assert machine.others() >= before - 0.2  # our own work is not the neighbours', up to the grain of the clock


def test_own_work_is_not_blamed_on_neighbours(monkeypatch):
    busy = iter([100.0, 102.0])
    monkeypatch.setattr(stopwatch, "_busy_seconds", lambda: next(busy))
    used = iter([10.0, 12.0])
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: next(used))
    monkeypatch.setattr(stopwatch.os, "times", lambda: (0, 0, 0, 0, 0))
    machine = Machine()
    assert machine.others() == machine.others() == 90


@pytest.fixture
def glutton(tmp_path, monkeypatch):
    (tmp_path / "glutton_for_tests.py").write_text(
        "def prepare(n): return lambda: len(b'x' * n)\ndef broken(): raise ValueError('no appetite')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import glutton_for_tests
    yield glutton_for_tests
    sys.modules.pop("glutton_for_tests")


def test_peak_memory_of_a_known_call(glutton):
    held = peak_memory(glutton.prepare, 150_000_000)
    assert 140e6 < held["peak"] - held["before"] < 200e6


def test_peak_memory_does_not_see_what_the_parent_held(glutton):
    hoard = b"x" * 1_500_000_000
    del hoard
    if sys.platform != "linux":
        pytest.skip("only Linux keeps the highest point apart from the parent's")
    assert peak_memory(glutton.prepare, 1_000_000)["peak"] < 1_200_000_000


def test_peak_memory_that_fails(glutton):
    with pytest.raises(RuntimeError, match="no appetite"):
        peak_memory(glutton.broken)
    with pytest.raises(ValueError, match="top of a module"):
        peak_memory(lambda: None)


def test_missing():
    assert missing({"json": "a", "surely_not_there": "b"}) == {"surely_not_there": "b"}


def test_table_can_be_made_of_nothing_but_values():
    entry = Entry("g", "a", print)
    assert str(Table((entry,), (stopwatch.Round({("g", "a"): 0.002}),))).count("2 ms") == 1
