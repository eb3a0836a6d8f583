"""The entry point: the group of commands, and what happens to errors."""

import json as json_module
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from tailorstore import __version__
from tailorstore.cli.errors import (
    EXIT_CODES,
    INTERRUPTED,
    PIPE_CLOSED,
    TERMINATED,
    UNEXPECTED,
    error_kind,
    exit_code,
)
from tailorstore.cli.output import print_error, shown
from tailorstore.cli.secrets import scrub
from tailorstore.cli.settings import Settings, common_options, first_line, settings_of, write_examples
from tailorstore.domain.errors import TailorError

SECTIONS = (
    ("Begin", ("init", "demo", "bench", "study")),
    ("Look", ("log", "show", "diff", "checkout", "heatmap", "stats", "strategies")),
    ("Name", ("tag", "branch")),
    ("Keep in order", ("gc", "verify", "scrub", "rebuild", "upgrade")),
)
"""All commands, as the help lists them."""

DEBUG_VARIABLE = "TAILORSTORE_DEBUG"


class CommandGroup(click.Group):
    """Imports a command when it is asked for, and turns errors into messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        del ctx
        return [name for _, names in SECTIONS for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        found = import_module(f"tailorstore.cli.commands.{cmd_name}").command
        return found if isinstance(found, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by what they are for."""
        commands: MutableMapping[str, click.Command] = {}
        for name in self.list_commands(ctx):
            if (found := self.get_command(ctx, name)) is not None:
                commands[name] = found
        for title, names in SECTIONS:
            with formatter.section(title):
                formatter.write_dl([(f"{name:<10}", first_line(commands, name)) for name in names])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples and exit codes."""
        del ctx
        write_examples(
            formatter,
            (
                "tailorstore demo                           see it at work, in a minute and a half",
                "tailorstore init --store s3://bucket/run   make a store",
                "export TAILORSTORE_URL=s3://bucket/run     from here on no --store is needed",
                "tailorstore log                            what has been committed",
                "tailorstore checkout 1200 --to model.safetensors",
                "tailorstore gc --keep-last 10 --keep-best loss:3 --dry-run",
            ),
        )
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES])

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        """Run the command; whoever reads its output may stop reading."""
        _log_to_stderr(settings_of(ctx))
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # What is left in the buffer is written at exit, and would fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(PIPE_CLOSED) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Parse, run and exit with the code that fits; every error becomes one message."""
        typed = list(sys.argv[1:] if args is None else args)
        settings = Settings()

        def run() -> Any:  # noqa: ANN401
            return super(CommandGroup, self).main(
                typed, prog_name, complete_var, standalone_mode=False, obj=settings, **extra
            )

        if not standalone_mode:
            return run()
        with _leaving_cleanly():
            code = _report(run, settings, typed)
        sys.exit(code)


@contextmanager
def _leaving_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind what runs, as Ctrl-C does: leases are given back, and halves of files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(run: Callable[[], Any], settings: Settings, typed: Sequence[str]) -> int:
    """Run; print what went wrong, and return the exit code."""
    try:
        code = run()
    except click.Abort:
        return _end(INTERRUPTED, "Interrupted.", settings, typed)
    except SystemExit as leaving:
        if leaving.code != TERMINATED:
            raise
        return _end(TERMINATED, "Terminated.", settings, typed)
    except (click.ClickException, TailorError) as error:
        _print_error(error, settings, typed)
        return exit_code(error)
    except Exception as error:
        # A person gets a message, not a traceback, unless asked for.
        if os.environ.get(DEBUG_VARIABLE):
            raise
        _print_error(error, settings, typed)
        return UNEXPECTED
    return code if isinstance(code, int) else 0


def _end(code: int, message: str, settings: Settings, typed: Sequence[str]) -> int:
    """Print that a signal ended the command; return the exit code."""
    if settings.json or "--json" in typed:
        kind = message.rstrip(".").lower()
        click.echo(json_module.dumps({"error": kind, "message": message}, indent=2))
    else:
        click.echo(message, err=True)
    return code


def _print_error(error: Exception, settings: Settings, typed: Sequence[str]) -> None:
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    if exit_code(error) == UNEXPECTED:
        message = f"{type(error).__name__}: {message} (set {DEBUG_VARIABLE}=1 for the traceback)"
    message = scrub(message, settings.secrets())
    # Whatever could not be parsed, an option that was typed shows what the caller expects.
    if settings.json or "--json" in typed:
        click.echo(json_module.dumps({"error": error_kind(error), "message": message}, indent=2))
        return
    if isinstance(error, click.UsageError) and error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
        click.echo(f"Try '{error.ctx.command_path} --help' for help.\n", err=True)
    print_error(message)


class _StderrHandler(logging.Handler):
    """Writes what the library logs to stderr, without secrets."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(logging.WARNING)
        self._settings = settings

    def emit(self, record: logging.LogRecord) -> None:
        text = scrub(record.getMessage(), self._settings.secrets())
        click.echo(f"{record.levelname.capitalize()}: {shown(text)}", err=True)


def _log_to_stderr(settings: Settings) -> None:
    logger = logging.getLogger("tailorstore")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _StderrHandler)]
    logger.addHandler(_StderrHandler(settings))


@click.group(
    cls=CommandGroup,
    params=list(common_options(environment=True)),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="tailorstore")
def cli() -> None:
    """Checkpoints of training runs, stored layer by layer.

    A commit writes some layers of a model and its optimizer at a step. Every commit can be checked out as a
    complete checkpoint, its layers each from the newest step at which they were written; nothing is copied for it.

    REF names a commit: a step (1200), latest, a branch, branch@step, a tag, a commit id or its beginning.

    With --json a command prints exactly one JSON document on stdout; if it fails, {"error": KIND, "message": TEXT}.
    Without it, errors and progress go to stderr.
    """


def main() -> None:
    """Run the command line: the console script ``tailorstore``."""
    cli(prog_name="tailorstore")


if __name__ == "__main__":
    main()
