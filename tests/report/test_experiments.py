"""Cases, the search for sessions, what conversations show, gates, meters, quality, and two engines in turns: each on
made-up numbers in which the truth is known.
"""

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tmlc.bench.dialogues import Utterance
from tmlc.errors import CapacityError, KernelError, UsageError
from tmlc.report.ablate import passes_to_leave_out
from tmlc.report.gate import check_gates, parse_gates
from tmlc.report.interleave import Interleaved, against
from tmlc.report.noise import noise
from tmlc.report.profile.counters import Counter, instructions
from tmlc.report.profile.energy import Meter
from tmlc.report.profile.quality import quality, read_scores
from tmlc.report.scenario import held
from tmlc.report.scenario.case import Case, read_case
from tmlc.report.scenario.held import Search, Try, over
from tmlc.report.scenario.load import background_load
from tmlc.report.scenario.turns import Talk, Voice, hesitation, stop_latency

CASES = sorted((Path(__file__).parents[2] / "perf" / "cases").glob("*.yaml"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_cases_that_come_with_tmlc_are_read(path):
    case = read_case(path)
    assert case.name.replace(" ", "_") == path.stem and case.about
    assert Case.model_validate(case.to_json()) == case


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[]", "mapping"), ("name: x\nspeed: 3", "speed"), ("name: x\nsessions: 0", "sessions"), ("about: x", "name"),
        ("name: x\nsessions: '2'", "sessions"), ("name: x\naudio: {kind: file}", "needs a path"),
        ("name: x\nvideo: {every: 5}", "means nothing"), ("name: x\ncontext: half", "context"), ("name: [", "read"),
        ("name: x\nload: [{kind: busy, path: a}]", "takes no path"),
    ],
)  # fmt: skip
def test_a_case_that_means_nothing_is_refused_with_its_place(tmp_path, text, place):
    (tmp_path / "case.yaml").write_text(text)
    with pytest.raises(UsageError) as refused:
        read_case(tmp_path / "case.yaml")
    assert place in str(refused.value) and "case.yaml" in refused.value.where


def test_paths_of_a_case_are_taken_from_its_folder(tmp_path):
    (tmp_path / "case.yaml").write_text("name: x\naudio: {kind: file, path: a.wav}")
    assert read_case(tmp_path / "case.yaml").audio.path == str(tmp_path / "a.wav")


@pytest.mark.parametrize("holds", [0, 1, 2, 5, 23, 64, 100])
def test_the_search_finds_how_many_fit_and_tries_few(holds):
    tried = []

    def measure(sessions):
        tried.append(sessions)
        return Try(sessions, float(sessions), sessions <= holds, 200)

    search = Search(measure, 64)
    assert search.run() == min(holds, 64)
    assert len(tried) == len(set(tried)) <= 12
    assert ("no more than 64" if holds >= 64 else "budget") in search.limit


def test_no_memory_ends_the_search_and_is_said():
    def measure(sessions):
        if sessions > 6:
            raise CapacityError("the states do not fit", fix="take fewer")
        return Try(sessions, 1.0, True, 200)

    search = Search(measure, 64)
    assert search.run() == 6 and "memory: the states do not fit" in search.limit


def test_sessions_that_would_take_all_memory_are_not_tried(monkeypatch):
    monkeypatch.setattr(held, "free_bytes", lambda: 10**9)
    capacity = SimpleNamespace(session_bytes=10**8, reserved_bytes=0)
    engine = SimpleNamespace(capacity=lambda: capacity)
    held._check_room(engine, 2)
    with pytest.raises(CapacityError, match=r"100 sessions take 10\.0 GB, and 1\.0 GB are free") as caught:
        held._check_room(engine, 100)
    assert caught.value.fix == "load with fewer sessions, or compile with a shorter context"


def test_a_try_allows_as_many_slow_ticks_as_its_p99():
    for ticks in (100, 200, 1000):
        steps = np.ones(ticks)
        steps[: over(ticks)] = 9
        assert np.percentile(steps, 99, method="higher") == 1
        steps[over(ticks)] = 9
        assert np.percentile(steps, 99, method="higher") == 9


