"""Pipeline files are strict lists; a wrong key, pass, setting or expectation is refused before anything runs."""

import pytest

from tmlc.errors import PipelineError
from tmlc.pipeline.pass_base import NearMiss, PassResult
from tmlc.pipeline.pipeline import Pipeline, Step, load_pipeline, preset_names
from tmlc.pipeline.registry import all_passes, get_pass, register_pass

DEAD = "canonicalize.dead_code"


def refuses(text, *words):
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text, "test.yaml")
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.fix


def result(matches, misses=0):
    return PassResult(None, matches, [NearMiss("decode", f"linear_{i}", "has a bias") for i in range(misses)])


def test_every_preset_parses_and_survives_a_round_trip():
    assert "cpu" in preset_names()
    for name in preset_names():
        pipeline = load_pipeline(name)
        assert Pipeline.parse(pipeline.to_yaml(), pipeline.name) == pipeline


def test_every_pass_says_what_it_does_and_is_known_by_its_room_and_name():
    for name, cls in all_passes().items():
        assert cls.__doc__ and cls.name == name and cls.__module__ == f"tmlc.passes.{name}", name


def test_a_pass_may_repeat():
    assert [s.name for s in Pipeline.parse(f"[{DEAD}, {DEAD}]", "p").steps] == [DEAD, DEAD]


def test_files_that_are_not_a_list_of_passes_are_refused():
    refuses("a: [", "not YAML", "line")
    refuses("{}", "list of passes")
    refuses("[]", "list of passes")
    refuses("- 3", "entry 1", "pass: NAME")
    refuses(f"- config: {{}}\n- pass: {DEAD}", "entry 1")


def test_unknown_keys_passes_and_settings_are_named_with_the_closest_known_one():
    refuses(f"- pass: {DEAD}\n  expect_match: 1", "'expect_match'", "did you mean expect_matches")
    refuses("- pass: canonicalize.deadcode", "'canonicalize.deadcode'", f"did you mean {DEAD}")
    refuses("- pass: state.insert\n  config: {contxt: 4}", "'contxt'", "did you mean context")
    refuses("- pass: state.insert\n  config: {context: many}", "'context'", "'many'")
    refuses("- pass: state.insert\n  config: [1]", "not a mapping")


@pytest.mark.parametrize("value", ["some", "=>1", "-1", "true", "1.5"])
def test_an_expectation_that_means_nothing_is_refused(value):
    refuses(f"- pass: {DEAD}\n  expect_matches: {value}", "expect_matches")


@pytest.mark.parametrize(
    ("expected", "good", "bad"), [(">=1", 1, 0), ("==12", 12, 11), ("3", 3, 4), ("<2", 1, 2), ("0", 0, 1)]
)
def test_expectations_compare_the_number_of_matches(expected, good, bad):
    step = Step(DEAD, {}, expected)
    step.check_matches(result(good))
    with pytest.raises(PipelineError, match=f"matched {bad} times"):
        step.check_matches(result(bad))


def test_expecting_all_means_no_near_miss_and_the_first_one_is_told():
    Step(DEAD, {}, "all").check_matches(result(0))
    with pytest.raises(PipelineError, match="decode/linear_0: has a bias"):
        Step(DEAD, {}, "all").check_matches(result(5, misses=2))


def test_steps_can_be_disabled_cut_off_and_configured():
    pipeline = load_pipeline("cpu")
    names = [s.name for s in pipeline.steps]
    assert [s.name for s in pipeline.disable([DEAD]).steps] == [n for n in names if n != DEAD]
    assert pipeline.stop_after("route.stack_experts").steps[-1].name == "route.stack_experts"
    changed = pipeline.configure("state.insert", context=64, sinks=None)
    assert next(s for s in changed.steps if s.name == "state.insert").config == {"context": 64}
    with pytest.raises(PipelineError, match="--disable"):
        pipeline.disable(["state.instert"])
    with pytest.raises(PipelineError, match="--stop-after"):
        pipeline.stop_after("nothing")
    with pytest.raises(PipelineError, match="no setting 'contexts'"):
        pipeline.configure("state.insert", contexts=1)


def test_a_list_of_names_is_a_pipeline():
    assert [s.name for s in Pipeline.of([DEAD, " state.insert "]).steps] == [DEAD, "state.insert"]
    with pytest.raises(PipelineError, match="no pass"):
        Pipeline.of(["nothing"])


def test_a_pipeline_that_is_neither_preset_nor_file_is_refused(tmp_path):
    with pytest.raises(PipelineError, match="neither a preset nor a pipeline file"):
        load_pipeline(tmp_path / "absent.yaml")
    (tmp_path / "p.yaml").write_text(f"- {DEAD}")
    assert len(load_pipeline(tmp_path / "p.yaml").steps) == 1


def test_two_passes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two passes"):
        register_pass(DEAD)(type("Other", (get_pass(DEAD),), {}))


def test_the_levels_are_the_targets_own_pipeline_cut_down():
    whole = load_pipeline("cpu")
    names = {level: [s.name for s in load_pipeline(level, "cpu").steps] for level in ("O0", "O1", "O2")}
    assert names["O2"] == [s.name for s in whole.steps]
    assert set(names["O0"]) < set(names["O1"]) < set(names["O2"])
    assert {"state.insert", "route.stack_experts", "memory.plan"} <= set(names["O0"])
    assert "fuse.merge_linears" not in names["O1"] and "fuse.residual_norm" in names["O1"]
    refuses(f"- {{pass: {DEAD}, level: 3}}", "`level` is 3", "0, 1 or 2")
    refuses(f"- {{pass: {DEAD}, level: high}}", "`level`")
    with pytest.raises(PipelineError):
        load_pipeline("O1", "abacus")
