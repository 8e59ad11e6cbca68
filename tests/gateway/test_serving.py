"""What a server does to its process while it serves."""

import gc
import weakref

from tmlc.runtimes.gateway.serving import settled


class Ring:
    """Holds itself, so that only the collector frees it."""

    def __init__(self):
        self.own = self


def test_what_the_server_is_made_of_is_left_alone_and_what_comes_later_is_collected():
    before = Ring()
    old = weakref.ref(before)
    with settled():
        assert gc.get_freeze_count() > 10_000
        del before
        new = weakref.ref(Ring())
        gc.collect()
        assert new() is None and old() is not None
    gc.collect()
    assert gc.get_freeze_count() < 1_000 and old() is None  # Python 3.12 keeps its immortal objects there
