"""Networks by name. Each family is one file here; importing the package registers them all."""

from bench.models.user_file import FromFile, check_logits, resolve
from bench.registry import import_all

__all__ = ["FromFile", "check_logits", "resolve"]

import_all(__name__)
