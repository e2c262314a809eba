"""Data sets by name. Each place they can come from is one file here; importing the package registers them all."""

from bench.registry import import_all

import_all(__name__)
