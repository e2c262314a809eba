"""What all tests share."""

import torch

from bench.registry import load_plugins

# The tests' networks are tiny: a second thread gains nothing, and loses much when other work shares the cores.
torch.set_num_threads(1)
load_plugins()
