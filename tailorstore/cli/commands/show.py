"""``tailorstore show``: one commit, and where each layer of its composite comes from."""

from collections.abc import Sequence

import click

from tailorstore.cli.output import (
    Column,
    ago,
    count,
    metrics,
    print_details,
    print_json,
    print_line,
    print_table,
    share,
    size,
)
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.domain.names import natural
from tailorstore.domain.records import Commit, LayerInfo

COLUMNS = (
    Column("layer", style="cyan"),
    Column("from step", right=True, style="bold"),
    Column("stale by", right=True),
    Column("fidelity", spare=True),
    Column("size", right=True),
    Column("stored", right=True, spare=True),
    Column("versions", right=True, spare=True),
)


def rows(layers: Sequence[LayerInfo]) -> list[list[str]]:
    """Return the rows of a table of layers."""
    return [
        [
            layer.name,
            str(layer.source_step),
            str(layer.staleness),
            layer.fidelity,
            size(layer.bytes_logical),
            size(layer.bytes_stored),
            str(layer.versions),
        ]
        for layer in sorted(layers, key=lambda layer: natural(layer.name))
    ]


def details(commit: Commit, branches: Sequence[str] = (), tags: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return what there is to say of a commit, as names and values."""
    written = f"{size(commit.bytes_written)} in {count(len(commit.layers_written), 'layer')}"
    pairs = [
        ("commit", commit.id),
        ("step", str(commit.step)),
        ("branch", commit.branch),
        ("parent", commit.parent or "none: the first of its branch"),
        ("made", f"{commit.created_at:%Y-%m-%d %H:%M:%S} UTC ({ago(commit.created_at)})"),
        ("written", f"{written}, {share(commit.bytes_written, commit.bytes_logical)} of a full save"),
        ("full save", size(commit.bytes_logical)),
        ("metrics", metrics(commit.metrics)),
        ("message", commit.message or ""),
        ("newest of", ", ".join(branches)),
        ("tags", ", ".join(tags)),
    ]
    return [(name, value) for name, value in pairs if value]


@make_command("show", examples=["tailorstore show", "tailorstore show 1200 --json", "tailorstore show main@1200"])
@click.argument("ref", default="latest")
def command(settings: Settings, ref: str) -> None:
    """Show a commit and the layers of its composite.

    For each layer: the step its values come from, how many steps that is before the commit, its size, the bytes it
    takes in storage, and how many versions of it the store holds.
    """
    with settings.open() as store:
        commit = store.show(ref)
        layers = store.layers(commit.id)
        branches = [branch.name for branch in store.branches() if branch.commit == commit.id]
        tags = [tag.name for tag in store.tags() if tag.commit == commit.id]
    if settings.json:
        print_json({"commit": commit, "branches": branches, "tags": tags, "layers": layers})
        return
    print_details(details(commit, branches, tags))
    print_line()
    print_table(COLUMNS, rows(layers))
