"""What all tests share."""

# isort: off
from bench.registry import load_plugins  # before torch: bench says how threads wait
import torch
# isort: on

# The tests' networks are tiny: a second thread gains nothing, and loses much when other work shares the cores.
torch.set_num_threads(1)
load_plugins()
