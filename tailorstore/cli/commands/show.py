"""``tailorstore show``: one commit, and where each layer of its composite comes from."""

from collections.abc import Mapping, Sequence

import click

from tailorstore.cli.output import (
    Column,
    ago,
    count,
    metrics,
    print_details,
    print_heading,
    print_json,
    print_line,
    print_table,
    share,
    size,
)
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.domain.condition import LayerCondition
from tailorstore.domain.names import natural
from tailorstore.domain.records import Commit, LayerInfo

COLUMNS = (
    Column("layer", style="cyan"),
    Column("from step", right=True, style="bold"),
    Column("stale by", right=True),
    Column("fidelity", spare=True),
    Column("error", right=True, spare=True),
    Column("damage", right=True, spare=True),
    Column("size", right=True),
    Column("stored", right=True, spare=True),
    Column("versions", right=True, spare=True),
)


def rows(layers: Sequence[LayerInfo], conditions: Mapping[str, LayerCondition] | None = None) -> list[list[str]]:
    """Return the rows of a table of layers."""
    damages = {name: condition.damage for name, condition in (conditions or {}).items()}
    return [
        [
            layer.name,
            str(layer.source_step),
            str(layer.staleness),
            layer.fidelity if layer.base_step is None else f"light on {layer.base_step}",
            "" if layer.error is None else f"{layer.error:.2%}",
            "" if not damages.get(layer.name) else f"{damages[layer.name]:.1e}",
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
    takes in storage, and how many versions of it the store holds. For a light version also the step of the full
    version that it is a difference to, and the relative error of its weights; for whatever is not exactly what the
    model was at the commit, the estimated damage of that: second moment times squared difference, summed.
    """
    with settings.open() as store:
        commit = store.show(ref)
        layers = store.layers(commit.id)
        with store.checkout(commit) as checkpoint:
            conditions = checkpoint.conditions
        branches = [branch.name for branch in store.branches() if branch.commit == commit.id]
        tags = [tag.name for tag in store.tags() if tag.commit == commit.id]
    if settings.json:
        print_json({"commit": commit, "branches": branches, "tags": tags, "layers": layers, "conditions": conditions})
        return
    print_details(details(commit, branches, tags))
    print_line()
    print_table(COLUMNS, rows(layers, conditions))
    quarantined = [layer for layer in layers if layer.quarantined is not None]
    if quarantined:
        print_heading("In quarantine")
        for layer in quarantined:
            print_line(f"{layer.name} of step {layer.source_step}: {layer.quarantined}")
