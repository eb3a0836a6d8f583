"""``tailorstore stats``: counts and sizes."""

from tailorstore.cli.output import count, plain, print_details, print_json, share, size
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command


@make_command("stats", examples=["tailorstore stats", "tailorstore stats --json"])
def command(settings: Settings) -> None:
    """Count commits, layers and bytes.

    Compares the bytes with what full saves would take. From the catalog alone: it is
    'tailorstore verify' that looks at the objects.
    """
    with settings.open() as store:
        found, url, catalog, writable = store.stats(), store.url, store.catalog_url, store.writable
    if settings.json:
        print_json({"store": url, "catalog": catalog, "writable": writable, **plain(found)})
        return
    waiting = f"{size(found.bytes_doomed)} in {count(found.versions_doomed, 'layer version')}"
    print_details(
        [
            ("store", url),
            ("catalog", catalog if writable else f"{catalog} (reads only; another one owns the root)"),
            ("commits", f"{found.commits:,}"),
            ("branches", f"{found.branches:,}"),
            ("tags", f"{found.tags:,}"),
            ("layers", f"{found.layers:,}"),
            ("versions", f"{found.versions:,}"),
            ("stored", f"{size(found.bytes_stored)}, {share(found.bytes_stored, found.bytes_logical)} of full saves"),
            ("full saves", size(found.bytes_logical)),
            ("to be swept", waiting if found.versions_doomed else "nothing"),
            ("leases", f"{found.leases:,}"),
        ]
    )
