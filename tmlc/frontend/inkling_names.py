"""Where Inkling checkpoints keep each parameter: the names of transformers' modules, or those of the original release.

The release joins gate and up of every feed-forward in one tensor (`w13`), row by row in turn.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

from tmlc.frontend.checkpoint import TensorInfo
from tmlc.frontend.model import Stored

_RELEASE = "model.llm."
_MESSAGE_QUERY = re.compile(r"^model\.layers\.(\d+)\.message_input\.query$")
_ATTENTION_QUERY = re.compile(r"^model\.layers\.(\d+)\.attention_input\.query$")

# A parameter's name here → the original release's, first match wins. What no pattern changes keeps its name.
_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^lm_head\.weight$", "model.llm.unembed.weight"),
        (r"^model\.embed_tokens\.weight$", "model.llm.embed.weight"),
        (r"^model\.embed_tokens\.embed_norm\.", "model.llm.embed_norm."),
        (r"^audio_tower\.embed_audio_tokens\.embed_audio_tokens\.", "model.audio.encoder."),
        (r"^audio_tower\.norm\.", "model.audio.final_norm."),
        (r"^vision_tower\.encoder_layers\.(\d+)\.projection\.", r"model.visual.layers.linear_\1."),
        (r"^vision_tower\.encoder_layers\.(\d+)\.layer_norm\.", r"model.visual.layers.norm_\1."),
        (r"^vision_tower\.", "model.visual."),
        (r"^model\.layers\.(\d+)\.self_attn\.q_proj\.", r"model.llm.layers.\1.attn.wq_du."),
        (r"^model\.layers\.(\d+)\.self_attn\.k_proj\.", r"model.llm.layers.\1.attn.wk_dv."),
        (r"^model\.layers\.(\d+)\.self_attn\.v_proj\.", r"model.llm.layers.\1.attn.wv_dv."),
        (r"^model\.layers\.(\d+)\.self_attn\.r_proj\.", r"model.llm.layers.\1.attn.wr_du."),
        (r"^model\.layers\.(\d+)\.self_attn\.o_proj\.", r"model.llm.layers.\1.attn.wo_ud."),
        (r"^model\.layers\.(\d+)\.self_attn\.([kv]_sconv)\.conv1d\.", r"model.llm.layers.\1.attn.\2."),
        (r"^model\.layers\.(\d+)\.self_attn\.", r"model.llm.layers.\1.attn."),
        (r"^model\.layers\.(\d+)\.(attn_sconv|mlp_sconv)\.conv1d\.", r"model.llm.layers.\1.\2."),
        (r"^model\.layers\.(\d+)\.input_layernorm\.", r"model.llm.layers.\1.attn_norm."),
        (r"^model\.layers\.(\d+)\.post_attention_layernorm\.", r"model.llm.layers.\1.mlp_norm."),
        (r"^model\.layers\.(\d+)\.mlp\.gate\.e_score_correction_bias$", r"model.llm.layers.\1.mlp.gate.bias"),
        (r"^model\.layers\.(\d+)\.mlp\.(gate|up)_proj\.", r"model.llm.layers.\1.mlp.w13_dn."),
        (r"^model\.layers\.(\d+)\.mlp\.down_proj\.", r"model.llm.layers.\1.mlp.w2_md."),
        (r"^model\.(.*\.experts)\.gate_up_proj$", r"model.llm.\1.w13_weight"),
        (r"^model\.(.*\.experts)\.down_proj$", r"model.llm.\1.w2_weight"),
        (r"^model\.(.*\.shared_experts)\.(gate|up)_proj$", r"model.llm.\1.shared_w13_weight"),
        (r"^model\.(.*\.shared_experts)\.down_proj$", r"model.llm.\1.shared_w2_weight"),
        (r"^model\.", "model.llm."),
    )
]  # fmt: skip

# The same for Inkling-2.
_NAMES_2 = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^lm_head\.weight$", "model.llm.unembed.weight"),
        (r"^model\.embed_tokens\.weight$", "model.llm.embed.weight"),
        (r"^model\.embed_tokens\.embed_norm\.", "model.llm.embed_norm."),
        (r"^model\.final_input\.query$", "model.llm.attn_res.output_query"),
        (r"^model\.layers\.(\d+)\.mlp_input\.query$", r"model.llm.attn_res.mlp_queries.\1"),
        (r"^model\.(.*)\.self_attn\.q_proj\.", r"model.llm.\1.attn.wq_du."),
        (r"^model\.(.*)\.self_attn\.k_proj\.", r"model.llm.\1.attn.wk_dv."),
        (r"^model\.(.*)\.self_attn\.v_proj\.", r"model.llm.\1.attn.wv_dv."),
        (r"^model\.(.*)\.self_attn\.r_proj\.", r"model.llm.\1.attn.wr_du."),
        (r"^model\.(.*)\.self_attn\.o_proj\.", r"model.llm.\1.attn.wo_ud."),
        (r"^model\.(.*)\.self_attn\.gate_proj\.", r"model.llm.\1.attn.gate_attn."),
        (r"^model\.(.*)\.self_attn\.sink_proj\.", r"model.llm.\1.attn.attn_sink_proj."),
        (r"^model\.(.*)\.self_attn\.([kv]_sconv)\.conv1d\.", r"model.llm.\1.attn.\2."),
        (r"^model\.(.*)\.self_attn\.([kv]_sconv)\.static_weight$", r"model.llm.\1.attn.\2.static_w"),
        (r"^model\.(.*)\.self_attn\.([kv]_sconv)\.weight_proj\.weight$", r"model.llm.\1.attn.\2.weight_proj"),
        (r"^model\.(.*)\.self_attn\.", r"model.llm.\1.attn."),
        (r"^model\.(.*)\.post_attention_convolution\.conv1d\.", r"model.llm.\1.attn_sconv."),
        (r"^model\.(.*)\.post_mlp_convolution\.conv1d\.", r"model.llm.\1.mlp_sconv."),
        (r"^model\.(.*)\.([qkv])_input_layernorm\.", r"model.llm.\1.\2_input_norm."),
        (r"^model\.(.*)\.input_layernorm\.", r"model.llm.\1.attn_norm."),
        (r"^model\.(.*)\.post_attention_layernorm\.", r"model.llm.\1.mlp_norm."),
        (r"^model\.(.*)\.gate\.e_score_correction_bias$", r"model.llm.\1.gate.bias"),
        (r"^model\.(.*\.experts)\.gate_up_proj$", r"model.llm.\1.w13_weight"),
        (r"^model\.(.*\.experts)\.down_proj$", r"model.llm.\1.w2_weight"),
        (r"^model\.(.*)\.q_message_gate\.down_proj\.weight$", r"model.llm.\1.controllers.attn.down_weight"),
        (r"^model\.(.*)\.q_message_gate\.forget_gate_proj\.weight$", r"model.llm.\1.controllers.attn.forget_weight"),
        (r"^model\.(.*)\.q_message_gate\.message_gate_proj\.weight$", r"model.llm.\1.controllers.attn.gain_weight"),
        (r"^model\.(.*)\.(k|v|mlp)_message_gate\.down_proj\.weight$", r"model.llm.\1.controllers.\2.down_weight"),
        (r"^model\.(.*)\.(k|v|mlp)_message_gate\.forget_gate_proj\.weight$",
         r"model.llm.\1.controllers.\2.forget_weight"),
        (r"^model\.(.*)\.(k|v|mlp)_message_gate\.message_gate_proj\.weight$",
         r"model.llm.\1.controllers.\2.gain_weight"),
        (r"^model\.", "model.llm."),
    )
]  # fmt: skip

# The names of Inkling-2's modules in transformers 5.24 and later, where they differ from those of 5.23, which are ours.
_NAMES_2_LATER = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.self_attn\.([qkvo]_proj)\.", r".self_attn.\1.linear."),
        (r"\.self_attn\.([kv])_sconv\.", r".self_attn.\1_proj.sconv."),
        (r"\.self_attn\.gate_proj\.", ".self_attn.o_proj.gate_proj."),
        (r"\.self_attn\.q_l2_clip\.", ".self_attn.q_proj.norm."),
        (r"\.self_attn\.rel_l2_clip\.", ".self_attn.relative_position_bias.norm."),
        (r"\.self_attn\.r_proj\.", ".self_attn.relative_position_bias.linear."),
        (r"\.self_attn\.rel_logits_proj\.", ".self_attn.relative_position_bias."),
    )
]  # fmt: skip
_LANGUAGE = "model.language_model."
_LATER = ".self_attn.q_proj.linear."


def is_release(tensors: Iterable[str]) -> bool:
    """Whether a checkpoint has the original release's names."""
    return any(name.startswith(_RELEASE) for name in tensors)


