"""The compiled CPU engine against `InklingForConditionalGeneration` of transformers: text, audio and images mixed.

Checkpoints are written by `save_pretrained` (which uses the original release's names and layouts), with configs drawn
at random. Features come from transformers' own extractor where it runs; its image processor needs torchvision, so
pixel values are made here from the same frames, in the processor's order of patches.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import InklingConfig, InklingFeatureExtractor, InklingForConditionalGeneration, InklingProcessor
from transformers.models import inkling

import tmlc
from tmlc.frontend import open_checkpoint
from tmlc.ir.program import Program
from tmlc.ir.run import ProgramRunner

POSITIONS, GREEDY = 300, 64
NORMS_ONCE = pytest.mark.skipif(
    transformers.__version__.startswith("5.17."),
    reason="transformers 5.17 normalises the embedded positions of mixed input twice; 5.18 and later once",
)
SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 9))]


def draw(seed: int) -> tuple[dict, dict]:
    """(config.json, processor_config.json) of a small model; odd sizes, every kind of layer and stem among them."""
    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    layers, kv, swa_kv = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 3))
    experts = int(rng.integers(1, 7))
    vocab = int(rng.integers(60, 100))
    stride = int(rng.integers(9, 40))
    patch, rate, hop_s = pick(4, 6, 8, 10), 16000, pick(0.05, 0.025)
    text = dict(
        vocab_size=vocab, unpadded_vocab_size=pick(None, vocab - 5), hidden_size=pick(24, 32, 40),
        num_hidden_layers=layers, num_attention_heads=kv * pick(1, 2), num_key_value_heads=kv,
        head_dim=pick(8, 10, 80), swa_num_attention_heads=swa_kv * pick(1, 3), swa_num_key_value_heads=swa_kv,
        swa_head_dim=pick(4, 8, 14), sliding_window_size=int(rng.integers(3, 40)), d_rel=int(rng.integers(1, 6)),
        rel_extent=int(rng.integers(3, 90)), log_scaling_n_floor=pick(None, 3, 40), log_scaling_alpha=pick(0.1, 0.3),
        layer_types=[pick("hybrid", "hybrid_sliding") for _ in range(layers)],
        mlp_layer_types=[pick("dense", "sparse", "sparse") for _ in range(layers)], conv_kernel_size=pick(2, 3, 4),
        rms_norm_eps=pick(1e-6, 1e-3), intermediate_size=int(rng.integers(10, 60)),
        moe_intermediate_size=int(rng.integers(5, 40)), n_routed_experts=experts,
        num_experts_per_tok=int(rng.integers(1, experts + 1)), n_shared_experts=int(rng.integers(1, 4)),
        route_scale=pick(1.0, 2.5), logits_mup_width_multiplier=pick(1.0, 3.0), num_mtp_layers=pick(None, 1),
    )  # fmt: skip
    config = dict(
        text_config=text, audio_config=dict(n_mel_bins=int(rng.integers(5, 30)), mel_vocab_size=stride),
        vision_config=dict(patch_size=patch, temporal_patch_size=pick(2, 4), num_hidden_layers=int(rng.integers(2, 6))),
        audio_token_id=vocab - 1, image_token_id=vocab - 2, audio_bos_token_id=1, image_bos_token_id=2,
    )  # fmt: skip
    processor = dict(
        feature_extractor=dict(
            feature_size=config["audio_config"]["n_mel_bins"], sampling_rate=rate, audio_token_duration_s=hop_s,
            window_size_multiplier=pick(1.5, 2.0), n_fft=pick(None, 1800),
        ),
        image_processor=dict(
            size={"height": patch, "width": patch}, rescale_factor=pick(1 / 255, 1 / 127.5),
            image_mean=[0.4, 0.5, 0.45], image_std=[0.2, 0.3, 0.25],
        ),
        num_dmel_bins=int(rng.integers(2, stride + 1)), dmel_min_value=-6.0, dmel_max_value=1.5,
        frame_size={"height": patch * 2, "width": patch * 3},
    )  # fmt: skip
    return config, processor


def random_model(config: dict, seed: int) -> InklingForConditionalGeneration:
    """Logits of unit scale, a router that really chooses, and no head for the two placeholder tokens."""
    torch.manual_seed(seed)
    made = InklingConfig(**config)
    made._attn_implementation = made.text_config._attn_implementation = "eager"
    model = InklingForConditionalGeneration(made).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim >= 2:
                tensor.normal_(0, 1.0 / tensor.shape[-1] ** 0.5)
            elif "global_scale" not in name:
                tensor.uniform_(0.5, 1.5)
        for name, tensor in model.named_buffers():
            if "e_score_correction_bias" in name:
                tensor.uniform_(-0.3, 0.3)
        ids = torch.randint(0, 50, (1, 32))
        model.lm_head.weight /= model(input_ids=ids).logits.std()
        model.lm_head.weight[-2:] = 0
    return model


def save(model: InklingForConditionalGeneration, processor: dict, folder, **options) -> None:
    model.save_pretrained(folder, **options)
    (folder / "processor_config.json").write_text(json.dumps(processor))


class Mixed:
    """A sequence of pieces (what, value) and the same for transformers."""

    def __init__(self, config: dict, processor: dict, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.config, self.processor = config, processor
        vision, frame = config["vision_config"], processor["frame_size"]
        self.hop = round(processor["feature_extractor"]["audio_token_duration_s"] * 16000)
        self.patch, self.frames = vision["patch_size"], vision["temporal_patch_size"]
        size = (self.frames, frame["height"], frame["width"], 3)
        self.patches = (frame["height"] // self.patch) * (frame["width"] // self.patch)
        self.pieces, count = [], 0
        while count < POSITIONS:
            kind = ("text", "audio", "image")[rng.integers(3)]
            if kind == "text":
                value = rng.integers(0, 50, rng.integers(1, 20)).tolist()
                count += len(value)
            elif kind == "audio":
                heard = int(rng.integers(1, 12))
                loud = np.repeat(rng.choice([1e-3, 0.05, 0.5], heard), self.hop)
                value = (rng.standard_normal(heard * self.hop) * loud).astype(np.float32)
                count += heard
            else:
                clips = int(rng.integers(1, 3))
                value = rng.integers(0, 256, (clips * size[0], *size[1:]), dtype=np.uint8)
                count += clips * self.patches
            self.pieces.append((kind, value))

    def append_whole(self, session) -> np.ndarray:
        return np.concatenate([self._append(session, kind, value) for kind, value in self.pieces])

    def append_chunked(self, session, seed: int) -> np.ndarray:
        rng, out = np.random.default_rng(seed), []
        for kind, value in self.pieces:
            unit = {"text": 1, "audio": self.hop, "image": self.frames}[kind]
            at = 0
            while at < len(value):
                step = unit * int(rng.integers(1, 6))
                out.append(self._append(session, kind, value[at : at + step]))
                at += step
        return np.concatenate(out)

    def _append(self, session, kind, value) -> np.ndarray:
        return session.append(**{{"text": "tokens", "audio": "audio", "image": "video"}[kind]: value})

    def inputs(self) -> dict[str, torch.Tensor]:
        """What transformers takes. All audio of a session is one stream, so it is one clip here."""
        ids, pcm, clips = [], [], []
        for kind, value in self.pieces:
            if kind == "text":
                ids += value
            elif kind == "audio":
                ids += [self.config["audio_token_id"]] * (len(value) // self.hop)
                pcm.append(value)
            else:
                clips.append(value.reshape(-1, self.frames, *value.shape[1:]))
                ids += [self.config["image_token_id"]] * (len(clips[-1]) * self.patches)
        out = {"input_ids": torch.tensor(ids)[None]}
        if pcm:
            out["audio_input_ids"] = self.levels(np.concatenate(pcm))
        if clips:
            out["pixel_values"] = self.pixel_values(np.concatenate(clips))
        return out

    def levels(self, pcm: np.ndarray) -> torch.Tensor:
        processor = self.processor
        extractor = InklingFeatureExtractor(**processor["feature_extractor"])
        heard = extractor(pcm, sampling_rate=16000)["input_features"]
        low, high = processor["dmel_min_value"], processor["dmel_max_value"]
        centres = torch.linspace(low, high, processor["num_dmel_bins"], dtype=torch.float64).float()
        binning = SimpleNamespace(bin_centers=centres, dmel_min_value=low, dmel_max_value=high)
        return InklingProcessor._extract_dmel_bins(binning, heard)

    def pixel_values(self, clips: np.ndarray) -> torch.Tensor:
        """uint8 [clips, T, H, W, 3] → [patches, T, p, p, 3], patches row by row as `divide_to_patches` cuts them."""
        image, p = self.processor["image_processor"], self.patch
        mean, std = torch.tensor(image["image_mean"]), torch.tensor(image["image_std"])
        x = (torch.from_numpy(clips).float() * image["rescale_factor"] - mean) / std
        n, t, h, w, c = x.shape
        cut = x.reshape(n, t, h // p, p, w // p, p, c).permute(0, 2, 4, 1, 3, 5, 6)
        return cut.reshape(-1, t, p, p, c)


@torch.no_grad()
def expect(model: InklingForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return model(**inputs, use_cache=False).logits[0].float().numpy()


@NORMS_ONCE
@pytest.mark.parametrize("seed", SEEDS)
def test_text_audio_and_images_equal_transformers_whole_and_in_random_chunks(seed, tmp_path):
    config, processor = draw(seed)
    model = random_model(config, seed)
    save(model, processor, tmp_path / "checkpoint", **({"max_shard_size": "60KB"} if seed % 2 else {}))
    assert (tmp_path / "checkpoint" / "model.safetensors.index.json").is_file() == bool(seed % 2)
    report = tmlc.compile(tmp_path / "checkpoint", tmp_path / "model.tmlc", precision="fp32")
    matches = {record.name: record.matches for record in report.passes}
    layers, sparse = len(model.model.language_model.layers), config["text_config"]["mlp_layer_types"].count("sparse")
    assert matches["route.fuse_router"] == matches["route.stack_experts"] == sparse
    assert matches["fuse.merge_linears"] == layers + (layers - sparse)  # q, k, v, r; gate and up of dense layers
    assert matches["fuse.residual_norm"] == 2 * layers == matches["fuse.attention_epilogue"]
    assert matches["fuse.conv"] == 4 * layers  # keys, values, behind attention, behind the experts
    assert matches["fuse.head"] == 1 and matches["route.select_kernel"] == sparse
    assert matches["state.insert"] == 5 * layers + 1  # attention and four convolutions; the audio window
    mixed = Mixed(config, processor, seed)
    inputs = mixed.inputs()
    expected = expect(model, inputs)
    assert 0.3 < expected.std() < 3.0, "the bound of 1e-4 is meant for logits of unit scale"
    with tmlc.load(tmp_path / "model.tmlc", threads=1) as engine:
        with engine.session() as session:
            whole = mixed.append_whole(session)
            assert whole.shape == expected.shape and whole.dtype == np.float32
            assert np.abs(whole - expected).max() <= 1e-4
            said, logits = [], whole[-1:]
            for _ in range(GREEDY):
                said.append(int(logits[-1].argmax()))
                logits = session.append(tokens=said[-1:])
        with engine.session() as session:
            assert np.array_equal(mixed.append_chunked(session, seed), whole), "the cut into appends changed bits"
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor(said)[None]], 1)
    choices = expect(model, inputs)[len(whole) - 1 : -1].argmax(1)
    assert choices.tolist() == said, "greedy decoding went another way"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_bf16_errs_no_more_than_bf16_of_transformers(seed, tmp_path):
    config, processor = draw(seed)
    model = random_model(config, seed)
    save(model, processor, tmp_path / "checkpoint")
    tmlc.compile(tmp_path / "checkpoint", tmp_path / "model.tmlc", precision="bf16")
    mixed = Mixed(config, processor, seed)
    inputs = mixed.inputs()
    expected = expect(model, inputs)
    with tmlc.load(tmp_path / "model.tmlc", threads=1) as engine, engine.session() as session:
        found = mixed.append_whole(session)
    narrow = InklingForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    )
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    theirs = expect(narrow.eval(), inputs)
    assert np.sqrt(np.square(found - expected).mean()) <= 1.5 * np.sqrt(np.square(theirs - expected).mean())


@dataclass
class Small:
    """A small model, its checkpoint (with a multi-token-prediction tensor) and what tmlc makes of it."""

    model: InklingForConditionalGeneration
    config: dict
    processor: dict
    folder: Path
    program: Program
    package: Path
    report: tmlc.CompileReport


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    base = tmp_path_factory.mktemp("mm")
    config, processor = draw(0)
    model = random_model(config, 0)
    save(model, processor, base / "checkpoint")
    tensors = load_file(base / "checkpoint" / "model.safetensors")
    tensors["model.mtp.layers.0.attn.wq_du.weight"] = torch.ones(2, 2)
    save_file(tensors, base / "checkpoint" / "model.safetensors")
    report = tmlc.compile(base / "checkpoint", base / "m.tmlc", precision="fp32")
    program = tmlc.program(base / "checkpoint")
    return Small(model, config, processor, base / "checkpoint", program, base / "m.tmlc", report)


def test_module_names_and_release_names_give_the_same_weights(small, tmp_path):
    first = open_checkpoint(small.folder)
    assert "model.llm.embed.weight" in first and "model.language_model.embed_tokens.weight" not in first
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((small.folder / name).read_bytes())
    tensors = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    other, second = tmlc.program(tmp_path), open_checkpoint(tmp_path)
    names = small.program.used_weights()
    assert sorted(names) == sorted(other.used_weights())
    for name in names:
        assert torch.equal(small.program.weights.evaluate(name, first), other.weights.evaluate(name, second)), name


def test_the_norm_of_tokens_is_read_where_transformers_5_17_keeps_it(small, tmp_path):
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((small.folder / name).read_bytes())
    new, old = (f"model.language_model.{p}embed_norm.weight" for p in ("embed_tokens.", ""))
    tensors = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    tensors[old] = tensors.pop(old if old in tensors else new)
    save_file(tensors, tmp_path / "model.safetensors")
    norm = tmlc.program(tmp_path).weights.evaluate("model.embed_tokens.embed_norm.weight", open_checkpoint(tmp_path))
    assert torch.equal(norm, tensors[old])


def test_multi_token_prediction_weights_are_skipped_with_a_note(small):
    assert small.report.notes == ["1 multi-token-prediction tensors (model.mtp.*) are not used"]
    assert small.report.to_json()["notes"] == small.report.notes


def test_the_vision_tower_equals_transformers_on_equal_pixel_values(small):
    """A still image: its frame, `temporal_patch_size` times. One position a patch, row by row."""
    mixed = Mixed(small.config, small.processor, 0)
    frame = small.processor["frame_size"]
    image = np.random.default_rng(0).integers(0, 256, (frame["height"], frame["width"], 3), dtype=np.uint8)
    clip = np.stack([image] * mixed.frames)
    with torch.no_grad():
        expected = small.model.model.vision_tower(mixed.pixel_values(clip[None])).pooler_output[:, 0]
    session = ProgramRunner(small.program, open_checkpoint(small.folder)).session()
    (found,) = session.call("embed_video", torch.from_numpy(clip.reshape(-1, frame["width"] * 3)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_patches_come_in_the_order_of_the_image_processor_but_for_its_empty_column(small):
    """`divide_to_patches` cuts one column more than a whole number of patches needs; frames have none such."""
    source = Path(inkling.__file__).with_name("image_processing_inkling.py").read_text()
    (cut,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "divide_to_patches"]
    cut.returns = None
    cut.args.args[0].annotation = None
    scope: dict = {}
    exec(compile(ast.Module([cut], []), "divide_to_patches", "exec"), scope)  # noqa: S102 (its module needs torchvision)
    mixed, frame = Mixed(small.config, small.processor, 0), small.processor["frame_size"]
    image = torch.randint(0, 256, (frame["height"], frame["width"], 3), dtype=torch.uint8)
    pieces = scope["divide_to_patches"](image.permute(2, 0, 1), mixed.patch)
    whole = [piece for piece in pieces if piece.numel()]
    assert len(pieces) - len(whole) == frame["height"] // mixed.patch and len(whole) == mixed.patches
    values = mixed.pixel_values(torch.stack([image] * mixed.frames)[None].numpy())
    settings = small.processor["image_processor"]
    mean, std = torch.tensor(settings["image_mean"]), torch.tensor(settings["image_std"])
    for found, piece in zip(values, whole, strict=True):
        expected = (piece.permute(1, 2, 0) * settings["rescale_factor"] - mean) / std
        assert all(torch.equal(still, expected) for still in found)


def test_pixel_values_are_those_of_the_image_processor(small):
    """The processor itself, on a frame of the package's size: its patches (but for the empty column) are those that the
    tests make and, through the vision tower, what `embed_video` answers to the frame."""
    try:
        from transformers.models.inkling.image_processing_inkling import InklingImageProcessor
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs a torchvision that was built for this torch: {error}")
    mixed, frame = Mixed(small.config, small.processor, 0), small.processor["frame_size"]
    height, width = frame["height"], frame["width"]
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    clip = np.stack([image] * mixed.frames)
    given = InklingImageProcessor(**small.processor["image_processor"])(images=[image], return_tensors="pt")
    patches = given["pixel_values"].unflatten(0, (height // mixed.patch, -1))[:, : width // mixed.patch].flatten(0, 1)
    assert torch.equal(patches[:, 0], patches[:, 1]), "a still image is its frame repeated"
    patches = patches[:, :1].repeat(1, mixed.frames, 1, 1, 1)
    torch.testing.assert_close(patches, mixed.pixel_values(clip[None]), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = small.model.model.vision_tower(patches).pooler_output[:, 0]
    session = ProgramRunner(small.program, open_checkpoint(small.folder)).session()
    (found,) = session.call("embed_video", torch.from_numpy(clip.reshape(-1, width * 3)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_tick_takes_audio_and_a_clip_and_writes_text(small):
    mixed = Mixed(small.config, small.processor, 3)
    clip = next(value for kind, value in mixed.pieces if kind == "image")[: mixed.frames]
    pcm = np.full(mixed.hop + 1, 0.1, np.float32)
    with tmlc.load(small.package, threads=1) as engine, engine.session() as ticked, engine.session() as appended:
        out = ticked.tick(tmlc.TickInput(audio=pcm, video=clip, tokens=[3, 4]))
        assert out.audio.size == 0 and out.stats["padded_samples"] == mixed.hop - 1
        padded = np.concatenate([pcm, np.zeros(mixed.hop - 1, np.float32)])
        logits = appended.append(tokens=[3, 4], audio=padded, video=clip)
        assert len(logits) == 2 + mixed.patches + 2
        assert out.tokens[0] == logits[-1].argmax()
        assert ticked.positions == len(logits) + len(out.tokens)
        silent = ticked.tick()  # hears nothing: only its own tokens are appended
        assert silent.stats["appended"] == len(silent.tokens)
