"""Foreign checkpoints against transformers: the traced program's logits, whole and streamed in random chunks; and exact
counts of what was matched."""

import random

import pytest
import torch

from tmlc.frontend import load_program, open_checkpoint
from tmlc.frontend.foreign import MATCH_RECORD, families, match_counts
from tmlc.ir.run import ProgramRunner
from tmlc.pipeline.manager import run_pipeline
from tmlc.pipeline.pipeline import Pipeline, Step

DEFAULT = [(family, 0) for family in families()] + [(family, 1) for family in ("llama", "gpt_oss", "deepseek_v3")]
DEFAULT += [("olmoe", 2)]  # its queries, keys and values are clamped
SWEEP = [(family, seed) for family in families() for seed in range(6)]


# Of two layers each (seed 0 of conftest.settings). A number that changes here means that a matcher works differently,
# or that transformers writes a model in another way: look at the program before changing the table.
COUNTS = {
    "llama": dict(add=4, attention=2, embedding=1, linear=15, rms_norm=5, rope=4, swiglu=2),
    "qwen3": dict(add=4, attention=2, embedding=1, linear=15, rms_norm=9, rope=4, swiglu=2),
    "qwen3_moe": dict(add=4, attention=2, embedding=1, linear=11, moe=2, rms_norm=9, rope=4, topk_router=2),
    "olmoe": dict(add=4, attention=2, embedding=1, linear=11, moe=2, rms_norm=9, rope=4, topk_router=2),
    "mixtral": dict(add=4, attention=2, embedding=1, linear=11, moe=2, rms_norm=5, rope=4, topk_router=2),
    "gpt_oss": dict(add=4, attention=2, embedding=1, linear=11, moe=2, rms_norm=5, rope=4, topk_router=2),
    "deepseek_v3": dict(
        add=6, attention=2, columns=4, concat_heads=2, embedding=1, head_columns=4, linear=19, moe=2, rms_norm=9,
        rope=4, swiglu=2, topk_router=2,
    ),
    "glm4_moe": dict(
        add=6, attention=2, embedding=1, linear=17, moe=2, rms_norm=9, rope=4, swiglu=2, topk_router=2
    ),
    "mistral": dict(add=4, attention=2, embedding=1, linear=15, rms_norm=5, rope=4, swiglu=2),
    "qwen2": dict(add=4, attention=2, embedding=1, linear=15, rms_norm=5, rope=4, swiglu=2),
    "phi3": dict(add=4, attention=2, columns=10, embedding=1, linear=9, rms_norm=5, rope=4, swiglu=2),
}  # fmt: skip


def logits_of(program, source, ids, chunks):
    session, at, parts = ProgramRunner(program, source).session(), 0, []
    for count in chunks:
        (x,) = session.call("embed_text", ids[at : at + count, None])
        (hidden,) = session.call("decode", x)
        parts.append(session.call("unembed", hidden)[0])
        at += count
    return torch.cat(parts)


def random_chunks(total, seed):
    draw = random.Random(seed)
    while total > 0:
        count = min(total, draw.randint(1, 12))
        yield count
        total -= count


def compare(case, seed):
    assert 0.5 < case.logits.std() < 2.0, "the bound of 1e-4 is meant for logits of unit scale"
    checkpoint = open_checkpoint(case.folder)
    program = load_program(checkpoint, {"context": 512, "policy": "end", "max_append": 16})
    whole = logits_of(program, checkpoint, case.ids, [len(case.ids)])
    assert (whole - case.logits).abs().max() <= 1e-4
    streaming = run_pipeline(program, Pipeline("test", (Step("state.insert", {}),)))
    streamed = logits_of(streaming, checkpoint, case.ids, random_chunks(len(case.ids), seed))
    assert (streamed - case.logits).abs().max() <= 1e-4
    return program


@pytest.mark.parametrize("family, seed", DEFAULT)
def test_logits_equal_transformers(foreign_case, family, seed):
    program = compare(foreign_case(family, seed, 50), seed)
    (record,) = program.record
    assert record.name == MATCH_RECORD and record.matches == sum(match_counts(program).values())
    if seed == 0:
        assert match_counts(program) == COUNTS[family]
    assert match_counts(program).get("clamp", 0) == (6 if (family, seed) == ("olmoe", 2) else 0)


@pytest.mark.slow
@pytest.mark.parametrize("family, seed", SWEEP)
def test_logits_equal_transformers_over_300_positions(foreign_case, family, seed):
    compare(foreign_case(family, seed, 300), seed)
