"""How many processors this process may use, asked without loading what computes on them."""

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def processors() -> float:
    """By its affinity and the quota of its container, which may grant parts of one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return min(affinity, float(quota) / float(period))
    except (OSError, ValueError):  # no container, or no quota ("max")
        return affinity
