"""Whether two rows met the same attack, whatever it is called: its parameters, version and what it works on."""

from collections.abc import Mapping
from typing import Any

from bench.report.ranking import Encounter
from bench.report.settings import HASH
from bench.results.store import Row


def other_attack(a: Mapping[Encounter, Row], b: Mapping[Encounter, Row]) -> str:
    """Why attacks that two defenses have met under one name are not the same; empty where they are."""
    for encounter in sorted(a.keys() & b.keys()):
        if told := differences(_does(a[encounter]), _does(b[encounter])):
            return f"{encounter[0]} is not the same attack: {', '.join(told)}"
    return ""


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Where two tell different things under one name, in words."""
    names = dict.fromkeys((*a, *b))
    return [f"{name} is {_shown(a, name)} in the first and {_shown(b, name)} in the second" for name in names
            if a.get(name) != b.get(name)]  # fmt: skip


def _shown(values: Mapping[str, Any], name: str) -> str:
    return str(values[name]) if values.get(name, "") != "" else "none"


def _does(row: Row) -> dict[str, Any]:
    """What the attack of a row does, by the names of its parameters."""
    cell = row.cell
    told: dict[str, Any] = {**cell.attack.params, "version": cell.attack.version, "access": cell.threat.access}
    told["networks of its own"] = ", ".join(f"{source.model.spec} {source.weights_hash[:HASH]}".strip()
                                            for source in cell.sources)  # fmt: skip
    told["examples"] = cell.replays.spec if cell.replays else ""
    if "rescaled" in cell.attack.traits:
        told["budget that its schedule is made for"] = cell.threat.query_budget
    return told
