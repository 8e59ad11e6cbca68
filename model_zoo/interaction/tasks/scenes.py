"""Pictures: a shape on a dark ground that rests, jumps, moves or lights up. Clips are uint8 [2, 64, 64, 3]."""

from __future__ import annotations

import numpy as np

from .episode import CLIP_FRAMES, FRAME_SIZE

FLOOR, TOP = 38, 8
"""Row of the shape's upper edge when it rests, and in the middle of a jump."""
SIZE = 16


class Scene:
    """One shape in one colour, somewhere on the floor.

    Args:
        rng: of the episode; colours, place and camera noise are drawn from it.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._ground = rng.integers(10, 60, 3)
        self._colour = rng.integers(120, 256, 3)
        self._round = bool(rng.random() < 0.5)
        self.x = int(rng.integers(4, FRAME_SIZE - SIZE - 4))
        self._step = int(rng.choice([-1, 1]))

    def rest(self) -> np.ndarray:
        """A clip in which nothing happens."""
        return self._clip([(self.x, FLOOR), (self.x, FLOOR)])

    def jump(self) -> np.ndarray:
        """On the floor in the first frame, up in the second."""
        return self._clip([(self.x, FLOOR), (self.x, TOP)])

    def move(self) -> np.ndarray:
        """Sideways by half its width between the two frames; at a wall it turns round."""
        before, reach = self.x, FRAME_SIZE - SIZE
        if not 0 <= before + self._step * SIZE // 2 <= reach:
            self._step = -self._step
        self.x = before + self._step * SIZE // 2
        return self._clip([(before, FLOOR), (self.x, FLOOR)])

    def flash(self) -> np.ndarray:
        """The whole picture lights up."""
        return np.maximum(self.rest(), 205)

    def _clip(self, places: list[tuple[int, int]]) -> np.ndarray:
        rows, columns = np.mgrid[0:FRAME_SIZE, 0:FRAME_SIZE]
        frames = np.empty((CLIP_FRAMES, FRAME_SIZE, FRAME_SIZE, 3))
        for frame, (x, y) in zip(frames, places, strict=True):
            if self._round:
                inside = (rows - y - SIZE / 2 + 0.5) ** 2 + (columns - x - SIZE / 2 + 0.5) ** 2 <= SIZE**2 / 4
            else:
                inside = (rows >= y) & (rows < y + SIZE) & (columns >= x) & (columns < x + SIZE)
            frame[:] = np.where(inside[..., None], self._colour, self._ground)
        frames += self._rng.normal(0, 3, frames.shape)
        return np.clip(frames, 0, 255).astype(np.uint8)
