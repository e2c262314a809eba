"""Which unit a worker gets next."""

from collections import deque
from collections.abc import Collection, Iterable
from itertools import chain

from bench.run.units import Unit


class Waiting:
    """The units that wait for a worker, in the order of the plan.

    A unit is ready once all that it needs has been made. A worker goes on with the network that it holds. If nobody
    waits for that, it takes up one that no other worker is at, so that few networks are made ready twice.
    """

    def __init__(self) -> None:
        self._units: dict[str, deque[Unit]] = {}  # by network
        self._network: dict[Unit, str] = {}
        self._needs: dict[Unit, frozenset[str]] = {}
        self._unmade: set[str] = set()
        self._later: list[Unit] = []

    def __bool__(self) -> bool:
        return bool(self._later or self._units)

    def add(self, unit: Unit, network: str, needs: Iterable[str]) -> None:
        """``unit`` is of a cell that attacks ``network``, and ``needs`` what other units make."""
        if unit.makes:
            self._unmade.add(unit.makes)
        self._network[unit], self._needs[unit] = network, frozenset(needs)
        self._units.setdefault(network, deque()).append(unit)

    def network(self, unit: Unit) -> str:
        """What a worker holds that has worked on ``unit``."""
        return self._network[unit]

    def needs(self, unit: Unit) -> frozenset[str]:
        """What has to be made before ``unit``."""
        return self._needs[unit]

    def makes(self, key: str) -> bool:
        """Whether a unit makes what is called ``key``, and has not been settled."""
        return key in self._unmade

    def take(self, holds: str, held: Collection[str]) -> Unit | None:
        """The next unit that is ready, for a worker that ``holds`` a network; others work on those that are ``held``.
        """
        own = (holds,) if holds in self._units else ()
        for network in chain(own, (each for each in self._units if each not in held), self._units):
            waiting = self._units[network]
            for unit in waiting:
                if self._unmade.isdisjoint(self._needs[unit]):
                    waiting.remove(unit)
                    if not waiting:
                        del self._units[network]
                    return unit
        return None

    def again(self, unit: Unit) -> None:
        """``unit`` was lost with its worker; it is the next of its network."""
        self._units.setdefault(self._network[unit], deque()).appendleft(unit)

    def put_off(self, unit: Unit) -> None:
        """Another run is at ``unit``; it waits until it is called :meth:`back`."""
        self._later.append(unit)

    def back(self) -> None:
        """What was put off waits like all others again."""
        for unit in self._later:
            self._units.setdefault(self._network[unit], deque()).append(unit)
        self._later.clear()

    def settle(self, key: str) -> None:
        """What is called ``key`` has been made, or cannot be."""
        self._unmade.discard(key)
