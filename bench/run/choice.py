"""Which executor does a run, from what the user has said."""

from collections.abc import Sequence
from itertools import cycle, islice

import torch

from bench.errors import ConfigError
from bench.run.executor import Executor, Local
from bench.run.on_ray import OnRay
from bench.run.processes import Processes
from bench.system.threads import asked_threads, idle_processors

EXECUTORS = ("local", "processes", "ray")


def choose(
    name: str | None,
    devices: Sequence[torch.device],
    workers: int | None,
    unit_timeout: float | None,
    address: str | None = None,
) -> Executor:
    """The executor ``name``; without one, this process, or processes where there are several devices or workers.

    Ray works in the cluster at ``address``, or in one of this machine.

    Raises:
        ConfigError: no such executor, or one that cannot do what else is asked for.
    """
    name = name or ("processes" if workers or unit_timeout or len(devices) > 1 else "local")
    if address and name != "ray":
        raise ConfigError(f"--address {address} is where a Ray cluster is; use --executor ray, or leave it out")
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
    if name == "ray":
        if len(devices) > 1 or devices[0].index:
            raise ConfigError("Ray gives each worker a GPU by itself; use --device cuda, and --workers for how many")
        if not address and not workers and devices[0].type == "cpu":
            workers = idle_processors()
        return OnRay(address, workers, devices[0].type, asked_threads() or 1)
    raise ConfigError(f"no executor is named {name!r}; use {', '.join(EXECUTORS)}")
