"""``tailorstore checkout``: what a composite is made of, and its export to a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from tailorstore.cli.output import Column, count, print_json, print_line, print_table, size
from tailorstore.cli.progress import progress_bars
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.domain.names import natural

if TYPE_CHECKING:
    from tailorstore.engine.checkout import Checkpoint
    from tailorstore.engine.store import Store

Format = Literal["safetensors", "torch"]

_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

COLUMNS = (
    Column("layer", style="cyan"),
    Column("from step", right=True, style="bold"),
    Column("stale by", right=True),
    Column("fidelity", spare=True),
)


@make_command(
    "checkout",
    examples=[
        "tailorstore checkout 1200",
        "tailorstore checkout best --to model.safetensors",
        "tailorstore checkout main@1200 --to resume.pt",
        "tailorstore checkout latest --fallback --to resume.pt",
    ],
)
@click.argument("ref", default="latest")
@click.option("--to", "path", type=click.Path(path_type=Path), help="Write the composite to this file.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "torch"]),
    help="Of the file. Default: torch where its name ends in .pt, .pth, .ckpt or .bin, else safetensors.",
)
@click.option("--optim", is_flag=True, help="Also write optimizer state to safetensors; torch files always have it.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@click.option(
    "--fallback",
    is_flag=True,
    help="Read all of it first; if it is damaged, take the newest commit before that is not.",
)
def command(
    settings: Settings,
    ref: str,
    path: Path | None,
    file_format: Format | None,
    optim: bool,
    overwrite: bool,
    fallback: bool,
) -> None:
    """Show which step each layer comes from, or write all to a file.

    A torch file holds model, optimizer and extra state; torch.load() reads it, with weights_only=True where the
    extra state is plain.

    What --fallback finds damaged goes into quarantine where this catalog owns the root, so that the next commit writes
    it anew. The branch stays where it is.
    """
    if path is None and (file_format or optim or overwrite):
        msg = "--format, --optim and --overwrite go with --to PATH"
        raise click.UsageError(msg)
    with settings.open() as store, _checked_out(store, ref, fallback=fallback) as checkpoint:
        if path is None:
            _show(settings, checkpoint)
        else:
            chosen = file_format or ("torch" if path.suffix.lower() in _TORCH_SUFFIXES else "safetensors")
            _export(settings, checkpoint, path, chosen, optim=optim, overwrite=overwrite)


def _checked_out(store: "Store", ref: str, *, fallback: bool) -> "Checkpoint":
    with progress_bars() as tell:
        return store.checkout(ref, fallback=fallback, progress=tell)


def _show(settings: Settings, checkpoint: "Checkpoint") -> None:
    sources, staleness, fidelity = checkpoint.sources, checkpoint.staleness, checkpoint.fidelity
    if settings.json:
        layers = [
            {
                "layer": name,
                "source_step": step,
                "staleness": staleness[name],
                "fidelity": fidelity[name],
                "quarantined": checkpoint.quarantined.get(name),
            }
            for name, step in sources.items()
        ]
        print_json({"commit": checkpoint.commit, "fallback_from": checkpoint.fallback_from, "layers": layers})
        return
    names = sorted(sources, key=natural)
    print_table(COLUMNS, [[name, str(sources[name]), str(staleness[name]), fidelity[name]] for name in names])
    print_line()
    steps = sorted(set(sources.values()))
    made_of = count(len(sources), "layer")
    spread = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps ({steps[0]} to {steps[-1]})"
    print_line(f"The composite of step {checkpoint.step} on {checkpoint.commit.branch}: {made_of} of {spread}.")
    print_line("Write it to a file with --to PATH.")


def _export(
    settings: Settings, checkpoint: "Checkpoint", path: Path, chosen: Format, *, optim: bool, overwrite: bool
) -> None:
    with progress_bars() as tell:
        checkpoint.export(path, chosen, optim=optim, overwrite=overwrite, progress=tell)
    written_bytes = path.stat().st_size
    if settings.json:
        written = {"path": str(path), "format": chosen, "bytes": written_bytes}
        print_json({"commit": checkpoint.commit, "fallback_from": checkpoint.fallback_from, **written})
        return
    print_line(f"Wrote the composite of step {checkpoint.step} to {path} ({chosen}, {size(written_bytes)}).")