def module_place(name: str, shape: tuple[int, ...]) -> Stored:
    """Where `InklingForConditionalGeneration.state_dict()` keeps a parameter."""
    if name.startswith("model."):
        return Stored(f"model.language_model.{name.removeprefix('model.')}", shape)
    return Stored(name if name.startswith("lm_head.") else f"model.{name}", shape)


def norm_place(stored: Stored, tensors: Container[str]) -> Stored:
    """Where the norm of the embedded tokens is: transformers 5.17 keeps it beside the table, later ones in it."""
    old = stored.tensor.replace("embed_tokens.embed_norm.", "embed_norm.")
    return replace(stored, tensor=old) if stored.tensor not in tensors and old in tensors else stored


def release_place(name: str, shape: tuple[int, ...]) -> Stored:
    """Where the original release keeps a parameter: gate and up of a feed-forward share a tensor, row by row."""
    return _interleaved(name, _renamed(_NAMES, name), shape)


def text2_place(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo], heads: int, vocabulary: int
) -> Stored:
    """Where `Inkling2ForCausalLM` keeps a parameter: by the release's names, or those of its modules.

    Args:
        tensors: of the checkpoint; their names tell which.
        heads: of the scales of L2 clips, which are stored a row a head.
        vocabulary: with its padding, which the release's head has, and that of modules before 5.24.
    """
    tensor = name
    if is_release(tensors):
        query = _ATTENTION_QUERY.match(name)  # the first layer has none, so the release counts from the second
        tensor = f"model.llm.attn_res.attn_queries.{int(query[1]) - 1}" if query else _renamed(_NAMES_2, name)
    elif any(_LATER in other for other in tensors):
        tensor = _beside_vision(_renamed(_NAMES_2_LATER, name), tensors)
    if name == "lm_head.weight" and tensor in tensors and tensors[tensor].shape == (vocabulary, shape[1]) != shape:
        return Stored(tensor, (vocabulary, shape[1]), (("slice", {"axis": 0, "start": 0, "stop": shape[0]}),))
    if name.endswith("_l2_clip.scale"):
        return Stored(tensor, (heads, shape[1] // heads), (("reshape", {"shape": list(shape)}),))
    return _interleaved(name, tensor, shape)


def _beside_vision(tensor: str, tensors: Iterable[str]) -> str:
    """The name that a tensor of the text model has where a vision tower stands beside it."""
    if tensor.startswith("model.") and any(name.startswith(_LANGUAGE) for name in tensors):
        return _LANGUAGE + tensor.removeprefix("model.")
    return tensor


def message_place(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo], first: int, layers: int
) -> Stored | None:
    """Where the queries of a looped layer's messages are, for (queries, experts, keys, values); None for another
    parameter. All layers of the loop have theirs together.

    Args:
        first, layers: of the loop.
    """
    found = _MESSAGE_QUERY.match(name)
    if not found:
        return None
    layer, size = int(found[1]) - first, shape[1]
    pair = (("slice", {"axis": 0, "start": 2 * layer, "stop": 2 * layer + 2}),)
    ours, keys = "model.llm.middle_cycle_cross_pass_queries", "model.llm.middle_cycle_cross_pass_kv_queries"
    if ours in tensors:
        return Stored(ours, (2 * layers, size), pair, (Stored(keys, (2 * layers, size), pair),))
    # transformers' module has them as (queries, keys, values, experts).
    rows = [
        (("reshape", {"shape": [4 * layers, size]}), ("slice", {"axis": 0, "start": start, "stop": stop}))
        for start, stop in ((4 * layer + at, 4 * layer + to) for at, to in ((0, 1), (3, 4), (1, 3)))
    ]
    whole = _beside_vision("model.message_input.query", tensors)
    first_row, *more = (Stored(whole, (layers, 4, size), steps) for steps in rows)
    return replace(first_row, more=tuple(more))


def _renamed(names: list[tuple[re.Pattern[str], str]], name: str) -> str:
    return next((pattern.sub(new, name) for pattern, new in names if pattern.search(name)), name)


def _interleaved(name: str, tensor: str, shape: tuple[int, ...]) -> Stored:
    """A tensor as it is, or gate and up taken out of the one that holds their rows in turn."""
    if tensor.endswith("experts.w13_weight"):
        experts, rows, size = shape
        return Stored(tensor, shape, (
            ("reshape", {"shape": [experts, rows // 2, 2, size]}),
            ("transpose", {"axes": [0, 2, 1, 3]}),
            ("reshape", {"shape": list(shape)}),
        ))  # fmt: skip
    if "w13" in tensor:
        *before, rows, size = shape
        axis, half = len(before) + 1, int("up_proj" in name)
        return Stored(tensor, (*before, 2 * rows, size), (
            ("reshape", {"shape": [*before, rows, 2, size]}),
            ("slice", {"axis": axis, "start": half, "stop": half + 1}),
            ("reshape", {"shape": list(shape)}),
        ))  # fmt: skip
    return Stored(tensor, shape)
