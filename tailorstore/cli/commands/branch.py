"""``tailorstore branch``: moving names of lines of commits."""

import click

from tailorstore.cli.commands.references import only_one, print_references, warn_of_unread
from tailorstore.cli.output import print_json, print_line
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command


@make_command(
    "branch",
    examples=[
        "tailorstore branch",
        'tailorstore branch retry 1200           train on from step 1200 with open_store(…, branch="retry")',
        "tailorstore branch main 1200 --move     take main back to step 1200",
    ],
)
@click.argument("name", required=False)
@click.argument("ref", required=False)
@click.option("--move", is_flag=True, help="Move a branch that exists; the commits after it go at the next gc.")
@click.option("--list", "listing", is_flag=True, help="List the branches; so does the command without arguments.")
@click.option("--delete", metavar="NAME", help="Remove a branch; commits that nothing else reaches go at the next gc.")
def command(
    settings: Settings, name: str | None, ref: str | None, move: bool, listing: bool, delete: str | None
) -> None:
    """Start a branch at a commit. Both lines share the layers up to there.

    Without REF the newest commit of the current branch (--branch) is meant.
    """
    only_one(name, listing, delete)
    if move and name is None:
        msg = "--move goes with NAME and REF"
        raise click.UsageError(msg)
    with settings.open() as store:
        if delete is not None:
            store.delete_branch(delete)
            print_json({"deleted": delete}) if settings.json else print_line(f"Removed branch {delete}.")
        elif name is not None:
            commit = store.branch(name, ref or "latest", move=move)
            if settings.json:
                print_json({"branch": name, "commit": commit})
            else:
                print_line(f"Branch {name} stands at step {commit.step}, commit {commit.id}.")
        else:
            listed = store.branches()
            warn_of_unread(store)
            print_json({"branches": listed}) if settings.json else print_references(listed, "branch")
