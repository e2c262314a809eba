"""What all tests share."""

# isort: off
from bench.registry import load_plugins  # before torch: bench says how threads wait
import torch
# isort: on

import signal

import pytest

# The tests' networks are tiny: a second thread gains nothing, and loses much when other work shares the cores.
torch.set_num_threads(1)
load_plugins()
# A shell starts jobs in the background with Ctrl-C ignored, which the commands under test would inherit and respect.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache folder of the tests' own, so that they neither read nor fill the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder of networks for tests that all train the same one and do not ask how: it is trained once."""
    return tmp_path_factory.mktemp("networks")
