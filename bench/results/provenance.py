"""Where a figure comes from: code, libraries, hardware and time."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import bench
from bench.system.threads import TRAINING


def provenance(device: torch.device) -> dict[str, Any]:
    """What a row records about its making; nothing that names a person or a machine."""
    return {
        "parry": bench.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in ("torch", "numpy", "torchattacks")},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "training_threads": TRAINING,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@lru_cache
def commit() -> str:
    """The commit of this checkout, with ``-dirty`` when tracked code has changed since; ``unknown`` outside one."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return "unknown"
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        code = ["--", "bench", "attacks", "defenses"]
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD", *code], capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head if clean.returncode == 0 else f"{head}-dirty"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache
def _processor() -> str:
    cores = f"{os.cpu_count()} cores"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.processor() or platform.machine()}, {cores}"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {cores}"
