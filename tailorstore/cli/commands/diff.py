"""``tailorstore diff``: compare two commits."""

import click

from tailorstore.cli.output import Column, count, print_json, print_line, print_table, size
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.domain.names import natural

_COLUMNS = (
    Column("layer", style="cyan"),
    Column("change"),
    Column("step in A", right=True),
    Column("step in B", right=True),
    Column("size", right=True, spare=True),
)


@make_command(
    "diff",
    examples=["tailorstore diff 1000 1200", "tailorstore diff main warmup", "tailorstore diff best latest --all"],
)
@click.argument("a")
@click.argument("b", default="latest")
@click.option("--all", "everything", is_flag=True, help="Also list the layers that are equal.")
def command(settings: Settings, a: str, b: str, everything: bool) -> None:
    """Compare the composites of commits A and B, layer by layer.

    Contents are compared by their digests: no tensor is read, and layers from different steps can be equal.
    """
    with settings.open() as store:
        found = store.diff(a, b)
    if settings.json:
        print_json({"a": found.a, "b": found.b, "layers": found.entries})
        return
    print_line(f"A  step {found.a.step} on {found.a.branch}, commit {found.a.id}")
    print_line(f"B  step {found.b.step} on {found.b.branch}, commit {found.b.id}")
    entries = sorted(found.entries, key=lambda entry: natural(entry.layer))
    listed = [entry for entry in entries if everything or entry.change != "same"]
    if listed:
        print_line()
        steps = [tuple("-" if step is None else str(step) for step in (entry.step_a, entry.step_b)) for entry in listed]
        print_table(
            _COLUMNS,
            [
                [entry.layer, entry.change, step_a, step_b, size(entry.bytes_logical)]
                for entry, (step_a, step_b) in zip(listed, steps, strict=True)
            ],
        )
    print_line()
    print_line(f"{len(found.changed)} of {count(len(found.entries), 'layer')} differ.")
