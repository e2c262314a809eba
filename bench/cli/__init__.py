"""The command line: one file for each command, arguments in, tables out."""

import sys

import typer

from bench.cli import compare, leaderboard, ls, protect, run, version
from bench.cli.console import complain, say_stopped
from bench.errors import BenchError
from bench.interrupt import Stopped, stoppable
from bench.registry import load_plugins

app = typer.Typer(
    help="Parry: robustness evaluation for models, data and services that defend themselves.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
)  # fmt: skip
for command in (run.run, leaderboard.leaderboard, compare.compare, protect.protect, ls.ls, version.version):
    app.command()(command)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, never a traceback."""
    try:
        with stoppable():
            load_plugins()
            app()
    except BenchError as error:
        complain(error)
        sys.exit(2)
    except Stopped as stop:
        say_stopped("stopped")
        sys.exit(stop.exit_code)
