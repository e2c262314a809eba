"""Which executor does a run, from what the user has said."""

from collections.abc import Sequence
from itertools import cycle, islice

import torch

from bench.errors import ConfigError
from bench.run.executor import Executor, Local
from bench.run.processes import Processes
from bench.system.threads import asked_threads, idle_processors

EXECUTORS = ("local", "processes")


def choose(
    name: str | None, devices: Sequence[torch.device], workers: int | None, unit_timeout: float | None
) -> Executor:
    """The executor ``name``; without one, this process, or processes where there are several devices or workers.

    Raises:
        ConfigError: no such executor, or one that cannot do what else is asked for.
    """
    name = name or ("processes" if workers or unit_timeout or len(devices) > 1 else "local")
    if name == "local":
        if len(devices) > 1 or workers not in (None, 1) or unit_timeout:
            raise ConfigError(
                "this process works on one device, by itself, and cannot end a unit that hangs; "
                "use --executor processes, or leave --workers, --unit-timeout and further devices out"
            )
        return Local()
    if name == "processes":
        usual = idle_processors() if devices[0].type == "cpu" else len(devices)
        places = tuple(islice(cycle(devices), max(workers or usual, 1)))
        spare = 1 if devices[0].type == "cpu" else max(1, idle_processors() // len(places))
        return Processes(places, asked_threads() or spare)
    raise ConfigError(f"no executor is named {name!r}; use {', '.join(EXECUTORS)}")
