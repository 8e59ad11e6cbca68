"""Attention over linear and ring caches of every dtype: against float64, cut anywhere, across the ring's seam."""

from __future__ import annotations

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, draw, weight

from tmlc.ir.ops.kv import int8_columns

H, G, D, DV, RANKS = 4, 2, 10, 6, 3
TOLERANCE = {"f32": 1e-5, "bf16": 2e-4, "u8": 8e-3}


def session(seed: int, n: int, position: int, dtype: str, capacity: int, sinks_by_row: bool = False) -> Session:
    widths = (G * int8_columns(D), G * int8_columns(DV)) if dtype == "u8" else (G * D, G * DV)
    caches = []
    for i, width in enumerate(widths):
        values = draw(seed + 70 + i, capacity, width)
        if dtype == "bf16":
            caches.append((values.view(np.uint32) >> 16).astype(np.uint16))
        elif dtype == "u8":
            heads = np.zeros((capacity, G, width // G), np.uint8)
            heads[..., :-4] = np.random.default_rng(seed).integers(1, 256, heads[..., :-4].shape)
            heads[..., -4:] = np.full((capacity, G, 1), 0.01, np.float32).view(np.uint8)
            caches.append(heads.reshape(capacity, width))
        else:
            caches.append(values)
    inputs = {"q": draw(seed, n, H * D), "k": draw(seed + 1, n, G * D), "v": draw(seed + 2, n, G * DV)}
    inputs["rel"] = draw(seed + 3, n, H * RANKS)
    if sinks_by_row:
        inputs["sink_logits"] = draw(seed + 4, n, H)
    states = {"position": np.array([[position]], np.int64), "k_cache": caches[0], "v_cache": caches[1]}
    return Session(inputs, states, n)


def attributes(**changed: float) -> dict:
    return (
        dict(num_heads=H, num_kv_heads=G, scale=0.3, window=0, sinks=0, log_floor=0.0, log_alpha=0.0, softcap=0.0)
        | changed
    )


WEIGHTS = {"rel_table": weight(draw(50, RANKS, 30))}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "u8"])
@pytest.mark.parametrize(("window", "sinks", "capacity"), [(0, 0, 320), (20, 0, 48), (20, 16, 64)])
def test_attention(machine, dtype, window, sinks, capacity):
    """Positions before, at and behind a seam of the ring, and across a split of the linear cache."""
    sessions = [session(1, 9, 0, dtype, capacity), session(20, 1, 249 if not window else 47, dtype, capacity),
                session(40, 13, 250 if not window else 1000, dtype, capacity)]  # fmt: skip
    attrs = attributes(window=window, sinks=sinks, log_floor=7.0, log_alpha=0.1)
    agree(
        machine, "attention_state", sessions, attrs, [Shape("f32", H * DV)], TOLERANCE[dtype], WEIGHTS, cuts=(1, 6, 8),
        compared=["k_cache", "v_cache"], batch=4,
    )  # fmt: skip


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_sink_logits_and_soft_caps(machine, softcap, by_row):
    sessions = [session(1, 5, 3, "bf16", 64, by_row), session(9, 2, 40, "bf16", 64, by_row)]
    weights = WEIGHTS if by_row else WEIGHTS | {"sink_logits": weight(draw(60, 1, H))}
    agree(
        machine, "attention_state", sessions, attributes(softcap=softcap), [Shape("f32", H * DV)], 2e-4, weights,
        cuts=(2,),
    )  # fmt: skip


def test_splits_as_programs_and_in_a_program_give_the_same_bits(machine, monkeypatch):
    """`agree` compares a batch (one program works through the splits) with sessions alone (a program each)."""
    from tmlc.kernels.triton import attention

    monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", 5)
    sessions = [session(1, 5, 600, "bf16", 640), session(9, 2, 100, "bf16", 640), session(30, 5, 254, "bf16", 640)]
    attrs = attributes(window=0)
    agree(machine, "attention_state", sessions, attrs, [Shape("f32", H * DV)], 2e-4, WEIGHTS, cuts=(2,))


def test_large_scores_overflow_nothing(machine):
    sessions = [session(1, 5, 3, "f32", 64)]
    sessions[0].inputs["q"] *= 300
    agree(machine, "attention_state", sessions, attributes(), [Shape("f32", H * DV)], 1e-4, WEIGHTS, cuts=(2,))
