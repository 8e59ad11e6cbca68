"""The backbone over a batch of whole sequences, differentiable and fast: what training runs in place of the ops.

The canonical ops take one sequence and say what the model means; their references gather a bias for every pair of
positions and sort out experts with boolean masks. Here the same parameters run over x[batch, length, d]: attention in
blocks that skip what the mask hides, experts one after another over the rows that chose them. A test holds both forms
to each other. Sequences are padded at their end, which causality keeps from the positions before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..backbone import Attention, Backbone, DecoderLayer, DenseMLP, MoE
from ..layers import RMSNorm, ShortConv
from ..stems import AudioTower

GLOBAL_BLOCK = 128
"""Queries of a global layer that are taken at once: a block sees no key after its last query."""


@dataclass
class Load:
    """How many positions chose each expert, int64[experts] a layer, in the order of the sparse layers."""

    counts: list[Tensor] = field(default_factory=list)


def hidden_states(
    model: Backbone, x: Tensor, load: Load | None = None, real: Tensor | None = None,
    outputs: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """x[batch, length, d] (embedded positions) → hidden states of the same shape, after the final norm.

    Args:
        load: collects the experts' loads.
        real: bool[batch, length], positions that are not padding; experts then run for these only.
        outputs: collects what each layer gives, of the shape of x.
    """
    rows = None if real is None else torch.where(real.reshape(-1))[0]
    for layer in model.layers:
        x = _layer(cast(DecoderLayer, layer), x, load, rows)
        if outputs is not None:
            outputs.append(x)
    return rms_norm(model.norm, x)


def embed_levels(tower: AudioTower, levels: Tensor) -> Tensor:
    """levels int64[n, bins] → positions [n, d]: `AudioTower.embed` without a [n, bins, d] intermediate."""
    table = tower.get_parameter("embed_audio_tokens.embed_audio_tokens.weight")
    bins = torch.arange(levels.shape[1], device=levels.device) * tower.config.mel_vocab_size
    return rms_norm(tower.norm, nnf.embedding_bag(levels + bins, table, mode="sum"))


def rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return nnf.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.eps)


def _head_norm(norm: RMSNorm, x: Tensor, heads: int) -> Tensor:
    return rms_norm(norm, x.unflatten(-1, (heads, -1)))


def _layer(layer: DecoderLayer, x: Tensor, load: Load | None, rows: Tensor | None) -> Tensor:
    x = x + short_conv(layer.attn_sconv, attention(layer.self_attn, rms_norm(layer.input_layernorm, x)))
    inner = rms_norm(layer.post_attention_layernorm, x)
    if isinstance(layer.mlp, DenseMLP):
        mlp = layer.mlp
        out = mlp.down_proj.weight
        mixed = nnf.linear(nnf.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner), out) * mlp.global_scale
    else:
        mixed = experts(layer.mlp, inner, load, rows)
    return x + short_conv(layer.mlp_sconv, mixed)


def short_conv(conv: ShortConv, x: Tensor) -> Tensor:
    """x[batch, length, c] → the causal depthwise convolution over the length (plus x, when the layer says so)."""
    taps = conv.conv1d.weight[:, 0]  # [c, kernel]
    last = taps.shape[1] - 1
    padded = nnf.pad(x, (0, 0, last, 0))
    length = x.shape[1]
    out = x * (taps[:, last] + 1.0) if conv.residual else x * taps[:, last]
    for j in range(last):
        out = torch.addcmul(out, padded[:, j : j + length], taps[:, j])
    return out


def attention(layer: Attention, x: Tensor) -> Tensor:
    """x[batch, length, d] → attention's output, before the short convolution."""
    heads, kv = layer.num_heads, layer.num_kv_heads
    q = _head_norm(layer.q_norm, layer.q_proj(x), heads)
    k = _head_norm(layer.k_norm, short_conv(layer.k_sconv, layer.k_proj(x)), kv)
    v = short_conv(layer.v_sconv, layer.v_proj(x)).unflatten(-1, (kv, -1))
    rel = layer.r_proj(x).unflatten(-1, (heads, -1))
    q = q * layer_scale(layer, x)
    rel = rel * tau(layer, x)
    # [batch, kv, group, length, ·]: queries of a group share their keys.
    q, rel = (t.unflatten(2, (kv, heads // kv)).permute(0, 2, 3, 1, 4) for t in (q, rel))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    # Columns by falling distance, so that a shift by one a row (`_skew`) puts them over their keys.
    table = layer.rel_logits_proj.proj.flip(1)
    mix = _sliding if layer.window else _global
    mixed = mix(q, k, v, rel, table)
    return layer.o_proj(mixed.permute(0, 3, 1, 2, 4).flatten(2))


def tau(layer: Attention, x: Tensor) -> Tensor | float:
    """The log scaling of far positions, [length, 1, 1]; 1 for a layer without it."""
    if not layer.log_floor:
        return 1.0
    positions = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    return (1 + layer.log_alpha * torch.log((positions / layer.log_floor).clamp(min=1.0)))[:, None, None]


def layer_scale(layer: Attention, x: Tensor) -> Tensor | float:
    return tau(layer, x) / layer.head_dim


def _skew(rows: Tensor, width: int) -> Tensor:
    """[…, n, width + 1] → […, n, width]: row r moves r columns to the right, past the end into the next row."""
    n = rows.shape[-2]
    return rows.flatten(-2)[..., : n * width].unflatten(-1, (n, width))


def _mixed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q·k + bias)·v; q [..., group, n, d], k, v [..., m, d], bias [..., group, n, ≤ m] over the last keys."""
    group, n = q.shape[-3], q.shape[-2]
    scores = (q.flatten(-3, -2) @ k.transpose(-1, -2)).unflatten(-2, (group, n))
    missing = scores.shape[-1] - bias.shape[-1]
    scores = scores + (nnf.pad(bias, (missing, 0)) if missing else bias)
    return (torch.softmax(scores, -1).flatten(-3, -2) @ v).unflatten(-2, (group, n))


def _sliding(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, table: Tensor) -> Tensor:
    """Blocks as long as the window; a block's queries see it and the block before."""
    window, length = table.shape[1], q.shape[-2]
    short = -length % window
    q, rel = (nnf.pad(t, (0, 0, 0, short)) for t in (q, rel))
    k, v = (nnf.pad(t, (0, 0, window, short)) for t in (k, v))
    blocks = (length + short) // window
    # [batch, kv, blocks, group, window, ·] over [batch, kv, blocks, 2·window, ·]
    q, rel = (t.unflatten(3, (blocks, window)).transpose(2, 3) for t in (q, rel))
    k, v = (t.unfold(2, 2 * window, window).transpose(-1, -2) for t in (k, v))
    # All that a row of the bias does not cover is out of the window.
    bias = _skew(nnf.pad(rel @ table, (1, window), value=-math.inf), 2 * window)
    before = torch.zeros(blocks, 1, 1, 2 * window, device=q.device, dtype=q.dtype)
    before[0, ..., :window] = -math.inf  # no block before the first
    mixed = _mixed(q, k, v, bias + before)
    return mixed.transpose(2, 3).flatten(3, 4)[..., :length, :]


def _global(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, table: Tensor) -> Tensor:
    """Block by block over all keys so far; the bias is a band of the table's extent at their end."""
    block, extent, length = GLOBAL_BLOCK, table.shape[1], q.shape[-2]
    out = []
    for start in range(0, length, block):
        n = min(block, length - start)
        here = slice(start, start + n)
        reach = min(extent, start + block)  # columns that lie before the first key are never looked at
        bias = torch.matmul(rel[..., here, :], table[:, extent - reach :])
        zero = bias.new_zeros(1).expand(*bias.shape[:-1], 1)
        band = torch.cat([zero, bias, _after(n, block, bias).expand(*bias.shape[:-1], block)], -1)
        keys = start + n
        band = _skew(band, block + reach)[..., max(0, reach - start) : reach + n]
        out.append(_mixed(q[..., here, :], k[:, :, :keys], v[:, :, :keys], band))
    return torch.cat(out, -2)


def _after(n: int, block: int, like: Tensor) -> Tensor:
    """What stands behind a row's band, [n, block]: keys after the query (-inf), then, where the skew carries the rest
    into the next row, keys before that row's band (0)."""
    row = torch.arange(n, device=like.device)[:, None]
    column = torch.arange(block, device=like.device)
    return torch.where(column + row < block - 1, -math.inf, 0.0).to(like.dtype)


def experts(layer: MoE, x: Tensor, load: Load | None, rows: Tensor | None) -> Tensor:
    """x[batch, length, d] → the mixture: the chosen experts, each over the rows that chose it, and the shared ones."""
    flat = x.flatten(0, 1)
    picked = flat if rows is None else flat[rows]
    weights, chosen = layer.gate(picked)
    k, total = layer.top_k, layer.experts.gate_up_proj.shape[0]
    chosen = chosen[:, :k].reshape(-1)
    order = torch.argsort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=total)
    if load is not None:
        load.counts.append(counts)
    source = order // k
    pieces = picked[source].split(counts.tolist())
    done = []
    for expert, piece in enumerate(pieces):
        gate, up = nnf.linear(piece, layer.experts.gate_up_proj[expert]).chunk(2, -1)
        done.append(nnf.linear(nnf.silu(gate) * up, layer.experts.down_proj[expert]))
    share = weights[:, :k].reshape(-1)[order, None]
    out = _shared(layer, picked, weights[:, k:]).index_add(0, source, (torch.cat(done) * share).to(x.dtype))
    if rows is not None:
        out = torch.zeros_like(flat).index_copy(0, rows, out)
    return out.view_as(x)


def _shared(layer: MoE, x: Tensor, weights: Tensor) -> Tensor:
    shared, out = layer.shared_experts, torch.zeros_like(x)
    for s in range(weights.shape[1]):
        inner = nnf.silu(nnf.linear(x, shared.gate_proj[s])) * nnf.linear(x, shared.up_proj[s])
        out = out + weights[:, s : s + 1] * nnf.linear(inner, shared.down_proj[s])
    return out
