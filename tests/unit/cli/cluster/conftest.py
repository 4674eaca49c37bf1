import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Give the environment back: a node's start exports what its Ray needs into the process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
