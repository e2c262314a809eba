"""Where data sets come from. Each source is one file here; importing the package registers them all."""

from bench.registry import import_all

import_all(__name__)
