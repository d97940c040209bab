"""Settings of all tests: scratch caches, no telemetry, one thread a worker, no network but loopback."""

import os
import shutil
import tempfile

# Before anything imports torch or huggingface_hub, which read these once.
_HOME = tempfile.mkdtemp(prefix="timm_attn_tests_")
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",  # the loopback server has no Xet storage
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    MPLCONFIGDIR=_HOME,
    TORCHINDUCTOR_CACHE_DIR=_HOME,
)
for _name in ("TIMM_ATTN_HUB", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_name, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import pytest
import torch

datasets.disable_progress_bars()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_sessionfinish() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items) -> None:
    """Tests of a file share its fixtures and so a worker; those that have none spread."""
    for item in items:
        if item.path.stem not in ("test_contract", "test_fold"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
