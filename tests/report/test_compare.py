"""`tmlc profile --compare`: made-up sittings in which the truth is known."""

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
from tmlc.report.profile.samples import Samples
from tmlc.report.profile.sittings import by_layer, figures
from tmlc.runtimes.core.kernels import KernelCall

STAGES = {"append": 0.19, "decode[0]": 0.55, "vocode": 0.23, "embed_text": 0.002}
KERNELS = {"decode/linear layer 0": 0.05, "decode/moe layer 1": 0.05, "vocode/linear": 0.15,
           "speak/copy": 0.0006}  # fmt: skip
TICKS, SITTINGS = 100, 10
PLACED, APART, KERNEL = 0.01, 0.008, 0.035
"""Standard deviations of logarithms between sittings, as 120 of `nano` showed them: of all figures together, of each
stage besides, and of a kernel that is timed in every third tick."""


def levels(seed: int, count: int = SITTINGS, placed: float = PLACED, alike: float = 0.3) -> np.ndarray:
    """What the machine does to all figures of so many sittings: logarithms, each like the one before by `alike`."""
    random = np.random.default_rng((seed, 1))
    drawn = random.standard_normal(count)
    for k in range(1, count):
        drawn[k] = alike * drawn[k - 1] + np.sqrt(1 - alike**2) * drawn[k]
    return placed * drawn


def made(
    seed: int, level: np.ndarray | None = None, sittings: int = SITTINGS, padded: float = 1.0, sleep: float = 0.0
) -> dict[str, Any]:
    """A profile. All figures of a sitting are moved by its `level`, each by an own draw besides. A kernel of decode[0]
    runs twice so that the stage takes `padded` × as long, and one tick of fifty takes `sleep` ms more.
    """
    random = np.random.default_rng(seed)
    columns: dict[str, list[float]] = {}
    for one in levels(seed, sittings) if level is None else level:

        def timed(ms: float, count: int, apart: float = APART, one: float = one) -> np.ndarray:
            own = np.exp(one + apart * random.standard_normal())
            return ms * own * np.exp(0.03 * random.standard_normal(count))

        stages = {name: timed(ms, TICKS) for name, ms in STAGES.items()}
        stages["decode[0]"] *= padded
        between = timed(0.2, TICKS) + 2.0 * (random.random(TICKS) < 0.003)
        between[7::50] += sleep
        samples = Samples(wait=[0.0] * (TICKS + 1), stages={n: [9.0, *v] for n, v in stages.items()})
        samples.between_calls = [9.0, *between]
        samples.step = [99.0, *np.sum([*stages.values(), between], axis=0)]
        samples.first_audio = [None, *(0.4 * ms for ms in samples.step[1:])]
        kernels = {name: float(timed(ms, 1, KERNEL)[0]) for name, ms in KERNELS.items()}
        kernels["decode/moe layer 1"] *= 1 if padded == 1 else 1.5
        for name, value in figures(samples, kernels).items():
            columns.setdefault(name, []).append(value)
    return {
        "schema": 3, "package": "made.tmlc", "digest": "0", "machine": {"cpu": "one"}, "inputs": {"seed": 0},
        "settings": {"pin": False},
        "sittings": {"ticks": TICKS, "figures": columns, "busy": [0.02] * len(columns["step"])},
    }  # fmt: skip


def verdicts(comparison: dict[str, Any]) -> dict[str, str]:
    return {f["name"]: f["verdict"] for f in comparison["figures"]}


def different(comparison: dict[str, Any]) -> list[str]:
    return [name for name, verdict in verdicts(comparison).items() if verdict in ("slower", "faster")]


def test_a_padded_kernel_is_found_in_its_stage_and_by_itself_and_nowhere_else() -> None:
    found = compare(made(1), made(2, padded=1.07))
    assert {"decode[0]", "kernel decode/moe layer 1"} <= set(different(found))
    untouched = {"append", "vocode", "between calls", "kernel decode/linear layer 0"}
    assert untouched.isdisjoint(different(found))
    (stage,) = (f for f in found["figures"] if f["name"] == "decode[0]")
    assert stage["low"] < 0.07 < stage["high"] and stage["a"] == pytest.approx(0.55, rel=0.06)
    assert "kernel decode/moe layer 1" in slower(found, 0.3) and slower(found, 0.5) == []
    back = compare(made(2, padded=1.07), made(1))
    assert verdicts(back)["decode[0]"] == "faster" and slower(back, 0.0) == []
    assert found["warnings"] == []


