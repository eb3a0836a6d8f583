"""``tailorstore init``: make a store."""

from tailorstore.cli.output import print_details, print_json
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.domain.errors import StoreNotFoundError


@make_command(
    "init",
    examples=[
        "tailorstore init --store ./run",
        "tailorstore init --store s3://bucket/run --catalog postgresql://team@db/checkpoints",
    ],
)
def command(settings: Settings) -> None:
    """Make a store, or say what is there already.

    Training code need not wait for it: open_store() makes the store too. It is a way to find out, before a long
    training run, whether root and catalog can be reached and written.
    """
    try:
        with settings.open() as store:
            made, url, catalog, writable = False, store.url, store.catalog_url, store.writable
            owned = store.owned
    except StoreNotFoundError:
        with settings.open(create=True) as store:
            made, url, catalog, writable = True, store.url, store.catalog_url, store.writable
            owned = store.owned
    if settings.json:
        print_json({"store": url, "catalog": catalog, "created": made, "writable": writable})
        return
    state = "made" if made else "was there already; nothing was changed"
    if writable:
        rights = "yes"
    elif owned:
        rights = "no: you may only read it"
    else:
        rights = "no: another catalog owns it ('tailorstore rebuild' takes it over)"
    print_details([("store", url), ("catalog", catalog), ("state", state), ("writable", rights)])
