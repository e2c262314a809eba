"""Parry: robustness evaluation for models, data and services that defend themselves.

What the author of an attack or a defense imports:

    bench.registry    the decorators ``@attacks("name")``, ``@defenses("name")``, and ``added`` for later parameters
    bench.protocols   the signatures that components follow
    bench.errors      ``ConfigError`` and its kin: one line for the user
    bench.spec        names of components with arguments, in one string
    bench.threat      norm, radius, access, budget
    bench.oracle      what an attack asks; its views for foreign attacks
    bench.rules       what it asks the referee to do otherwise
    bench.rng         random numbers that belong to a sample
    bench.norms       distances, projections, steepest directions
    bench.losses      per-sample losses on logits
    bench.ascent      gradient ascent in a ball, for what trains
    bench.metrics     calibration of logits
    bench.dataset     images and labels
    bench.ranges      which numbers a parameter may be
    bench.training    the one training loop
    bench.protection  which training images a data defense protects
    bench.models      networks by name
    bench.numerics    what a network computes in
    bench.service     a service as the victim, such as a function of one's own
    bench.system      libraries that may be missing (``bench.system.extras``)

The other rooms are what happens to components: ``data``, ``plan``, ``measure``, ``results``, ``tracks``, ``report``,
``release``, ``run`` and ``cli``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported (see bench/system/threads.py)

__version__ = "0.1.0"