def test_nearly_every_padded_kernel_is_found() -> None:
    found = [compare(made(2 * k), made(2 * k + 1, padded=1.07)) for k in range(40)]
    assert all(verdicts(one)["kernel decode/moe layer 1"] == "slower" for one in found)
    assert sum(verdicts(one)["decode[0]"] == "slower" for one in found) >= 36


def test_a_sleep_in_one_tick_of_fifty_is_found_in_the_slow_ticks_and_not_in_the_median() -> None:
    found = compare(made(3), made(4, sleep=30.0))
    assert verdicts(found)["slowest 5% of steps"] == "slower"
    assert verdicts(found)["step"] == verdicts(found)["decode[0]"] == "no difference shown"
    assert "slowest 5% of steps" in slower(found, 0.03)


@pytest.mark.parametrize("machine", [{}, {"placed": 0.06}, {"placed": 0.018, "alike": 0.5}])
def test_profiles_of_one_engine_one_after_the_other_show_no_difference(machine: dict[str, float]) -> None:
    """An interval from the ticks of one sitting would be a tenth of what sittings differ by."""
    wrong = 0
    for seed in range(60):
        level = levels(seed, 2 * SITTINGS, **machine)
        found = compare(made(2 * seed, level[:SITTINGS]), made(2 * seed + 1, level[SITTINGS:]))
        wrong += bool(different(found)) or bool(slower(found, 0.0))
    assert wrong <= 2


@pytest.mark.slow
def test_of_a_hundred_comparisons_of_equal_engines_about_one_calls_any_figure_different() -> None:
    wrong = sum(bool(different(compare(made(2 * k), made(2 * k + 1)))) for k in range(600))
    assert wrong <= 12


def test_a_machine_that_was_busy_for_a_part_of_one_profile_is_no_difference() -> None:
    for seed in range(10):
        level = levels(seed)
        level[5:] += 0.15
        assert different(compare(made(2 * seed + 1), made(2 * seed, level))) == []


def test_too_few_sittings_are_said_to_be_too_few() -> None:
    found = compare(made(1, sittings=3), made(2, sittings=3, padded=2.0))
    assert set(verdicts(found).values()) == {"too few sittings"} and slower(found, 0.0) == []
    assert "too few sittings to conclude: 3 and 3; it takes 7 on both sides" in found["warnings"][0]
    enough = compare(made(1, sittings=7), made(2, sittings=7, padded=2.0))
    assert "decode[0]" in different(enough)


def test_sittings_that_differ_by_too_much_are_a_warning() -> None:
    found = compare(made(1, levels(1, placed=0.2)), made(2, levels(2, placed=0.2)))
    assert any("too noisy to conclude" in text for text in found["warnings"])


def test_what_else_differs_is_a_warning() -> None:
    other = {**made(2), "machine": {"cpu": "two"}, "inputs": {"seed": 1}, "settings": {"pin": True}}
    for name in ("embed_text", "kernel speak/copy"):
        del other["sittings"]["figures"][name]
    other["sittings"]["ticks"] = 80
    text = "\n".join(compare(made(1), other)["warnings"])
    for part in ("machines differ: cpu one and two", "seed 0 and 1", "pin False and True", "100 and 80 ticks",
                 "only one of them has: embed_text"):  # fmt: skip
        assert part in text
    assert "speak/copy" not in text


def test_a_stage_that_hardly_counts_is_shown_and_fails_nothing_and_such_a_kernel_is_left_out() -> None:
    slow = made(2)
    for name in ("embed_text", "kernel speak/copy"):
        slow["sittings"]["figures"][name] = [4 * ms for ms in slow["sittings"]["figures"][name]]
    found = compare(made(1), slow)
    assert verdicts(found)["embed_text"] == "slower" and slower(found, 0.03) == []
    assert "kernel speak/copy" not in verdicts(found)


