"""``tailorstore tag``: fixed names of commits."""

import click

from tailorstore.cli.commands.references import only_one, print_references, warn_of_unread
from tailorstore.cli.output import print_json, print_line
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command


@make_command("tag", examples=["tailorstore tag", "tailorstore tag best 1200", "tailorstore tag --delete best"])
@click.argument("name", required=False)
@click.argument("ref", required=False)
@click.option("--list", "listing", is_flag=True, help="List the tags; so does the command without arguments.")
@click.option("--delete", metavar="NAME", help="Remove a tag; its commit loses the protection.")
def command(settings: Settings, name: str | None, ref: str | None, listing: bool, delete: str | None) -> None:
    """Give a commit a fixed name, which also keeps it from gc.

    Without REF the newest commit of the branch is meant. A tag is never moved: delete it and set it anew.
    """
    only_one(name, listing, delete)
    with settings.open() as store:
        if delete is not None:
            store.delete_tag(delete)
            print_json({"deleted": delete}) if settings.json else print_line(f"Removed tag {delete}.")
        elif name is not None:
            commit = store.tag(name, ref or "latest")
            if settings.json:
                print_json({"tag": name, "commit": commit})
            else:
                print_line(f"Tag {name} is step {commit.step} on {commit.branch}, commit {commit.id}.")
        else:
            listed = store.tags()
            warn_of_unread(store)
            print_json({"tags": listed}) if settings.json else print_references(listed, "tag")
