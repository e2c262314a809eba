"""What all tests share."""

import torch

# The tests' networks are tiny: a second thread gains nothing, and loses much when other work shares the cores.
torch.set_num_threads(1)
