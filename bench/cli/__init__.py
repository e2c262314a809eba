"""The command line: one file for each command, arguments in, tables out."""

import sys
from typing import Annotated

import typer

from bench.cli import (
    check,
    compare,
    curves,
    leaderboard,
    ls,
    merge,
    new,
    plot,
    protect,
    records,
    run,
    site,
    submit,
    validate,
    verify,
    version,
)
from bench.cli.console import complain, say_stopped, warn
from bench.cli.terminal import abandon_output, is_of_output, speak_plainly
from bench.errors import BenchError, ConfigError
from bench.registry import load_plugins
from bench.system.interrupt import Stopped, stoppable

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # the name under which typer has it differs by version

app = typer.Typer(
    help="Parry: robustness evaluation for models, data and services that defend themselves.",
    pretty_exceptions_enable=False, rich_markup_mode="markdown",
)  # fmt: skip
for command in (
    run.run, leaderboard.leaderboard, compare.compare, curves.curves, new.new, check.check, submit.submit,
    validate.validate, verify.verify, merge.merge, plot.plot, site.site,
    records.records, protect.protect, ls.ls, version.version,
):  # fmt: skip
    app.command()(command)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        version.version()
    elif context.invoked_subcommand is None:
        print(context.get_help(), end="")


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, never a traceback."""
    speak_plainly()
    try:
        with stoppable():
            for problem in load_plugins():
                warn(problem)
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
