"""The shape of one call on the GPU: so many sessions, with so many new positions each at most."""

from dataclasses import dataclass

from tmlc.errors import EmitError


@dataclass(frozen=True)
class Bucket:
    """B sessions with at most n new positions each.

    An activation with rows `a·n + b` in a method has B·(a·n + b) rows here, those of session 0 first, each session
    padded to the bucket's n. Two device arrays say what is live: `slots` int64[B], the byte offset of each session's
    slot in the pool (a multiple of 64), and `counts` int32[B], its real new positions, 0..n (0: no session).
    A kernel may leave anything in padded rows, writes no state for them and stays inside its operands.
    """

    batch: int
    n: int

    def __post_init__(self) -> None:
        if not (1 <= self.batch <= 4096 and 1 <= self.n <= 1 << 20):
            raise EmitError(f"a bucket of {self.batch} sessions with {self.n} positions", fix="use sizes from 1 on")

    def session_rows(self, rows: tuple[int, int]) -> int:
        """Rows of one session, padding included."""
        return rows[0] * self.n + rows[1]

    def rows(self, rows: tuple[int, int]) -> int:
        """Rows of an activation, padding included."""
        return self.batch * self.session_rows(rows)

    @property
    def name(self) -> str:
        return f"b{self.batch}n{self.n}"
