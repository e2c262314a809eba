"""Rules that every component keeps, whatever it does."""

import inspect
from typing import Any

from bench.check.subject import Subject
from bench.check.verdict import require


def says_what_it_is(subject: Subject) -> str:
    """Its version, paper and a docstring of its own; the registry has looked at all else that it declares."""
    component: Any = subject.component
    if subject.kind == "service":
        return "a service, which is asked and shows no weights"
    if subject.kind == "model":
        return f"a model, {'with weights' if component.trained else 'to be trained'}"
    version, paper = getattr(component, "version", None), getattr(component, "paper", None)
    require(isinstance(version, int) and version >= 1, f"version is {version!r}",
            "write version: ClassVar = 1, and raise it whenever results change")  # fmt: skip
    require(paper, "paper is not declared or empty", 'write paper: ClassVar = "ours", or who, when and where')
    kind = type(component)
    about = (inspect.getdoc(kind) or "").strip()
    require(about and not about.startswith(f"{kind.__name__}("), "no docstring",
            f"say below class {kind.__name__} in a sentence what it does; bench ls prints it")  # fmt: skip
    article = "an" if subject.kind[0] in "ao" else "a"
    return f"{article} {subject.kind}, version {version}, paper {paper}"
