"""What an attack meets in place of the model, and who judges and counts what it asks."""

from bench.oracle.ledger import Ledger
from bench.oracle.oracle import Oracle
from bench.oracle.part import Part
from bench.oracle.quantise import check_levels
from bench.oracle.referee import Referee
from bench.rules import NEVER, Rules

__all__ = ["NEVER", "Ledger", "Oracle", "Part", "Referee", "Rules", "check_levels"]