def voice_of(pattern, step_ms=10.0):
    """A voice of one character a hop: `#` is loud. Ticks of four hops."""
    voice = Voice(200.0)
    for at in range(0, len(pattern), 4):
        hops = [np.full(100, 0.3 if c == "#" else 0.0, np.float32) for c in pattern[at : at + 4]]
        voice.add(np.concatenate(hops), step_ms, 0.0)
    return voice


def test_the_hangover_of_the_detector_is_taken_off_and_a_pause_is_no_end():
    assert voice_of("..##.#......").voiced == [c == "#" for c in "..####......"]


def test_hesitation_counts_the_silence_of_the_model_only():
    # The speech ends at 0.5 s, in tick 2: its output begins with hop 8 and speaks from hop 11 on.
    talk = Talk([Utterance(0.0, 0.5)], voice_of("...........#####...."))
    found = hesitation([talk])
    assert (found["ends"], found["count"], found["p50"]) == (1, 1, 150.0)
    already = hesitation([Talk([Utterance(0.0, 0.5)], voice_of("################"))])
    assert (already["already_speaking"], already["count"], already["p50"]) == (1, 0, None)
    assert hesitation([Talk([Utterance(0.0, 0.5)], voice_of("." * 16))])["unanswered"] == 1
    assert hesitation([Talk([], voice_of("." * 16))])["ends"] == 0  # nobody spoke yet


def test_stop_latency_is_until_nothing_more_is_heard():
    # Hop 12 is the first of tick 3: heard at 800 ms, and 10 + 10 + 30 ms for decoding, the step and sending.
    voice = voice_of("############........")
    found = stop_latency([Talk([Utterance(0.7, 2.0)], voice)])
    assert (found["trials"], found["stopped"]) == (1, 1) and found["max_ms"] == pytest.approx(150.0)
    went_on = stop_latency([Talk([Utterance(0.7, 0.8)], voice)])
    assert (went_on["trials"], went_on["stopped"], went_on["p50_ms"]) == (1, 0, None)
    assert stop_latency([Talk([Utterance(0.0, 0.1)], voice)])["trials"] == 0


def test_gates_hold_figures_to_the_budget_and_shares_to_their_limits():
    view = {
        "step_ms": {"p50": 5.0, "p95": 90.0, "p99": 161.0, "max": 170.0}, "ticks": 100, "missed_deadlines": 1,
        "turn_latency": {"step_budget_ms": 160.0}, "growth": {"ratio": 1.04},
    }  # fmt: skip
    passed = {v.figure: v.passed for v in check_gates(view, parse_gates("p50,p95,p99,max,growth,misses"))}
    assert passed == {"p50": True, "p95": True, "p99": False, "max": False, "growth": True, "misses": False}
    assert [v.passed for v in check_gates(view, parse_gates("growth:3%,misses:1%"))] == [False, True]
    with pytest.raises(UsageError):
        check_gates({**view, "growth": {"ratio": None}}, parse_gates("growth"))


@pytest.mark.parametrize("text", ["", "3%", "p98", "p99:3%", "growth:fast", "p99,,max"])
def test_a_gate_that_is_no_figure_is_refused(text):
    with pytest.raises(UsageError):
        parse_gates(text)


def turns(seed, padded=1.0, sleep=0.0, wander=0.5, count=400):
    """Two engines in turns on a machine that slows both down now and then; B is padded, or sleeps in one of fifty."""
    random = np.random.default_rng(seed)
    machine = 1 + wander * (np.sin(np.arange(count) / 20) > 0.8)
    sides = [5 * machine * np.exp(0.03 * random.standard_normal(count)) for _ in range(2)]
    sides[1] *= padded
    sides[1][7::50] += sleep
    found = Interleaved(*(list(side) for side in sides))
    found.stages = {"decode": ([0.9 * x for x in found.a], [0.9 * x for x in found.b])}
    found.alike = [k % 10 != 3 for k in range(count)]
    return found


def verdicts(found):
    view = against({"package": "a", "digest": "0"}, {"package": "b", "digest": "1"}, found)
    return view, {f["name"]: f["verdict"] for f in view["figures"]}