def test_slow_ticks_of_a_disturbed_machine_are_too_noisy_to_tell() -> None:
    quiet, slow = made(3), made(4)
    for view, ms in ((quiet, 1.2), (slow, 1.8)):
        view["sittings"]["figures"]["slowest 5% of steps"] = [ms + 0.01 * k for k in range(SITTINGS)]
    assert verdicts(compare(quiet, slow))["slowest 5% of steps"] == "slower"
    slow["sittings"]["busy"] = [0.3] * 4 + [0.02] * 6
    disturbed = compare(quiet, slow)
    assert disturbed["warnings"] == ["other programs were at work beside 4 of 10 sittings of B"]
    assert verdicts(disturbed)["slowest 5% of steps"] == "too noisy" and slower(disturbed, 0.0) == []
    sleepy, padded = made(4, sleep=60.0), made(2, padded=1.3)
    sleepy["sittings"]["busy"] = padded["sittings"]["busy"] = [0.3] * 10
    assert verdicts(compare(quiet, sleepy))["slowest 5% of steps"] == "slower"
    assert "decode[0]" in slower(compare(made(1), padded), 0.1)


def test_a_kernel_counts_all_its_calls_of_a_method_in_a_layer() -> None:
    named = (("linear", ("layers.3.q",)), ("linear", ("layers.3.o", "b")), ("silu", ()), ("linear", ("layers.4.q",)))
    calls = [KernelCall("decode", k, op, "", 4, 4, 1e6, weights=of) for k, (op, of) in enumerate(named)]
    calls.append(KernelCall("vocode", 0, "gelu", "", 2, 2, 3e6))
    assert by_layer(calls, ticks=2) == {
        "decode/linear layer 3": 1.0, "decode/linear layer 4": 0.5, "decode/silu": 0.5, "vocode/gelu": 1.5
    }  # fmt: skip


def test_ticks_that_are_alike_count_for_fewer() -> None:
    random, level = np.random.default_rng(1), np.ones(2000)
    free = np.exp(0.03 * random.standard_normal(2000))
    alike = np.empty(2000)
    alike[0] = 0.0
    for k in range(1, 2000):
        alike[k] = 0.9 * alike[k - 1] + np.sqrt(1 - 0.81) * random.standard_normal()
    assert independent(free, level, 0.5) > 1500 and independent(np.exp(0.03 * alike), level, 0.5) < 400
    assert independent(np.full(50, 2.0), np.ones(50), 0.5) == 50


def test_the_mean_of_the_slowest_ticks() -> None:
    assert tail_mean(np.arange(1.0, 101.0)) == 98.0 and tail_mean(np.array([3.0, 9.0])) == 9.0


def written(folder: Path, name: str, view: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(profile_text(view), encoding="utf-8")
    return path


def test_numbers_of_a_file_stand_on_one_line_and_strings_are_left_alone() -> None:
    view = {"path": "[\n 1 ]", "numbers": [1.5, None, -2e-7], "words": ["a"], "none": []}
    text = profile_text(view)
    assert json.loads(text) == view and '"numbers": [1.5, null, -2e-07]' in text


def test_a_damaged_profile_is_refused(tmp_path: Path) -> None:
    good = made(1, sittings=3)
    sat = good["sittings"]
    assert read_profile(written(tmp_path, "good.json", good))["sittings"] == sat
    broken = {
        "other version": {**good, "schema": 2},
        "no profile": {"hello": 1},
        "no sittings": {**good, "sittings": None},
        "nothing of them": {k: v for k, v in good.items() if k != "sittings"},
        "short list": {**good, "sittings": {**sat, "busy": [0]}},
        "text": {**good, "sittings": {**sat, "figures": {"step": ["x", "y", "z"]}}},
        "no steps": {**good, "sittings": {**sat, "figures": {"append": [1.0, 2.0, 3.0]}}},
        "below nothing": {**good, "sittings": {**sat, "figures": {"step": [1.0, -2.0, 3.0]}}},
        "empty": {**good, "sittings": {**sat, "figures": {"step": []}, "busy": []}},
    }
    for name, view in broken.items():
        with pytest.raises(UsageError, match=f"{name}\\.json"):
            read_profile(written(tmp_path, f"{name}.json", view))
    (tmp_path / "nan.json").write_text(profile_text(good).replace('"step": [', '"step": [NaN, '))
    (tmp_path / "cut.json").write_text(profile_text(good)[:200])
    for name in ("nan.json", "cut.json", "absent.json"):
        with pytest.raises(UsageError):
            read_profile(tmp_path / name)


def test_a_session_that_became_much_faster_has_a_noise_in_the_order_of_its_change() -> None:
    steps = np.concatenate([np.full(50, 100.0), np.full(350, 1.0)]) * np.random.default_rng(0).normal(1, 0.01, 400)
    found = noise(steps.tolist(), 0, 400)
    assert found["too_noisy"] and 0 <= found["median_known_to"] < 100
