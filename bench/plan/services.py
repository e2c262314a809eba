"""What can be asked of a service, decided before anything is."""

from bench.errors import ConfigError
from bench.protocols import AtOutput, Attack, FittedDefense
from bench.rules import rules_of
from bench.service import Service


def check_service(service: Service, defense: AtOutput | None, attack: Attack, quantise: bool) -> None:
    """Whether ``attack`` can do with what ``service`` tells, and whether the output ``defense`` can stand around it.

    Raises:
        ConfigError: it cannot.
    """
    if attack.access == "gradients":
        raise ConfigError("a service shows no gradients; choose attacks that ask for scores or labels")
    if rules_of(attack).surrogate and not getattr(attack, "sources", ()):
        raise ConfigError(
            "this attack works on the weights of the model, and a service shows none; name networks of your own with "
            "from=..., or another attack"
        )
    if attack.access == "scores":
        _check_scores(service, attack)
    if service.images == "uint8" and not quantise:
        raise ConfigError("the service takes 8-bit images; add --quantise, so that what is measured is what was asked")
    varies = service.random or service.stateful or service.batch_dependent
    if isinstance(defense, FittedDefense):
        raise ConfigError("this output defense is trained on a network of its own, and a service is none; use another")
    if defense is not None and (not service.tells_all or service.decimals is not None or varies):
        raise ConfigError(
            "an output defense works on the scores of all classes, not rounded and always the same, which this "
            "service does not give; use none"
        )


def _check_scores(service: Service, attack: Attack) -> None:
    if not service.tells_scores:
        told = "labels" if service.answers == "labels" else "one class of each image"
        raise ConfigError(f"this attack asks for scores, and the service tells only {told}; use rays or hop-skip-jump")
    if service.top and not getattr(attack, "top_scores", False):
        raise ConfigError(
            f"the service tells the {service.top} best classes, and this attack does not declare top_scores = True, "
            "that it does with those; use square, or attacks that see labels"
        )
    if service.decimals is not None and getattr(attack, "fine_scores", False):
        raise ConfigError(
            f"the service rounds to {service.decimals} decimals, and this attack compares answers that lie closer; "
            "use square, or attacks that see labels"
        )
