"""Whether a component keeps the contract: every rule asked on tiny data, in seconds and without a download."""

from bench.check import attack, certifier, data, elsewhere, model, output, service, trainer
from bench.check.common import says_what_it_is
from bench.check.subject import Kind, Subject, subject
from bench.check.verdict import Broken, Rules, Verdict, judge
from bench.errors import ConfigError
from bench.registry import load_plugins
from bench.spec import Spec
from bench.system.user_code import named_file

__all__ = ["RULES", "Broken", "Subject", "Verdict", "check", "subject"]

RULES: dict[Kind, Rules[Subject]] = {
    "attack": attack.RULES, "certifier": certifier.RULES, "learner": trainer.RULES, "training defense": trainer.RULES,
    "data defense": data.RULES, "output defense": output.RULES, "model": model.RULES, "service": service.RULES,
}  # fmt: skip

MORE: dict[Kind, Rules[Subject]] = {"attack": {"time of a query": attack.costs}, "output defense": output.MORE}
TRIALS: dict[Kind, elsewhere.Trial] = {
    "attack": attack.trial, "certifier": certifier.trial, "learner": trainer.trial, "training defense": trainer.trial,
    "data defense": data.trial, "output defense": output.trial, "model": model.trial, "service": service.trial,
}  # fmt: skip


def check(spec: Spec | str, *, processes: bool = True) -> list[Verdict]:
    """What every rule says of the attack, defense or model that ``spec`` names, in under a minute.

    Args:
        spec: ``path/to/file.py:Name`` or a registered name, with arguments or without.
        processes: also ask in another process, which takes seconds to start.

    Raises:
        ConfigError: there is no such name or file.
    """
    load_plugins()
    spec = Spec.parse(spec) if isinstance(spec, str) else spec
    try:
        found = subject(spec)
    except ConfigError as error:
        named = named_file(spec.name)
        if named is None or not named[1] or not named[0].is_file():
            raise
        saw, _, fix = str(error).rpartition("; ")
        return [Verdict("declarations", "FAIL", saw or fix, fix if saw else f"mend {named[0]}")]
    return [judge(name, rule, found, found.file) for name, rule in _rules(found).items()] + (
        [judge("another process", elsewhere.rule(TRIALS[found.kind]), found, found.file, elsewhere.SECONDS)]
        if processes
        else []
    )


def _rules(found: Subject) -> Rules[Subject]:
    """What is asked of ``found``: the rules of its kind, and what belongs to the machine or to people's judgement."""
    return {"declarations": says_what_it_is, **RULES[found.kind], **MORE.get(found.kind, {})}
