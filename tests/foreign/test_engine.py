"""Foreign checkpoints compiled for the CPU, against transformers: logits, bits in any cut, greedy text, bfloat16."""

import copy
import random

import numpy as np
import pytest
import torch

import tmlc
from tmlc.frontend.foreign import families

SWEEP = [(family, seed) for family in families() for seed in range(6)]


def compiled(case, tmp_path, precision="fp32"):
    package = tmp_path / f"{precision}.tmlc"
    tmlc.compile(case.folder, package, precision=precision)
    return package


def append(engine, ids, sizes):
    """Logits of `ids`, appended in parts of these sizes, over and over."""
    with engine.session() as session:
        at, parts, index = 0, [], 0
        while at < len(ids):
            count = sizes[index % len(sizes)]
            parts.append(session.append(tokens=ids[at : at + count]))
            at, index = at + count, index + 1
    return np.concatenate(parts)


def greedy(engine, prompt, count):
    with engine.session() as session:
        logits, said = session.append(tokens=prompt), []
        for _ in range(count):
            said.append(int(logits[-1].argmax()))
            logits = session.append(tokens=said[-1:])
    return said


def greedy_of_transformers(model, prompt, count):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def compare(case, package, seed, words):
    ids, expected = case.ids.tolist(), case.logits.numpy()
    assert 0.5 < expected.std() < 2.0, "the bound of 1e-4 is meant for logits of unit scale"
    draw = random.Random(seed)
    with tmlc.load(package, threads=1) as engine:
        whole = append(engine, ids, [len(ids)])
        assert whole.shape == expected.shape and np.abs(whole - expected).max() <= 1e-4
        assert np.array_equal(append(engine, ids, [draw.randint(1, 23) for _ in range(9)]), whole)
        assert np.array_equal(append(engine, ids[:40], [1]), whole[:40])
        assert greedy(engine, ids[:9], words) == greedy_of_transformers(case.model, ids[:9], words)
    with tmlc.load(package, threads=2) as engine:
        assert np.array_equal(append(engine, ids, [17, 5]), whole)


@pytest.mark.parametrize("family", families())
def test_the_engine_equals_transformers(foreign_case, tmp_path, family):
    case = foreign_case(family, 0, 90)
    compare(case, compiled(case, tmp_path), 0, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "seed"), SWEEP)
def test_the_engine_equals_transformers_over_300_positions(foreign_case, tmp_path, family, seed):
    case = foreign_case(family, seed, 300)
    compare(case, compiled(case, tmp_path), seed, 64)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_bf16_errs_no_more_than_transformers_in_bf16_does(foreign_case, tmp_path, family):
    """Root mean square over all logits: the largest error is that of the one position whose routing tipped over."""
    case = foreign_case(family, 0, 300)
    with tmlc.load(compiled(case, tmp_path, "bf16"), threads=1) as engine:
        ours = append(engine, case.ids.tolist(), [64])
    with torch.no_grad():
        theirs = copy.deepcopy(case.model).bfloat16()(case.ids[None], use_cache=False).logits[0].float().numpy()
    expected = case.logits.numpy()
    assert np.sqrt(np.mean((ours - expected) ** 2)) <= 1.5 * np.sqrt(np.mean((theirs - expected) ** 2))
