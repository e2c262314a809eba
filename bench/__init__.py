"""Parry: robustness evaluation for models, data and services that defend themselves."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported (see bench/system/threads.py)

__version__ = "0.1.0"
