"""Settings of all tests: scratch caches, no telemetry, one thread a worker, no GPU, only loopback."""

import os
import random
import shutil
import tempfile

# Before anything imports torch or huggingface_hub, which read these once.
_HOME = tempfile.mkdtemp(prefix="timm_attn_tests_")
os.environ.update(
    CUDA_VISIBLE_DEVICES="",  # what is tested is what every machine computes
    HF_HOME=_HOME,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",  # the loopback server has no Xet storage
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HYPOTHESIS_STORAGE_DIRECTORY=f"{_HOME}/hypothesis",
    MPLCONFIGDIR=_HOME,
    TORCHINDUCTOR_CACHE_DIR=_HOME,
)
for _name in ("TIMM_ATTN_HUB", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_name, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

#: Files whose tests compute nothing that another CPU could compute otherwise; `make test-kernels` leaves them out.
NO_NUMBERS = {
    "test_cli",
    "test_contributing",
    "test_downloads",
    "test_hub_server",
    "test_models",
    "test_pretrained",
    "test_publish",
    "test_rendered",
    "test_security",
}
#: Files whose tests have no fixtures to share, and spread over the workers.
SPREAD = {"test_contract", "test_fold"}


def pytest_sessionfinish() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items) -> None:
    """Tests of a file share its fixtures and so a worker."""
    for item in items:
        stem = item.path.stem
        if stem not in SPREAD:
            item.add_marker(pytest.mark.xdist_group(stem))
        if stem not in NO_NUMBERS:
            item.add_marker(pytest.mark.numbers)


def _seed(seed: int) -> None:
    import numpy as np
    import torch  # here, as below

    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.hookimpl(tryfirst=True)  # before any fixture
def pytest_runtest_setup() -> None:
    """What a file's fixtures draw does not depend on the tests before."""
    _seed(0)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on whether it was the one that made its file's fixtures."""
    _seed(1)


@pytest.fixture(autouse=True, scope="session")
def blank_pictures():
    """Runs in this process leave a blank picture: drawing curves takes longer than a small run.

    test_curves.py draws. Imported here, since the process that only hands out tests to workers needs nothing.
    """
    import datasets
    import torch
    from helpers import BLANK

    from timm_attn.training import curves

    datasets.disable_progress_bars()
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw", "draw_seeds"):
            patch.setattr(curves, name, lambda lines, title, path: path.write_bytes(BLANK))
        yield