def test_turns_find_five_percent_on_a_machine_that_wanders_and_a_rare_sleep():
    view, found = verdicts(turns(1, padded=1.05))
    assert found["step p50"] == found["decode p50"] == "slower"
    assert view["figures"][0]["low"] < 0.05 < view["figures"][0]["high"]
    assert "40 of 400 ticks" in view["warnings"][-1]
    _, slept = verdicts(turns(2, sleep=30.0, wander=0.0))
    assert slept["step p50"] == "no difference shown" and slept["slowest 5% of steps"] == "slower"


def test_turns_of_equal_engines_show_no_difference():
    wrong = sum(not {"slower", "faster"}.isdisjoint(verdicts(turns(seed))[1].values()) for seed in range(20))
    assert wrong <= 1


def test_passes_are_left_out_in_the_packages_order():
    record = [{"pass": "a"}, {"pass": "b"}, {"pass": "a"}]
    assert passes_to_leave_out(record, []) == ["a", "b"] and passes_to_leave_out(record, ["b"]) == ["b"]
    with pytest.raises(UsageError):
        passes_to_leave_out(record, ["c"])


def test_noise_says_why():
    random = np.random.default_rng(0)
    quiet = list(5 * np.exp(0.02 * random.standard_normal(400)) * np.linspace(1, 1.3, 400))
    assert not noise(quiet, 2, 401)["too_noisy"]
    assert "interrupted 99 times" in noise(quiet, 99, 401)["why"][0]
    burst = list(np.array(quiet) * np.where(np.arange(400) // 50 % 3 == 1, 1.4, 1.0))
    assert any("wandered" in why for why in noise(burst, 0, 401)["why"])
    assert noise(quiet[:20], 0, 21)["median_known_to"] is None


def test_events_of_the_systems_are_counted_where_it_counts_any():
    software, task_clock = 1, 1
    try:
        counter = Counter(software, task_clock)
    except OSError as refused:
        pytest.skip(f"needs a system that counts events: {refused}")
    before = counter.read()
    sum(range(200_000))
    assert counter.read() > before
    counter.close()
    assert instructions([1, 10, 20, 30])["per_tick_p50"] == 20


def test_a_machine_that_counts_no_instructions_says_why():
    with pytest.raises(OSError, match="perf_event_open"):
        Counter(99, 99)
    assert struct.calcsize("IIQ") == 16  # the head of the attributes has no padding


def test_energy_is_read_from_all_packages_and_wraps_around(tmp_path):
    for k in range(2):
        zone = tmp_path / f"intel-rapl:{k}"
        zone.mkdir()
        (zone / "max_energy_range_uj").write_text("9999999\n")
        (zone / "energy_uj").write_text("9000000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0: its energy is in there already
    meter = Meter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("9500000\n")
    assert meter.joules() == pytest.approx(2.5) and meter.joules() == pytest.approx(2.5)
    with pytest.raises(OSError, match="does not tell its energy"):
        Meter(tmp_path / "absent")


def test_quality_comes_from_the_record_and_from_the_scores(tmp_path):
    notes = [
        "100 bytes of codes", "a: i4g32 relative error 0.1000, effect 4.00e-03 nats",
        "b: i4g32 relative error 0.1000, effect 4.00e-03 nats, spared: i8g32 0.0100",
    ]  # fmt: skip
    record = [{"pass": "quantize.int4", "notes": notes}]
    task = {"score": 0.5, "interval": [0.4, 0.6], "episodes": 9}
    (tmp_path / "eval.json").write_text(json.dumps({"schema": 1, "model": "m", "tasks": {"echo": task}}))
    found = quality(record, read_scores(tmp_path / "eval.json"))
    assert found["kl"] == pytest.approx(4.04e-3)
    assert found["scores"] == {"echo": {"score": 0.5, "interval": [0.4, 0.6]}} and "scores of m" in found["against"]
    assert isinstance(quality([], None), str)
    (tmp_path / "eval.json").write_text('{"schema": 2}')
    with pytest.raises(UsageError):
        read_scores(tmp_path / "eval.json")


def test_a_background_load_runs_and_ends(tmp_path):
    case = Case.model_validate({"name": "x", "load": [{"kind": "busy", "nice": 19}]})
    with background_load(case.load, tmp_path):
        pass
    absent = Case.model_validate({"name": "x", "load": [{"kind": "model", "path": str(tmp_path / "absent.tmlc")}]})
    with pytest.raises(KernelError, match="did not start"), background_load(absent.load, tmp_path):
        pass
