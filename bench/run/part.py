"""A fixed part of a run's units, for arrays of jobs and people with several machines."""

from dataclasses import dataclass

from bench.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """The ``number``-th of ``of`` parts. Units, the shards of all cells in order, are dealt to them like cards."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read ``3/10``.

        Raises:
            ConfigError: it is no such pair, or there is no such part.
        """
        number, _, of = text.partition("/")
        if not (number.isascii() and number.isdigit() and of.isascii() and of.isdigit()):
            raise ConfigError(f"part {text!r} is not K/N; the third of ten is 3/10")
        part = cls(int(number), int(of))
        if not 1 <= part.number <= part.of:
            raise ConfigError(f"there is no part {text}; parts of {part.of} are 1/{part.of} to {part.of}/{part.of}")
        return part

    def has(self, unit: int) -> bool:
        """Whether the ``unit``-th unit (0, 1, ...) belongs to it."""
        return unit % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


WHOLE = Part(1, 1)
