"""Random small models of Inkling-2, with and without a loop, and what holds an engine to one of them.

Thresholds, caps and windows are drawn small, so that clips, soft caps, rings and the log scaling all act.
"""

import copy
from pathlib import Path

import numpy as np
import torch
import transformers

import tmlc
from tmlc.frontend import open_checkpoint

POSITIONS, GREEDY = 300, 64


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    layers, kv, swa_kv = int(rng.integers(2, 6)), int(rng.integers(1, 4)), int(rng.integers(1, 3))
    experts, vocab = int(rng.integers(1, 8)), int(rng.integers(60, 100))
    return dict(
        vocab_size=vocab, unpadded_vocab_size=pick(vocab, vocab - 7), hidden_size=pick(24, 32, 50),
        num_hidden_layers=layers, num_attention_heads=kv * pick(1, 2), num_key_value_heads=kv, head_dim=pick(8, 10, 80),
        swa_num_attention_heads=swa_kv * pick(1, 3), swa_num_key_value_heads=swa_kv, swa_head_dim=pick(4, 8, 14),
        sliding_window_size=int(rng.integers(3, 40)), d_rel=int(rng.integers(1, 6)),
        rel_extent=int(rng.integers(3, 90)), log_scaling_n_floor=pick(3, 40), log_scaling_alpha=pick(0.1, 0.3),
        layer_types=[("hybrid", "hybrid_sliding")[(seed + layer) % 2] for layer in range(layers)],
        conv_kernel_size=pick(2, 3, 4), rms_norm_eps=pick(1e-6, 1e-3), moe_intermediate_size=int(rng.integers(5, 40)),
        n_routed_experts=experts, num_experts_per_tok=int(rng.integers(1, experts + 1)), route_scale=pick(1.0, 2.5),
        n_layers_per_attn_res_block=int(rng.integers(1, 4)), qk_l2_clip_threshold=pick(1.5, 3.0),
        rel_l2_clip_threshold=pick(0.7, 2.0), mlp_gate_softcap=pick(0.5, 4.0), mlp_up_softcap=pick(0.8, 25.0),
        final_logit_softcapping=pick(1.5, 30.0), eos_token_id=None,
    )  # fmt: skip


def looped(seed: int) -> dict:
    """`draw(seed)`, with layers before, in and after a loop, whose blocks are of one to three layers."""
    settings, rng = draw(seed), np.random.default_rng(1000 + seed)
    block = settings["n_layers_per_attn_res_block"]
    before, inside, after = int(rng.integers(1, 3)), int(rng.integers(1, 3)), int(rng.integers(0, 3))
    layers = (before + inside) * block + after
    return settings | dict(
        num_hidden_layers=layers,
        layer_types=[("hybrid", "hybrid_sliding")[int(rng.integers(2))] for _ in range(layers)],
        loop_layer_index_start=before * block, loop_layer_index_end=(before + inside) * block,
        loop_num_passes=[3, 2, 4, 1][seed % 4], loop_gate_rank=int(rng.integers(2, 9)),
    )  # fmt: skip


def random_model(settings: dict, seed: int) -> transformers.PreTrainedModel:
    """In float32, with logits of unit scale before their soft cap."""
    torch.manual_seed(seed)
    name = "Inkling2Loop" if "loop_num_passes" in settings else "Inkling2"
    config = getattr(transformers, f"{name}TextConfig")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("query"):
                tensor.normal_(0, 1.0)
            elif "static_weight" in name:
                tensor.normal_(0, 0.5)
            elif tensor.ndim >= 2 and not name.endswith(".scale"):
                tensor.normal_(0, 1.0 / tensor.shape[-1] ** 0.5)
            else:
                tensor.uniform_(0.5, 1.5)
        for name, tensor in model.named_buffers():
            if "e_score_correction_bias" in name:
                tensor.uniform_(-0.3, 0.3)
        ids = torch.randint(0, 50, (1, 32))
        logits = torch.atanh(model(ids).logits / config.final_logit_softcapping) * config.final_logit_softcapping
        model.lm_head.weight /= logits.std()
    return model


