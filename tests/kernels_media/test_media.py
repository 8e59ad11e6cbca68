"""bag_embedding, patchify and overlap_add against float64 numpy."""

import numpy as np
import pytest

from tmlc.errors import KernelError, PlanError


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


class TestBagEmbedding:
    @pytest.mark.parametrize(
        ("rows", "bins", "levels", "width"), [(4, 80, 16, 192), (1, 1, 1, 1), (3, 17, 5, 257), (2, 3, 2, 600)]
    )
    @pytest.mark.parametrize("dtype", ["f32", "bf16"])
    def test_sums_one_row_per_bin(self, one_op, operand, rows, bins, levels, width, dtype) -> None:
        rng = np.random.default_rng(width)
        table = rng.standard_normal((bins * levels, width)).astype(np.float32)
        stored = to_bf16(table) if dtype == "bf16" else table
        values = from_bf16(stored) if dtype == "bf16" else table
        level = rng.integers(0, levels, (rows, bins)).astype(np.int32)
        op = one_op(
            "bag_embedding",
            operand.out("f32", 1, width),
            operand.arg("i32", 1, bins),
            operand.weight(stored, dtype),
            i=[levels],
        )
        expected = np.zeros((rows, width), np.float32)
        for b in range(bins):
            expected += values[b * levels + level[:, b]]
        assert np.array_equal(op(rows, level), expected)  # the same order, so the same bits

    def test_threads_and_rows_never_change_the_bits(self, one_op, operand) -> None:
        rng = np.random.default_rng(1)
        table, level = rng.standard_normal((320, 700)), rng.integers(0, 8, (9, 40)).astype(np.int32)
        shape = operand.out("f32", 1, 700), operand.arg("i32", 1, 40), operand.weight(table)
        whole = one_op("bag_embedding", *shape, i=[8])(9, level)
        split = one_op("bag_embedding", *shape, i=[8], threads=3)
        assert np.array_equal(split(9, level), whole)
        assert np.array_equal(np.concatenate([split(1, row[None]) for row in level]), whole)

    @pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
    def test_a_level_out_of_range_stops_the_call(self, one_op, operand, bad: int) -> None:
        op = one_op(
            "bag_embedding",
            operand.out("f32", 1, 8),
            operand.arg("i32", 1, 3),
            operand.weight(np.ones((12, 8))),
            i=[4],
        )
        level = np.zeros((2, 3), np.int32)
        level[1, 2] = bad
        with pytest.raises(KernelError):
            op(2, level)

    @pytest.mark.parametrize(
        ("out", "level", "table", "i"),
        [
            (("f32", 1, 8), ("i32", 1, 3), (12, 8), [5]),
            (("f32", 1, 8), ("i32", 1, 3), (12, 8), [0]),
            (("f32", 1, 8), ("i32", 1, 3), (12, 8), [-4]),
            (("f32", 1, 8), ("i32", 1, 3), (12, 8), [2**61]),
            (("f32", 1, 8), ("i32", 1, 3), (12, 8), []),
            (("f32", 1, 8), ("i32", 1, 3), (12, 8), [4, 4]),
            (("f32", 1, 9), ("i32", 1, 3), (12, 8), [4]),
            (("f32", 2, 8), ("i32", 1, 3), (12, 8), [4]),
            (("i32", 1, 8), ("i32", 1, 3), (12, 8), [4]),
            (("f32", 1, 8), ("i64", 1, 3), (12, 8), [4]),
        ],
    )
    def test_a_malformed_call_is_refused(self, one_op, operand, out, level, table, i) -> None:
        with pytest.raises(PlanError):
            one_op(
                "bag_embedding", operand.out(*out), operand.arg(*level), operand.weight(np.ones(table)), i=i
            )


