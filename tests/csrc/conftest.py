"""The emulated CUDA library as the `cuda` backend of a test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from emulation import Emulation, build, why_not


@pytest.fixture(scope="session")
def library() -> Path:
    """The emulated library. Skips where it cannot be built, or fails if ERQ_TEST_REQUIRE, names by
    commas, has cuda-emulated. ERQ_CUDA_LIBRARY names another build of it."""
    chosen = os.environ.get("ERQ_CUDA_LIBRARY")
    if chosen:
        return Path(chosen)
    reason = why_not()
    if reason is not None:
        if "cuda-emulated" in os.environ.get("ERQ_TEST_REQUIRE", "").split(","):
            pytest.fail(f"the emulated library is required but {reason}")
        pytest.skip(f"emulated CUDA library: {reason}")
    return build()


@pytest.fixture
def emulation(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """The library in use as the backend `cuda`, without faults and with no statistics."""
    monkeypatch.setenv("ERQ_CUDA_LIBRARY", str(library))
    emulation = Emulation(library)
    emulation.statistics()
    yield emulation
    emulation.put_fault(None)
    emulation.reverse(False)
    emulation.shuffle_blocks(0)