@torch.no_grad()
def expect(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    return model(torch.tensor(ids)[None], use_cache=False).logits[0].float().numpy()


def compiled(model: transformers.PreTrainedModel, folder: Path, seed: int, stored: str) -> dict[str, int]:
    """Writes `folder`/model.tmlc of the model as `save_pretrained` writes it, in one file or several, with a tensor
    `stored`; the matches of each pass."""
    model.save_pretrained(folder / "checkpoint", **({"max_shard_size": "60KB"} if seed % 2 else {}))
    assert stored in open_checkpoint(folder / "checkpoint")
    report = tmlc.compile(folder / "checkpoint", folder / "model.tmlc", precision="fp32")
    return {record.name: record.matches for record in report.passes}


def rounding(model: transformers.PreTrainedModel, ids: list[int], expected: np.ndarray) -> float:
    """How far logits move where every weight moves by about what float32 rounds away, the most of two draws."""
    found = 0.0
    for seed in range(2):
        moved, noise = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in moved.parameters():
                tensor.mul_(1 + 2.0**-24 * torch.randn(tensor.shape, generator=noise))
        found = max(found, float(np.abs(expect(moved, ids) - expected).max()))
    return found


def hold(package: Path, model: transformers.PreTrainedModel, seed: int, rounded: float = 0.0) -> None:
    """Holds the engine of a package to its model: a whole text, greedy decoding behind it, and random cuts. Logits may
    be 1e-4 apart, or `rounded` times as far as rounding of the weights moves them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50, POSITIONS).tolist()
    expected = expect(model, ids)
    bound = max(1e-4, rounded * rounding(model, ids, expected) if rounded else 0.0)
    assert 0.3 < expected.std() < 3.0, "the bound is meant for logits of unit scale"
    with tmlc.load(package, threads=1) as engine:
        with engine.session() as session:
            whole = session.append(tokens=ids)
            assert whole.shape == expected.shape
            assert np.abs(whole - expected).max() <= bound
            said, logits = [], whole[-1:]
            for _ in range(GREEDY):
                said.append(int(logits[-1].argmax()))
                logits = session.append(tokens=said[-1:])
        with engine.session() as session:
            at, parts = 0, []
            while at < POSITIONS:
                size = int(rng.integers(1, 12))
                parts.append(session.append(tokens=ids[at : at + size]))
                at += size
        assert np.array_equal(np.concatenate(parts), whole), "the cut into appends changed bits"
    choices = expect(model, ids + said)[POSITIONS - 1 : -1].argmax(1)
    assert choices.tolist() == said, "greedy decoding went another way"


def hold_bf16(folder: Path, model: transformers.PreTrainedModel, seed: int) -> None:
    """Holds the engine in bf16 to an error of at most 1.5 times that of transformers in bf16, or that of float32 over
    its rounded weights: which is larger depends on the positions at which a router is near a tie."""
    model.save_pretrained(folder / "checkpoint")
    tmlc.compile(folder / "checkpoint", folder / "model.tmlc", precision="bf16")
    ids = np.random.default_rng(seed).integers(0, 50, POSITIONS).tolist()
    expected = expect(model, ids)
    with tmlc.load(folder / "model.tmlc", threads=1) as engine, engine.session() as session:
        found = session.append(tokens=ids)
    narrow = type(model).from_pretrained(
        folder / "checkpoint", dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    )
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for tensor, low in zip(rounded.parameters(), narrow.parameters(), strict=True):
            tensor.copy_(low.float())

    def error(logits: np.ndarray) -> float:
        return float(np.sqrt(np.square(logits - expected).mean()))

    assert error(found) <= 1.5 * max(error(expect(other, ids)) for other in (narrow.eval(), rounded))
