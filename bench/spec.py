"""Component names with arguments, in one string: ``square(preset=eccv2020, p_init=0.3)``."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import ConfigError

# A name is a word, a library's entry ("torchattacks:PGD") or a file's ("path/to/file.py:Name"), which may hold spaces;
# in quotes it may hold anything.
_CALL = re.compile(
    r"""\s* (?: (?P<quote>['"]) (?P<quoted>.+?) (?P=quote) | (?P<word>[^\s()]+) | (?P<file>.+?\.py:\w+) ) \s*
    (?: \( (?P<args>.*) \) )? \s*""",
    re.DOTALL | re.VERBOSE,
)
_NEEDS_QUOTES = re.compile(r"""[\s()+'"]""")
LONGEST = 2000  # characters of a component, a path to a file of one's own among them
SHORT = 8  # characters of a number that nobody would write as a fraction


@dataclass(frozen=True)
class Spec:
    """The name of a component and the arguments that were given for it."""

    name: str
    args: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read ``name`` or ``name(key=value, ...)``; values are Python literals, a bare word is a string.

        Raises:
            ConfigError: anything else, with the text as it came.
        """
        if len(text) > LONGEST:
            raise ConfigError(f"{text[:40]!r}... has {len(text):,} characters; a name and its arguments have less")
        call = _CALL.fullmatch(text)
        if call is None:
            raise ConfigError(f"cannot read {text!r}; write name or name(key=value, key=value){_how_to_quote(text)}")
        args: dict[str, Any] = {}
        for item in _split(call["args"] or "", ","):
            key, equals, value = item.partition("=")
            if not equals or not key.strip().isidentifier() or not value.strip():
                raise ConfigError(f"cannot read {item.strip()!r} in {text!r}; write key=value{_how_to_quote(text)}")
            if key.strip() in args:
                raise ConfigError(f"{text!r} gives {key.strip()!r} twice; keep one")
            args[key.strip()] = _literal(value.strip())
        return cls(call["quoted"] or call["word"] or call["file"], args)

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={_write(value)}" for key, value in self.args.items())
        name = _in_quotes(self.name) if _NEEDS_QUOTES.search(self.name) else self.name
        return f"{name}({inside})" if inside else name


def parse_sum(text: str) -> tuple[Spec, ...]:
    """Read names with a ``+`` between them, such as ``resnet20(width=8) + cnn``; empty text gives none."""
    return tuple(Spec.parse(part) for part in _split(text, "+"))


def parse_chain(text: str) -> tuple[Spec, ...]:
    """Read a chain such as ``pgd-at(eps=0.1) + aaa-linear``; ``none`` is the empty chain."""
    specs = parse_sum(text)
    if not specs:
        raise ConfigError("an empty defense; write none for the undefended model")
    if len(specs) > 1 and any(spec.name == "none" for spec in specs):
        raise ConfigError(f"{text!r} chains none with defenses; leave none out")
    return () if specs[0].name == "none" else specs


def _how_to_quote(text: str) -> str:
    """A hint for paths that a specification cannot hold as they are."""
    if ".py" not in text:
        return ""
    return "; a path with brackets or + stands in quotes of its own: \"'my (dir)/file.py:Name'(key=value)\""


def _in_quotes(name: str) -> str:
    return f'"{name}"' if "'" in name else f"'{name}'"


def _split(text: str, separator: str) -> list[str]:
    """Cut at separators outside brackets and quotes; empty text gives no parts."""
    parts, depth, quote, start = [], 0, "", 0
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


def _literal(text: str) -> Any:
    fraction = re.fullmatch(r"([\d.]+)\s*/\s*([\d.]+)", text)  # radii are written 8/255
    if fraction:
        try:
            return float(fraction[1]) / float(fraction[2])
        except (ValueError, ZeroDivisionError):
            return text
    if text in ("true", "false"):  # as TOML writes them
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.strip("'\"")


def _write(value: Any) -> str:
    levels = value * 255 if isinstance(value, float) else 0.0
    if levels.is_integer() and 1 <= levels < 255 and len(repr(value)) > SHORT:  # 0.2 stays, though it is 51/255
        return f"{int(levels)}/255"
    bare = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and _literal(value) == value
    return value if bare else repr(value)
