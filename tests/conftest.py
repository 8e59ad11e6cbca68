"""What all tests share: nothing that a test compiles comes out of a cache, or goes into the user's own."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_compile_cache():
    """Tests of what compiling does must compile; tests/cache brings a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMLC_CACHE", "off")
        yield
