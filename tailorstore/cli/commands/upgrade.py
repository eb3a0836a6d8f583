"""``tailorstore upgrade``: bring a catalog's schema to what this version needs."""

from tailorstore.cli.output import print_json, print_line
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command


@make_command(
    "upgrade", examples=["tailorstore upgrade --store ./run", "tailorstore upgrade --catalog postgresql://team@db/ck"]
)
def command(settings: Settings) -> None:
    """Upgrade a catalog that an older version made.

    In one transaction; older versions cannot open it afterwards. Takes --catalog, or the default catalog of --store.
    """
    from tailorstore.catalog import upgrade
    from tailorstore.catalog.urls import parse_url

    url = settings.catalog
    if url is None:
        from tailorstore.engine.opening import default_catalog
        from tailorstore.storage.urls import normalise_url, printable_url

        url = default_catalog(printable_url(normalise_url(settings.url())))
    catalog = parse_url(url).shown
    before, after = upgrade(url)
    if settings.json:
        print_json({"catalog": catalog, "before": before, "after": after})
    elif before == after:
        print_line(f"The catalog {catalog} has schema {after}, which is what this version needs.")
    elif before is None:
        print_line(f"Made a catalog with schema {after} at {catalog}.")
    else:
        print_line(f"Upgraded the catalog {catalog} from schema {before} to {after}.")
