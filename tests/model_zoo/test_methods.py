"""The methods are traceable: canonical ops only, any number of new positions, weights under checkpoint names."""

import pytest
import torch

from tmlc.model_zoo.interaction import InteractionConfig, InteractionModel

METHODS = ("embed_text", "embed_audio", "embed_speech", "embed_video", "decode", "unembed", "next_token", "speak",
           "vocode")  # fmt: skip


@pytest.fixture(scope="module")
def nano() -> InteractionModel:
    raw = InteractionConfig.from_preset("nano").to_dict()
    text = raw["text_config"]
    text.update(num_hidden_layers=2, layer_types=["hybrid_sliding", "hybrid"], mlp_layer_types=["dense", "sparse"])
    return InteractionModel.random(InteractionConfig.from_dict(raw), seed=0)


def test_the_model_has_the_methods_of_the_tick(nano: InteractionModel) -> None:
    assert tuple(nano.methods()) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_exports_to_canonical_ops_for_any_length(nano: InteractionModel, name: str) -> None:
    method = nano.methods()[name]
    n = torch.export.Dim("n", min=1, max=64)
    shapes = tuple({0: n if a == 1 else a * n} for a, b in method.n_rule)
    exported = torch.export.export(method.module, method.example_inputs(3), dynamic_shapes=shapes, strict=True)
    calls = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert all(call.startswith("tmlc.") or "getitem" in call for call in calls), calls
    assert exported.state_dict.keys() <= nano.state_dict().keys()
    fresh = method.example_inputs(5, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(*fresh), method.module(*fresh))


def test_methods_share_the_parameters_of_the_model(nano: InteractionModel) -> None:
    own = {name: tensor.data_ptr() for name, tensor in nano.state_dict().items()}
    for method in nano.methods().values():
        for name, tensor in method.module.state_dict().items():
            assert own[name] == tensor.data_ptr()
    assert not any("method" in name for name in own)


def test_example_inputs_follow_the_rules_of_rows(nano: InteractionModel) -> None:
    methods = nano.methods()
    (video,) = methods["embed_video"].example_inputs(2)
    assert video.dtype == torch.uint8 and video.shape == (2 * 2 * 64, 64 * 3)
    (mel,) = methods["vocode"].example_inputs(3)
    assert mel.shape == (12, 80)
    assert all(torch.equal(a, b) for a, b in
               zip(methods["speak"].example_inputs(4), methods["speak"].example_inputs(4), strict=True))  # fmt: skip
    with torch.no_grad():
        assert methods["embed_video"].module(video).shape == (2 * 16, 192)


def test_the_models_own_voice_is_told_from_the_users(nano: InteractionModel) -> None:
    methods = nano.methods()
    (pcm,) = methods["embed_audio"].example_inputs(4)
    with torch.no_grad():
        heard, spoken = methods["embed_audio"].module(pcm), methods["embed_speech"].module(pcm)
    torch.testing.assert_close(spoken - heard, nano.self_voice.expand(4, -1))


def test_every_parameter_of_the_model_learns_from_some_method() -> None:
    model = InteractionModel.random(InteractionConfig.from_preset("nano"), seed=0)
    methods = model.methods()
    parts = [methods[name].module(*methods[name].example_inputs(n))
             for name, n in (("embed_text", 12), ("embed_speech", 12), ("embed_video", 1))]  # fmt: skip
    hidden = methods["decode"].module(torch.cat(parts))
    _, key = methods["speak"].example_inputs(len(hidden))
    pcm = methods["vocode"].module(methods["speak"].module(hidden, key))
    (methods["unembed"].module(hidden).square().mean() + pcm.square().mean()).backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert still == []
