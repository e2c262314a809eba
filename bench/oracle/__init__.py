"""What an attack meets in place of the model, and who judges and counts what it asks."""

from bench.oracle.attacker import Oracle
from bench.oracle.ledger import NEVER, Ledger
from bench.oracle.part import Part
from bench.oracle.referee import Referee
from bench.oracle.rounding import check_levels
from bench.oracle.rules import Rules

__all__ = ["NEVER", "Ledger", "Oracle", "Part", "Referee", "Rules", "check_levels"]
