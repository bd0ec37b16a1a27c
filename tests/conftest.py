"""What every test shares: no network, no accelerator, few threads, a fixed Hypothesis profile."""

import os
import signal

# Before any library reads them: xdist runs several workers on few cores, and no test may look for a hub or a server.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_SILENT="true",
    CUDA_VISIBLE_DEVICES="",
    CURATE_TRUST="tests",  # their models; commands that they start inherit it
)
os.environ.pop("WANDB_API_KEY", None)

import pytest
from hypothesis import HealthCheck, settings

# Started by nohup or in the background, a process ignores these, and so would the commands that tests send them to.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

settings.register_profile(
    "curate", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("curate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recorded run (`run`, its streams in `data`) and a target (`target.jsonl`), made once for each module."""
    from tests.tiny import record_tiny_run, write_tiny_target

    folder = tmp_path_factory.mktemp("recorded")
    record_tiny_run(folder)
    write_tiny_target(folder / "target.jsonl")
    return folder


def pytest_sessionstart(session):
    """Earlier tests killed trainings: what those left in shared memory would use up the file descriptors of these."""
    if not hasattr(session.config, "workerinput"):
        from curate.data.memory import sweep

        sweep()
