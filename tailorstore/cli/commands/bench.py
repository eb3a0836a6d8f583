"""``tailorstore bench``: measure on this machine and, if asked, on one's own storage."""

import click

from tailorstore.cli.output import print_json, print_note
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.cli.values import nested


@make_command(
    "bench", examples=["tailorstore bench", "tailorstore bench --store s3://bucket/somewhere --gigabytes 0.5 --json"]
)
@click.option(
    "--gigabytes",
    type=click.FloatRange(min=0, min_open=True),
    help="Size of the training state.  [default: 1.6 here, 0.5 with --store]",
)
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Runs; medians are shown.")
def command(settings: Settings, gigabytes: float | None, repeat: int) -> None:
    """Measure commits and restores.

    Without --store in memory, beside torch.save, safetensors and torch.distributed.checkpoint. With --store below
    that URL, in a folder of its own that is removed afterwards; on S3 beside bare requests for the same objects.
    """
    if gigabytes is None:
        gigabytes = 0.5 if settings.store else 1.6
    from tailorstore.bench import local, remote
    from tailorstore.bench.report import machine, show

    if settings.store:
        where = "your storage"
        rows = remote.measure(
            settings.store,
            nested(settings.storage_option) or None,
            gigabytes=gigabytes,
            repeat=repeat,
            say=print_note,
            transport=settings.transport,
        )
    else:
        where = "in memory"
        rows = local.measure(local.default_folder(), gigabytes=gigabytes, repeat=repeat, say=print_note)
    if settings.json:
        print_json({"machine": machine(), "rows": [row.as_json() for row in rows]})
    else:
        show(rows, f"{where}: {machine()}")
