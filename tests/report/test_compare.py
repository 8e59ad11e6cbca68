"""`tmlc profile --compare`: made-up ticks in which the truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tmlc.errors import UsageError
from tmlc.report.bootstrap import independent, tail_mean
from tmlc.report.compare import compare, slower
from tmlc.report.noise import noise
from tmlc.report.profile.file import profile_text, read_profile

LEVELS = {"decode": 6.0, "vocode": 1.5, "embed_text": 0.02}


def made(
    seed: int,
    count: int = 650,
    noise: float = 0.03,
    padded: float = 1.0,
    sleep: float = 0.0,
    growth: float = 0.0,
    alike: float = 0.0,
    burst: float = 0.0,
) -> dict[str, Any]:
    """A profile: log-normal stages with a rare slow tick. `padded` × vocode, `sleep` ms more in one tick of fifty,
    steps that grow by `growth`, ticks correlated by `alike`, a machine slower by `burst` in a quarter of the session.
    """
    random = np.random.default_rng(seed)
    factor = 1 + growth * np.arange(count) / count
    factor[count // 2 : count * 3 // 4] *= 1 + burst

    def series(level: float) -> np.ndarray:
        e = random.standard_normal(count)
        for i in range(1, count if alike else 0):
            e[i] = alike * e[i - 1] + np.sqrt(1 - alike**2) * e[i]
        return level * factor * np.exp(noise * e)

    stages = {name: series(level) for name, level in LEVELS.items()}
    stages["vocode"] *= padded
    between = series(0.4) + 2.0 * (random.random(count) < 0.003)
    between[7::50] += sleep
    step = np.sum([*stages.values(), between], axis=0)
    samples = {
        "every": 1, "step_ms": step.tolist(), "wait_ms": [0.0] * count, "between_calls_ms": between.tolist(),
        "first_audio_ms": (0.4 * step).tolist(), "stages_ms": {name: v.tolist() for name, v in stages.items()},
    }  # fmt: skip
    return {
        "schema": 2, "package": "made.tmlc", "digest": "0", "ticks": count + 1, "machine": {"cpu": "one"},
        "inputs": {"seed": 0}, "settings": {"pin": False}, "preempted": 0, "samples": samples,
    }  # fmt: skip


def verdicts(comparison: dict[str, Any]) -> dict[str, str]:
    return {f["name"]: f["verdict"] for f in comparison["figures"]}


def test_a_stage_padded_by_five_percent_is_found_and_nothing_else() -> None:
    found = compare(made(1), made(2, padded=1.05))
    assert [name for name, verdict in verdicts(found).items() if verdict == "slower"] == ["vocode p50"]
    (vocode,) = (f for f in found["figures"] if f["name"] == "vocode p50")
    assert vocode["low"] < 0.05 < vocode["high"] and vocode["a"] == pytest.approx(1.5, rel=0.01)
    assert slower(found, 0.03) == ["vocode p50"] and slower(found, 0.05) == []
    back = compare(made(2, padded=1.05), made(1))
    assert verdicts(back)["vocode p50"] == "faster" and slower(back, 0.0) == []
    assert found["warnings"] == []


def test_a_sleep_in_one_tick_of_fifty_is_found_in_the_slow_ticks_and_not_in_the_median() -> None:
    found = compare(made(3), made(4, sleep=30.0))
    assert verdicts(found)["slowest 5% of steps"] == "slower"
    assert verdicts(found)["step p50"] == verdicts(found)["decode p50"] == "no difference shown"
    assert "slowest 5% of steps" in slower(found, 0.03)


@pytest.mark.parametrize(
    "form", [{}, {"alike": 0.9}, pytest.param({"growth": 0.5, "noise": 0.1}, marks=pytest.mark.slow)]
)
def test_two_samples_of_one_distribution_show_no_difference(form: dict[str, float]) -> None:
    wrong = 0
    for seed in range(100):
        found = compare(made(2 * seed, **form), made(2 * seed + 1, **form))
        wrong += not {"slower", "faster"}.isdisjoint(verdicts(found).values()) or bool(slower(found, 0.0))
    assert wrong <= 5


def test_a_step_that_grows_in_both_hides_no_difference() -> None:
    found = compare(made(1, growth=0.3), made(2, growth=0.3, padded=1.05))
    assert verdicts(found)["vocode p50"] == "slower" and not found["warnings"]


def test_a_machine_that_was_busy_for_a_while_is_noise_and_no_difference() -> None:
    found = compare(made(1), made(2, burst=0.4))
    assert "slower" not in verdicts(found).values()
    assert any("too noisy to conclude" in text for text in found["warnings"])
    wide = compare(made(1, noise=0.5, alike=0.9), made(2, noise=0.5, alike=0.9))
    assert any("known to ±" in text for text in wide["warnings"])
    disturbed = {**made(2), "preempted": 400}
    assert compare(made(1), disturbed)["warnings"] == ["other programs wanted the cores: B was interrupted 400 times"]


def test_too_few_ticks_are_said_to_be_too_few() -> None:
    found = compare(made(1, count=5), made(2, count=5, padded=2.0))
    assert set(verdicts(found).values()) == {"too few ticks"} and slower(found, 0.0) == []
    assert "too few ticks" in found["warnings"][0]
    some = verdicts(compare(made(1, count=100), made(2, count=100)))
    assert some["step p50"] == "no difference shown" and some["step p99"] == "too few ticks"


def test_what_else_differs_is_a_warning() -> None:
    other = {**made(2, count=640), "machine": {"cpu": "two"}, "inputs": {"seed": 1}, "settings": {"pin": True}}
    del other["samples"]["stages_ms"]["embed_text"]
    text = "\n".join(compare(made(1), other)["warnings"])
    for part in ("machines differ: cpu one and two", "seed 0 and 1", "pin False and True", "651 and 641 ticks",
                 "only one of them has: embed_text"):  # fmt: skip
        assert part in text


def test_a_stage_that_hardly_counts_is_shown_and_fails_nothing() -> None:
    slow = made(2)
    slow["samples"]["stages_ms"]["embed_text"] = [3 * ms for ms in slow["samples"]["stages_ms"]["embed_text"]]
    found = compare(made(1), slow)
    assert verdicts(found)["embed_text p50"] == "slower" and slower(found, 0.03) == []


def test_ticks_that_are_alike_count_for_fewer() -> None:
    level = np.ones(2000)
    free = np.array(made(1, count=2000)["samples"]["stages_ms"]["decode"])
    alike = np.array(made(1, count=2000, alike=0.9)["samples"]["stages_ms"]["decode"])
    assert independent(free, level, 0.5) > 1500 and independent(alike, level, 0.5) < 400
    assert independent(np.full(50, 2.0), np.ones(50), 0.5) == 50


def test_the_mean_of_the_slowest_ticks() -> None:
    assert tail_mean(np.arange(1.0, 101.0)) == 98.0 and tail_mean(np.array([3.0, 9.0])) == 9.0


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    a, b = made(5), made(6)
    (figure,) = (f for f in compare(a, b)["figures"] if f["name"] == "step p50")
    random = np.random.default_rng(0)
    x, y = (np.array(view["samples"]["step_ms"]) for view in (a, b))
    plain = [np.median(random.choice(y, y.size)) - np.median(random.choice(x, x.size)) for _ in range(4000)]
    spread = np.std(plain) / np.median(x)
    error = (1 - compare(a, b)["confidence"]) / 2
    assert (figure["high"] - figure["low"]) / 2 == pytest.approx(spread * normal_quantile(1 - error), rel=0.15)


def normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def written(folder: Path, name: str, view: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(profile_text(view), encoding="utf-8")
    return path


def test_numbers_of_a_file_stand_on_one_line_and_strings_are_left_alone() -> None:
    view = {"path": "[\n 1 ]", "numbers": [1.5, None, -2e-7], "words": ["a"], "none": []}
    text = profile_text(view)
    assert json.loads(text) == view and '"numbers": [1.5, null, -2e-07]' in text


def test_a_damaged_profile_is_refused(tmp_path: Path) -> None:
    good = made(1, count=20)
    assert read_profile(written(tmp_path, "good.json", good))["samples"] == good["samples"]
    short = made(1, count=20)
    short["samples"]["wait_ms"].pop()
    broken = {
        "other version": {**good, "schema": 1},
        "no profile": {"hello": 1},
        "no samples": {k: v for k, v in good.items() if k != "samples"},
        "short list": short,
        "text": {**good, "samples": {**good["samples"], "step_ms": ["x"] * 20}},
        "empty": {**good, "samples": {**good["samples"], "step_ms": []}},
    }
    for name, view in broken.items():
        with pytest.raises(UsageError, match=f"{name}\\.json"):
            read_profile(written(tmp_path, f"{name}.json", view))
    (tmp_path / "nan.json").write_text(profile_text(good).replace('"wait_ms": [0.0', '"wait_ms": [NaN'))
    (tmp_path / "cut.json").write_text(profile_text(good)[:200])
    for name in ("nan.json", "cut.json", "absent.json"):
        with pytest.raises(UsageError):
            read_profile(tmp_path / name)


def test_a_session_that_became_much_faster_has_a_noise_in_the_order_of_its_change() -> None:
    steps = np.concatenate([np.full(50, 100.0), np.full(350, 1.0)]) * np.random.default_rng(0).normal(1, 0.01, 400)
    found = noise(steps.tolist(), 0, 400)
    assert found["too_noisy"] and 0 <= found["median_known_to"] < 100


def test_slow_ticks_of_a_disturbed_machine_are_too_noisy_to_tell() -> None:
    quiet, slow = made(3), made(4, sleep=5.0)
    assert verdicts(compare(quiet, slow))["slowest 5% of steps"] == "slower"
    disturbed = compare(quiet, {**slow, "preempted": 400})
    assert verdicts(disturbed)["slowest 5% of steps"] == "too noisy" and slower(disturbed, 0.0) == []
    assert "interrupted" in str(disturbed["warnings"])
    sleepy = compare(quiet, {**made(4, sleep=60.0), "preempted": 400})
    assert verdicts(sleepy)["slowest 5% of steps"] == "slower"
    padded = compare(made(1), {**made(2, padded=1.3), "preempted": 400})
    assert "vocode p50" in slower(padded, 0.1)
