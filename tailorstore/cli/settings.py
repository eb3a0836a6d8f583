"""What every command has in common: which store, which branch, and how to answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from tailorstore.cli.secrets import secrets_in
from tailorstore.cli.values import StorageOption, nested

if TYPE_CHECKING:
    from tailorstore.engine.store import Store

P = ParamSpec("P")
R = TypeVar("R")

STORE_VARIABLE = "TAILORSTORE_URL"
CATALOG_VARIABLE = "TAILORSTORE_CATALOG"


@dataclass(slots=True)
class Settings:
    """The common options, as given before or after the command's name, or in the environment."""

    store: str | None = field(default=None, repr=False)
    catalog: str | None = field(default=None, repr=False)
    branch: str = "main"
    storage_option: dict[str, Any] = field(default_factory=dict, repr=False)
    transport: Literal["obstore", "fsspec"] | None = None
    json: bool = False

    def secrets(self) -> tuple[str, ...]:
        """Return the texts that must not be printed."""
        return secrets_in({"store": self.store, "catalog": self.catalog}, self.storage_option)

    def url(self) -> str:
        """Return the URL of the store.

        Raises:
            click.UsageError: none was given.
        """
        if not self.store:
            msg = f"no store was named: use --store URL, or set {STORE_VARIABLE}"
            raise click.UsageError(msg)
        return self.store

    @contextmanager
    def open(self, *, create: bool = False) -> "Iterator[Store]":
        """Open the store and close it at the end; raises as ``open_store`` does."""
        url = self.url()
        # Here and not above: this imports torch, which no help text should wait for.
        from tailorstore.engine.front_door import open_store

        store = open_store(
            url,
            catalog=self.catalog,
            branch=self.branch,
            storage_options=nested(self.storage_option) or None,
            create=create,
            transport=self.transport,
        )
        with store:
            yield store


def settings_of(context: click.Context) -> Settings:
    """Return the settings that all commands of one call share."""
    root = context.find_root()
    if not isinstance(root.obj, Settings):
        root.obj = Settings()
    return root.obj


def _remember(context: click.Context, param: click.Parameter, value: Any) -> Any:  # noqa: ANN401
    """Keep a common option. What stands after the command's name is parsed later, and so has the last word."""
    name = str(param.name)
    if context.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
        settings = settings_of(context)
        if name == "storage_option":
            settings.storage_option |= dict(value)
        else:
            setattr(settings, name, value)
    return value


def common_options(*, environment: bool) -> list[click.Option]:
    """Return the common options; those of the group also look into the environment."""

    def option(*names: str, variable: str | None = None, text: str, **more: Any) -> click.Option:  # noqa: ANN401
        return click.Option(
            names,
            help=text + (f"  [env: {variable}]" if variable else ""),
            envvar=variable if environment else None,
            expose_value=False,
            callback=_remember,
            **more,
        )

    return [
        option(
            "--store",
            variable=STORE_VARIABLE,
            metavar="URL",
            text="Root of the store: a directory, s3://bucket/prefix, gs://…, or any fsspec URL.",
        ),
        option(
            "--catalog",
            variable=CATALOG_VARIABLE,
            metavar="URL",
            text="Catalog: sqlite:///path.db or postgresql://user@host/database. Default: a SQLite file inside a"
            " local root; for a remote root, one in your data directory.",
        ),
        option("--branch", metavar="NAME", text="Branch that steps and 'latest' are about.  [default: main]"),
        option(
            "--storage-option",
            type=StorageOption(),
            multiple=True,
            text="Option for the storage, in the words of its fsspec filesystem; may be repeated. Keys and tokens are"
            " better left to the environment (AWS_…), where other users cannot see them.",
        ),
        option(
            "--transport",
            type=click.Choice(["obstore", "fsspec"]),
            text="How to speak to the storage. Default: the faster that can.",
        ),
        option("--json", is_flag=True, text="Print one JSON document instead of tables, errors included."),
    ]


class StoreCommand(click.Command):
    """A command that also takes the common options, and shows examples in its help."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:  # noqa: ANN401
        """Take what ``click.Command`` takes.

        Args:
            *args: see ``click.Command``.
            examples: lines of shell that show how the command is used.
            **kwargs: see ``click.Command``.
        """
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.own = tuple(self.params)
        self.params += common_options(environment=False)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options apart from those that all commands have."""
        own = [record for param in self.own if (record := param.get_help_record(ctx))]
        if own:
            with formatter.section("Options"):
                formatter.write_dl(own)
        shared = [param for param in self.get_params(ctx) if param not in self.own]
        with formatter.section("Options of all commands"):
            formatter.write_dl([record for param in shared if (record := param.get_help_record(ctx))])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        super().format_epilog(ctx, formatter)
        write_examples(formatter, self.examples)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write lines of shell as they are: folded, they could not be copied."""
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def command(
    name: str, *, examples: Sequence[str] = ()
) -> Callable[[Callable[Concatenate[Settings, P], R]], StoreCommand]:
    """Make a command of a function that takes the settings and its own parameters."""

    def decorate(function: Callable[Concatenate[Settings, P], R]) -> StoreCommand:
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(settings_of(click.get_current_context()), *args, **kwargs)

        run.__doc__ = function.__doc__
        # Options that were declared below this decorator.
        if params := getattr(function, "__click_params__", None):
            run.__click_params__ = params  # type: ignore[attr-defined]
        return click.command(name, cls=StoreCommand, examples=examples)(run)

    return decorate


def first_line(group: Mapping[str, click.Command], name: str) -> str:
    """Return the line that says what a command does."""
    return group[name].get_short_help_str(limit=90)
