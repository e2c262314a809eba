"""The command line: one file for each command, arguments in, tables out.

A command is imported when it is called or its arguments are asked for, so that none waits for what another needs.
"""

import ast
import importlib
import importlib.util
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from bench.catalogue import problems
from bench.cli.console import complain, say_stopped, warn
from bench.cli.terminal import abandon_output, is_of_output, speak_plainly
from bench.errors import BenchError, ConfigError
from bench.system.interrupt import Stopped, stoppable

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # the name under which typer has it differs by version
COMMANDS = (  # each a function of its name, in the module of its name
    "run", "leaderboard", "compare", "curves", "new", "check", "submit", "validate", "verify", "merge", "plot", "site",
    "records", "protect", "ls", "version",
)  # fmt: skip
STYLE: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": "markdown"}


class Commands(TyperGroup):
    """The commands by name; lists of them show what their docstrings say and import none."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=docstring(cmd_name)) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, or whose arguments are completed."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and imported(found.name or ""), rest


def docstring(name: str) -> str:
    """What the command says of itself, read from its file."""
    spec = importlib.util.find_spec(f"bench.cli.{name}")
    source = spec.loader.get_source(spec.name) if spec and spec.loader else ""  # type: ignore[attr-defined]
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return ast.get_docstring(functions[0]) or ""


def imported(name: str) -> Any:
    """The command itself."""
    single = typer.Typer(add_completion=False, **STYLE)
    single.command(name)(getattr(importlib.import_module(f"bench.cli.{name}"), name))
    return typer.main.get_command(single)


app = typer.Typer(
    cls=Commands, help="Parry: robustness evaluation for models, data and services that defend themselves.", **STYLE
)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        imported("version").callback()
    elif context.invoked_subcommand is None:
        print(context.get_help(), end="")
    else:
        for problem in problems():
            warn(problem)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, never a traceback."""
    speak_plainly()
    try:
        with stoppable():
            code = app(prog_name="bench", standalone_mode=False)
            sys.stdout.flush()
    except BenchError as error:
        complain(error)
        sys.exit(2)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        where = f"; see {context.command_path} --help" if context else ""
        complain(ConfigError(f"{error.format_message().rstrip('.')}{where}"))  # type: ignore[attr-defined]
        sys.exit(2)
    except Stopped as stop:
        say_stopped("stopped")
        sys.exit(stop.exit_code)
    except OSError as error:
        if not is_of_output(error):
            raise
        abandon_output()
        if not isinstance(error, BrokenPipeError):  # whoever read it may stop reading
            complain(BenchError(f"cannot write the output: {error.strerror}; free some space or write it elsewhere"))
        sys.exit(1)
    if code:
        sys.exit(code)