def fold(x: np.ndarray, t: int, s: int) -> np.ndarray:
    """[T,H,W,C] → [T/t,H/s,W/s,t·s·s·C]: one fold of the hMLP stem."""
    T, H, W, C = x.shape
    x = x.reshape(T // t, t, H // s, s, W // s, s, C).transpose(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(T // t, H // s, W // s, -1)


MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def patchify_of(one_op, operand, T, H, W, patch, folds, **options):
    leaf = folds[0] * folds[1] ** 2 * 3
    rows = T * H * W * 3 // leaf
    i = options.pop("i", [T, H, patch, len(folds) // 2, *folds])
    f = options.pop("f", [*MEAN, *STD])
    return one_op(
        "patchify", operand.out("f32", rows, leaf), operand.arg("u8", T * H, W * 3), i=i, f=f, **options
    )


GEOMETRIES = [
    (2, 40, 80, 40, [1, 5, 1, 2, 1, 4, 2, 1]),  # Inkling's stem
    (2, 32, 48, 16, [1, 2, 1, 2, 2, 4]),
    (6, 12, 24, 12, [3, 1, 1, 3, 2, 4]),
    (1, 6, 9, 3, [1, 3]),
    (2, 4, 4, 2, [1, 1, 1, 1, 2, 2]),
    (1, 1, 1, 1, [1, 1]),
]


class TestPatchify:
    @pytest.mark.parametrize(("T", "H", "W", "patch", "folds"), GEOMETRIES)
    @pytest.mark.parametrize("threads", [1, 2])
    def test_rows_are_leaves_in_the_order_of_the_folds(
        self, one_op, operand, T, H, W, patch, folds, threads
    ) -> None:
        video = np.random.default_rng(H * W).integers(0, 256, (3, T, H, W, 3)).astype(np.uint8)
        got = patchify_of(one_op, operand, T, H, W, patch, folds, threads=threads)(
            3, video.reshape(-1, W * 3)
        )
        x = (video / 255.0 - MEAN) / STD
        expected = []
        for clip in x:
            for y in range(0, H, patch):
                for left in range(0, W, patch):
                    piece = clip[:, y : y + patch, left : left + patch]
                    for k in range(0, len(folds), 2):
                        piece = fold(piece, folds[k], folds[k + 1])
                    expected.append(piece.reshape(-1, got.shape[1]))
        assert np.abs(got - np.concatenate(expected)).max() <= 2e-6

    @pytest.mark.parametrize(("T", "H", "W", "patch", "folds"), GEOMETRIES[:3])
    def test_every_fold_is_then_a_plain_reshape(self, one_op, operand, T, H, W, patch, folds) -> None:
        torch = pytest.importorskip("torch", reason="needs torch and transformers")
        inkling = pytest.importorskip("transformers.models.inkling.modeling_inkling", reason="needs Inkling")
        video = np.random.default_rng(8).integers(0, 256, (T, H, W, 3)).astype(np.uint8)
        rows = patchify_of(one_op, operand, T, H, W, patch, folds)(1, video.reshape(-1, W * 3))
        x = (video / 255.0 - MEAN) / STD
        patches = x.reshape(T, H // patch, patch, W // patch, patch, 3).transpose(1, 3, 0, 2, 4, 5)
        theirs = torch.from_numpy(patches.reshape(-1, T, patch, patch, 3))
        for k in range(0, len(folds), 2):
            t, s = folds[k], folds[k + 1]
            layer = inkling.InklingVisionEncoderLayer(1, 1, t, s, add_norm=False)
            theirs = layer.fold_timespace_to_depth(theirs) if t * s > 1 else theirs
            if k:
                rows = rows.reshape(-1, rows.shape[1] * t * s * s)
        assert np.abs(rows - theirs.reshape(rows.shape).numpy()).max() <= 2e-6

    @pytest.mark.parametrize(
        "change",
        [
            {"i": [2, 8, 4, 1, 2, 3]},
            {"i": [2, 8, 4, 1, 2]},
            {"i": [2, 8, 4, 2, 2, 4]},
            {"i": [2, 8, 4, 0]},
            {"i": [2, 8, 4]},
            {"i": [2, 8, 4, 1, 0, 4]},
            {"i": [2, 8, 4, 1, -2, -4]},
            {"i": [0, 8, 4, 1, 2, 4]},
            {"i": [2, -8, 4, 1, 2, 4]},
            {"i": [2**40, 8, 4, 1, 2**40, 4]},
            {"i": [2, 8, 4, 2**62, 2, 4]},
            {"i": [4, 8, 4, 1, 4, 4]},
            {"i": [2, 8, 8, 1, 2, 8]},
            {"f": [*MEAN, 0.0, 1.0, 1.0]},
            {"f": [*MEAN, -1.0, 1.0, 1.0]},
            {"f": [float("nan"), 0, 0, *STD]},
            {"f": [*MEAN, 1.0, 1.0, float("inf")]},
            {"f": [*MEAN]},
        ],
    )
    def test_a_malformed_call_is_refused(self, one_op, operand, change) -> None:
        patchify_of(one_op, operand, 2, 8, 4, 4, [2, 4])
        with pytest.raises(PlanError):
            patchify_of(one_op, operand, 2, 8, 4, 4, [2, 4], **change)


def overlap_add_of(one_op, operand, W: int, hop: int, window: np.ndarray, **options):
    return one_op(
        "overlap_add",
        operand.out("f32", 1, hop),
        operand.arg("f32", 1, W),
        operand.weight(window[None]),
        operand.state(W - hop),
        **options,
    )


class TestOverlapAdd:
    @pytest.mark.parametrize(
        ("W", "hop"), [(400, 200), (800, 200), (300, 200), (5, 1), (7, 3), (2, 1), (450, 200)]
    )
    def test_equals_the_whole_sum_in_any_chunking(self, one_op, operand, W: int, hop: int) -> None:
        rng = np.random.default_rng(W)
        frames, window = rng.standard_normal((23, W)).astype(np.float32), rng.random(W).astype(np.float32)
        whole = np.zeros(23 * hop + W)
        for r, frame in enumerate(frames.astype(np.float64)):
            whole[r * hop : r * hop + W] += frame * window
        bits = None
        for chunks in ([23], [1], [2, 5], [4, 1, 1]):
            op, at, turn, parts = overlap_add_of(one_op, operand, W, hop, window, threads=2), 0, 0, []
            while at < 23:
                n = min(chunks[turn % len(chunks)], 23 - at)
                parts.append(op(n, frames[at : at + n]))
                at, turn = at + n, turn + 1
            pcm = np.concatenate(parts).reshape(-1)
            assert np.abs(pcm - whole[: 23 * hop]).max() <= 1e-5
            kept = op.slot[: (W - hop) * 4].view(np.float32)
            assert np.abs(kept - whole[23 * hop : 22 * hop + W]).max() <= 1e-5
            bits = pcm if bits is None else bits
            assert np.array_equal(pcm, bits)

    def test_a_malformed_call_is_refused(self, one_op, operand) -> None:
        window = np.ones(8, np.float32)
        for W, hop, kept, rows, in_slot in [
            (8, 8, 1, 1, 1),
            (8, 9, 1, 1, 1),
            (8, 4, 3, 1, 1),
            (8, 4, 4, 2, 1),
            (8, 4, 4, 1, 0),
        ]:
            memory = operand.state(kept) if in_slot else operand.weight(np.zeros((1, kept)))
            with pytest.raises(PlanError):
                one_op(
                    "overlap_add",
                    operand.out("f32", 1, hop),
                    operand.arg("f32", rows, W),
                    operand.weight(window[None]),
                    memory,
                )
        with pytest.raises(PlanError):
            overlap_add_of(one_op, operand, 9, 4, window)
        with pytest.raises(PlanError):
            overlap_add_of(one_op, operand, 8, 4, window, i=[1])
