"""What an attack meets in place of the model, and the ledger of what it did there."""

from bench.oracle.ledger import NEVER, Ledger
from bench.oracle.referee import Oracle

__all__ = ["NEVER", "Ledger", "Oracle"]
