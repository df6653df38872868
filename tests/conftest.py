"""What every test shares: no surprise threads, no network, no user's cache, no deadlines on busy cores."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest
from hypothesis import settings

# Before anything imports torch or huggingface_hub, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_cache = tempfile.TemporaryDirectory(prefix="amalgam-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _cache.name
os.environ["AMALGAM_CACHE"] = f"{_cache.name}/amalgam"
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens: a forgotten request fails at once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
    os.environ.pop(name, None)

settings.register_profile("amalgam", settings.get_profile("default"), deadline=None)
settings.load_profile("amalgam")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test that fails must fail again. (Looking further is Hypothesis' task, and it tells what it found.)"""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    _cache.cleanup()
