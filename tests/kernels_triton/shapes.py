"""Calls with the shapes of nano and of tml-small-276b: one of each op and size that their ticks make, and what other
models add. `calls` yields them for a bucket and an architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Operand
from tmlc.kernels.triton.registry import Call


@dataclass(frozen=True)
class Model:
    """Sizes of one model; `forms` are the dtypes that its weights are compiled in."""

    d: int
    heads: int
    groups: int
    head: int
    ranks: int
    extent: int
    window: int
    context: int
    dense: int
    experts: int
    shared: int
    top_k: int
    f: int
    vocabulary: int
    flow: int
    vocoder: int
    patch: int
    height: int
    folds: tuple[int, ...]
    forms: tuple[str, ...]
    caches: tuple[str, ...]


NANO = Model(192, 6, 2, 32, 8, 256, 64, 1024, 512, 16, 1, 4, 64, 320, 192, 192, 16, 64, (1, 4, 2, 4),
             ("f32", "bf16", "i8g32", "i4g32", "i4g64", "f8g128"), ("f32", "bf16", "u8"))  # fmt: skip
LARGE = Model(4096, 32, 8, 128, 16, 1024, 512, 65536, 16384, 256, 2, 6, 2048, 201024, 2048, 768, 40, 240,
              (1, 5, 1, 2, 1, 4, 2, 1), ("bf16", "i8g32", "i4g32", "i4g64", "f8g128"), ("bf16", "u8"))  # fmt: skip
MODELS = {"nano": NANO, "tml-small-276b": LARGE}

#: Routers of Qwen3-30B-A3B, DeepSeek-V3 and GPT-OSS-120B: inputs, experts, biases, and how they choose.
FOREIGN_ROUTERS: tuple[tuple[int, int, tuple[str, ...], dict[str, Any]], ...] = (
    (2048, 128, (), dict(scores=0, top_k=8, normalise=True, groups=1, top_groups=1, scale=1.0, n_shared=0)),
    (7168, 256, ("bias",), dict(scores=1, top_k=8, normalise=True, groups=8, top_groups=4, scale=2.5, n_shared=1)),
    (2880, 128, ("logit_bias",), dict(scores=2, top_k=4, normalise=False, groups=1, top_groups=1, scale=1.0,
                                   n_shared=0)),
)

#: Experts behind the first and the last of them: hidden columns, biases, and what is between.
FOREIGN_EXPERTS: tuple[tuple[int, int, tuple[str, ...], dict[str, Any]], ...] = (
    (0, 768, (), dict(alpha=0.0, limit=0.0)),
    (2, 2880, ("gate_up_bias", "down_bias"), dict(alpha=1.702, limit=7.0)),
)


def x(cols: int, dtype: str = "f32", rows: tuple[int, int] = (1, 0), offset: int = 0) -> Operand:
    return Operand("arena", dtype, rows, cols, cols, offset)


def w(*shape: int, dtype: str = "f32") -> Operand:
    lead = 1
    for size in shape[:-1]:
        lead *= size
    return Operand("weight", dtype, (0, lead), shape[-1], shape[-1], name="w", shape=shape)


def state(rows: int, cols: int, dtype: str = "f32") -> Operand:
    return Operand("state", dtype, (0, rows), cols, cols, 64)


def calls(model: Model, bucket: Bucket, sm: int) -> Iterator[Call]:
    """Every op with the model's sizes."""

    def call(op: str, args: dict[str, Operand | None], *outputs: Operand, **attrs: Any) -> Call:
        return Call(op, args, attrs, outputs, bucket, sm)

    m, d = model, model.d
    q, kv = m.heads * m.head, m.groups * m.head
    qkvr = q + 2 * kv + m.heads * m.ranks
    yield call("embedding", {"ids": x(1, "i32"), "table": w(m.vocabulary, d, dtype="bf16")}, x(d))
    yield call("bag_embedding", {"levels": x(80, "i32"), "table": w(1280, d, dtype="bf16")}, x(d), per_bin=16)
    yield call("rms_norm", {"x": x(d), "weight": w(1, d)}, x(d), eps=1e-6)
    yield call("rms_norm", {"x": x(q), "weight": w(1, m.head)}, x(q), eps=1e-6)
    yield call("add_rms_norm", {"x": x(d), "residual": x(d), "weight": w(1, d)}, x(d), x(d), eps=1e-6)
    heads = {"a": x(q), "a_weight": w(1, m.head), "b": x(kv), "b_weight": w(1, m.head)}
    yield call("rms_norm_pair", heads, x(q), x(kv), eps=1e-6)
    yield call("rms_norm_steps", {"x": x(m.flow), "weight": w(1, m.flow), "a": x(m.flow), "b": x(m.flow)}, x(m.flow),
               steps="modulate:vab", numbers=[], eps=1e-6)  # fmt: skip
    yield call("rms_norm_steps", {"x": x(d), "weight": w(1, d)}, x(d), steps="gelu:v", numbers=[], eps=1e-6)
    yield call("element_steps", {"x": x(d), "a": x(d)}, x(d), steps="silu:v mul:va", numbers=[])
    yield call("silu_add_rows", {"x": x(m.flow), "rows": w(33, m.flow)}, x(4 * m.flow), index=[0, 8, 16, 24])
    for form in m.forms:
        for text, numbers, letters in (("silu:v", [], ""), ("gelu:v", [], ""), ("mul:av add:bv", [], "ab"),
                                       ("add_scaled:va add_scaled:av", [-1.0, 0.25], "a")):  # fmt: skip
            given = {letter: x(m.flow) for letter in letters}
            yield call("linear_steps", {"x": x(m.flow), "weight": w(m.flow, m.flow, dtype=form), "bias": w(1, m.flow)}
                       | given, x(m.flow), steps=text, numbers=numbers)  # fmt: skip
        normed = {"x": x(d), "norm": w(1, d)}
        given = {"weight": w(qkvr, d, dtype=form), "bias": None}
        both = {"weight": w(2 * m.dense, d, dtype=form), "bias": None}
        yield call("linear_swiglu", {"x": x(d)} | both, x(m.dense))
        if form != "i4g32":
            yield call("norm_linear_swiglu", normed | both, x(m.dense), eps=1e-6)
            yield call("norm_linear", normed | given, x(qkvr), eps=1e-6)
            yield call("norm_linear_steps", normed | given, x(qkvr), steps="silu:v", numbers=[], eps=1e-6)
            passed = {"scale": None, "taps": w(2 * kv, 4), "tail": state(3, 2 * kv), "addend": None}
            yield call("norm_linear_conv_state", normed | given | passed, x(qkvr), start=q, residual=True, level=1.0,
                       eps=1e-6)  # fmt: skip
            flow = {name: x(m.flow) for name in ("x", "gain", "shift")} | {"norm": w(1, m.flow)}
            flow |= {"weight": w(m.flow, m.flow, dtype=form), "bias": w(1, m.flow)}
            yield call("modulated_linear", flow, x(m.flow), eps=1e-6)
            yield call("modulated_linear_steps", flow, x(m.flow), steps="silu:v", numbers=[], eps=1e-6)
        for rows, k in ((qkvr, d), (d, q), (2 * m.dense, d), (d, m.dense), (m.flow, m.flow), (d, 80)):
            yield call("linear", {"x": x(k), "weight": w(rows, k, dtype=form), "bias": None}, x(rows))
        projected = {"x": x(q), "weight": w(d, q, dtype=form), "bias": None, "scale": None, "addend": x(d)}
        yield call("linear_conv_state", projected | {"taps": w(d, 4), "tail": state(3, d)}, x(d), start=0,
                   residual=True, level=1.0)  # fmt: skip
        block = {"x": x(2 * m.vocoder), "weight": w(m.vocoder, 2 * m.vocoder, dtype=form), "bias": w(1, m.vocoder)}
        block |= {"scale": None, "addend": x(m.vocoder), "taps": w(m.vocoder, 7), "tail": state(6, m.vocoder)}
        yield call("linear_and_conv_state", block, x(m.vocoder), x(m.vocoder), residual=False)
        yield call(
            "linear_add",
            {"x": x(q), "weight": w(d, q, dtype=form), "bias": None, "scale": w(1, 1), "addend": x(d)},
            x(d),
        )
        head = {"x": x(d), "weight": w(m.vocabulary, d, dtype=form), "bias": None}
        yield call("head_logits", head, x(m.vocabulary - 2), alpha=0.5, cap=0.0, entries=m.vocabulary - 2)
        yield call(
            "head_sample",
            head | {"key": x(3, "i64"), "temperature": x(1)},
            x(1, "i32"), alpha=0.5, cap=30.0, entries=m.vocabulary - 2,
        )
        moe = {
            "x": x(d), "weights": x(m.top_k + m.shared), "experts": x(m.top_k + m.shared, "i32"),
            "gate_up": w(m.experts + m.shared, 2 * m.f, d, dtype=form),
            "down": w(m.experts + m.shared, d, m.f, dtype=form),
        }  # fmt: skip
        for grouped_from in (1, 1 << 20):
            plain = {"alpha": 0.0, "limit": 0.0, "gate_cap": 0.0, "up_cap": 0.0, "grouped_from": grouped_from}
            yield call("moe", moe, x(d), **plain)
            yield call("moe_add", moe | {"addend": x(d)}, x(d), **plain)
    for cache in m.caches:
        width = kv if cache != "u8" else m.groups * (m.head + 4)
        for window, capacity, sinks in (
            (m.window, m.window + 64 + 16, 0),
            (0, m.context, 0),
            (m.context - 96, m.context, 16),
        ):
            for extra in ({}, {"sink_logits": w(1, m.heads)}):
                given = {
                    "q": x(q), "k": x(kv), "v": x(kv), "position": state(1, 1, "i64"),
                    "k_cache": state(capacity, width, cache), "v_cache": state(capacity, width, cache),
                    "rel": x(m.heads * m.ranks) if not extra else None,
                    "rel_table": w(m.ranks, m.extent) if not extra else None, **extra,
                }  # fmt: skip
                attrs = {
                    "num_heads": m.heads, "num_kv_heads": m.groups, "scale": 0.1, "window": window, "sinks": sinks,
                    "log_floor": 512.0, "log_alpha": 0.1, "softcap": 30.0 if extra else 0.0,
                }  # fmt: skip
                yield call("attention_state", given, x(q), **attrs)
                if not extra:
                    norms = {"q_norm": w(1, m.head), "k_norm": w(1, m.head)}
                    yield call("norm_attention_state", given | norms, x(q), eps=1e-6, **attrs)
                    for heads in ({}, norms):
                        turned = {name: one for name, one in given.items() if name not in ("rel", "rel_table")} | heads
                        yield call("rope_attention_state", turned | {"table": x(m.head)}, x(q), eps=1e-6, offset=0,
                                   interleaved=False, **attrs)  # fmt: skip
                for form in m.forms:
                    if not extra and cache == m.caches[0]:
                        after = {"weight": w(d, q, dtype=form), "taps": w(d, 4), "tail": state(3, d), "addend": x(d)}
                        yield call("attention_linear_state", given | after, x(d), eps=0.0, offset=0, interleaved=False,
                                   start=0, residual=True, level=1.0, **attrs)  # fmt: skip
    yield call(
        "rope_state", {"x": x(q), "position": state(1, 1, "i64"), "inv_freq": w(1, m.head // 2)}, x(q),
        num_heads=m.heads, offset=0, interleaved=False, scaling=1.0,
    )  # fmt: skip
    cache, heads = m.caches[0], 2 * m.groups  # latent attention: three quarters of a head are of its own
    own, width = m.head, m.head + m.head // 2
    latent = {
        "q": x(heads * width), "k": x(heads * own), "v": x(heads * m.head), "shared": x(m.head // 2),
        "table": x(m.head // 2), "position": state(1, 1, "i64"), "k_cache": state(m.context, heads * width, cache),
        "v_cache": state(m.context, heads * m.head, cache),
    }  # fmt: skip
    if cache != "u8":
        yield call(
            "rope_attention_state", latent, x(heads * m.head), eps=0.0, offset=own, interleaved=True, num_heads=heads,
            num_kv_heads=heads, scale=0.1, window=0, sinks=0, log_floor=0.0, log_alpha=0.0, softcap=0.0,
        )  # fmt: skip
    freq = {"x": x(d), "position": state(1, 1, "i64"), "inv_freq": w(1, m.head // 2)}
    yield call("rope_table_state", freq, x(m.head), scaling=1.0)
    yield call("advance", {"position": state(1, 1, "i64"), "x": x(d)}, limit=0)
    for c in (d, kv):
        yield call("short_conv_state", {"x": x(c), "weight": w(c, 4), "tail": state(3, c)}, x(c), residual=True)
    yield call("short_conv_state", {"x": x(m.vocoder), "weight": w(m.vocoder, 7), "tail": state(6, m.vocoder)},
               x(m.vocoder), residual=False)  # fmt: skip
    yield call("dynamic_conv_state", {"x": x(d), "weight": w(4, d), "taps": x(m.heads * 4), "tail": state(3, d)}, x(d),
               residual=True)  # fmt: skip
    routes = {"bias": w(1, m.experts), "scale": w(1, 1)}
    out = (x(m.top_k + m.shared), x(m.top_k + m.shared, "i32"))
    numbers = {"top_k": m.top_k, "n_shared": m.shared, "route_scale": 8.0}
    yield call("router", {"x": x(d), "weight": w(m.experts + m.shared, d), **routes}, *out, **numbers)
    yield call("norm_router", {"x": x(d), "norm": w(1, d), "weight": w(m.experts + m.shared, d), **routes}, *out, x(d),
               eps=1e-6, **numbers)  # fmt: skip
    for f in (m.f, 2 * m.f):
        given = {
            "x": x(d), "norm": w(1, d), "weight": w(m.experts + m.shared, d), **routes, "taps": w(d, 4),
            "tail": state(3, d), "addend": x(d), "gate_up": w(m.experts + m.shared, 2 * f, d, dtype="bf16"),
            "down": w(m.experts + m.shared, d, f, dtype="bf16"),
        }  # fmt: skip
        yield call(
            "norm_moe_conv_state", given, x(d), eps=1e-6, residual=True, level=1.0, alpha=0.0, limit=0.0, gate_cap=0.0,
            up_cap=0.0, grouped_from=9, **numbers,
        )  # fmt: skip
    yield call("sink_router", {"logits": x(m.experts + m.shared), **routes}, *out, **numbers)
    for scores, groups in ((0, 1), (1, 4), (2, 1)):
        yield call(
            "topk_router", {"logits": x(m.experts), "bias": w(1, m.experts)}, x(m.top_k), x(m.top_k, "i32"),
            scores=scores, top_k=m.top_k, normalise=True, groups=groups, top_groups=min(groups, 2), scale=2.5,
        )  # fmt: skip
    given = {"weights": x(m.top_k), "experts": x(m.top_k, "i32")}
    out = (x(m.top_k + m.shared), x(m.top_k + m.shared, "i32"))
    yield call("append_experts", given, *out, first=m.experts, count=m.shared)
    for k, count, biases, attrs in FOREIGN_ROUTERS:
        given = {"x": x(k), "norm": w(1, k), "weight": w(count, k), **{name: w(1, count) for name in biases}}
        choices = attrs["top_k"] + attrs["n_shared"]
        results = (x(choices), x(choices, "i32"), x(k))
        yield call("norm_topk_router", given, *results, eps=1e-6, **attrs)
    for router, f, more, activation in FOREIGN_EXPERTS:
        k, count, biases, attrs = FOREIGN_ROUTERS[router]
        # The same calls for each model, so in all forms once.
        for form in ("bf16",) if m is NANO else ("bf16", "i8g32", "i4g32", "i4g64", "f8g128"):
            given = {"x": x(k), "norm": w(1, k), "weight": w(count, k), **{name: w(1, count) for name in biases}}
            given |= {"gate_up": w(count, 2 * f, k, dtype=form), "down": w(count, k, f, dtype=form), "addend": x(k)}
            given |= {name: w(count, 2 * f if name == "gate_up_bias" else k) for name in more}
            yield call("norm_topk_moe", given, x(k), eps=1e-6, gate_cap=0.0, up_cap=0.0, grouped_from=9, **attrs,
                       **activation)  # fmt: skip
    for op, names, attrs in (
        ("add", "ab", {}), ("mul", "ab", {}), ("add_scaled", "ab", {"alpha": 0.25}), ("scale", "x", {"alpha": 0.5}),
        ("clamp", "x", {"lo": -1.0, "hi": 1.0}), ("silu", "x", {}), ("gelu", "x", {}), ("sigmoid", "x", {}),
        ("softcap", "x", {"cap": 30.0}), ("swiglu", ("gate", "up"), {}), ("modulate", ("x", "scale", "shift"), {}),
    ):  # fmt: skip
        yield call(op, {name: x(m.dense) for name in names}, x(m.dense), **attrs)
    yield call("scale_by", {"x": x(d), "s": w(1, 1)}, x(d))
    yield call("add_row", {"x": x(m.flow), "rows": w(33, m.flow)}, x(m.flow), index=7)
    for cols in (d, 320, 800):  # of what passes from one method of a chain to the next
        yield call("take_rows", {"source": x(cols), "index": x(1, "i32")}, x(cols))
    yield call("concat_columns", {"a": x(d), "b": x(kv)}, x(d + kv))
    yield call("head_columns", {"x": x(q)}, x(q // 2), num_heads=m.heads, start=0, stop=m.head // 2)
    yield call("concat_heads", {"a": x(q), "b": x(m.head)}, x(2 * q), num_heads=m.heads, shared=2)
    yield call("l2_clip", {"x": x(q), "scale": w(1, q)}, x(q), num_heads=m.heads, threshold=4.0)
    yield call("mix_blocks", {"x": x(8 * d), "queries": w(2, d)}, x(2 * d), eps=1e-6)
    yield call(
        "dmel_state", {"pcm": x(800), "window": w(1, 1600), "filters": w(80, 801), "tail": state(1, 800)}, x(80, "i32"),
        lo=-7.0, hi=2.0, levels=16,
    )  # fmt: skip
    leaf = m.folds[0] * m.folds[1] ** 2 * 3
    patches = 2 * m.height * m.height * 3 // leaf
    yield call(
        "patchify", {"video": Operand("input", "u8", (2 * m.height, 0), m.height * 3, m.height * 3, name="0")},
        x(leaf, rows=(patches, 0)), frames=2, height=m.height, patch=m.patch, folds=list(m.folds),
        mean=[0.48, 0.45, 0.4], std=[0.26, 0.27, 0.28],
    )  # fmt: skip
    yield call("philox_normal", {"key": x(3, "i64")}, x(320), size=320)
    yield call("sample", {"logits": x(m.vocabulary), "key": x(3, "i64"), "temperature": x(1)}, x(1, "i32"))
    for rows in ((1, 0), (4, 0)):
        frames = {"frames": x(800, rows=rows), "window": w(1, 800), "overlap": state(1, 600)}
        yield call("overlap_add_state", frames, x(200, rows=rows), hop=200)
