"""``bench version``."""

import torch

import bench


def version() -> None:
    """Print the version."""
    print(f"parry-bench {bench.__version__}, torch {torch.__version__}")
