"""``bench version``."""

import bench


def version() -> None:
    """Print the version."""
    import torch  # whose own word says which build it is; not before it is needed

    print(f"parry-bench {bench.__version__}, torch {torch.__version__}")
