"""Tags and branches: changed in the catalog first, which may refuse, then recorded in the root."""

from collections.abc import Callable
from typing import Literal

from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.names import check_name, new_id
from tailorstore.domain.records import Commit, RefRecord
from tailorstore.engine.publish import check_binding
from tailorstore.engine.session import Session
from tailorstore.storage.manifests import write_ref_record


def tag(session: Session, name: str, commit: Commit) -> None:
    """Name a commit for good; see ``Store.tag``."""
    check_name("tag", name)
    _point(session, "tag", name, commit.id, lambda: session.catalog.tag(name, commit.id))


def delete_tag(session: Session, name: str) -> None:
    """Remove a tag; see ``Store.delete_tag``."""
    _point(session, "tag", name, None, lambda: session.catalog.untag(name))


def branch(session: Session, name: str, commit: Commit, *, move: bool) -> None:
    """Start or move a branch; see ``Store.branch``."""
    check_name("branch", name)
    _point(session, "branch", name, commit.id, lambda: session.catalog.branch(name, commit.id, move=move))


def delete_branch(session: Session, name: str) -> None:
    """Remove a branch; see ``Store.delete_branch``."""
    if [known.name for known in session.catalog.branches()] == [name]:
        msg = f"branch {name!r} is the only one: without it every commit would be on no branch; make another first"
        raise InvalidInputError(msg)
    _point(session, "branch", name, None, lambda: session.catalog.delete_branch(name))


def _point(
    session: Session, kind: Literal["tag", "branch"], name: str, commit_id: str | None, change: Callable[[], object]
) -> None:
    # Should the process die between the two, only a rebuild could tell.
    check_binding(session.objects, session.binding)
    change()
    write_ref_record(session.objects, RefRecord(new_id(), kind, name, commit_id, session.catalog.now()))
