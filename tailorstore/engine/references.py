"""Tags and branches: changed in the catalog first, which may refuse, then recorded in the root.

Should the process die between the two, only a rebuild could tell. A record has the time of the transaction, so that
records of changes that met are in the order in which the catalog made them, whoever writes them first.
"""

from datetime import datetime
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
    check_binding(session.objects, session.binding)
    made = session.catalog.tag(name, commit.id)
    _record(session, new_id(), "tag", name, commit.id, made.created_at)


def delete_tag(session: Session, name: str) -> None:
    """Remove a tag; see ``Store.delete_tag``."""
    check_binding(session.objects, session.binding)
    _record(session, new_id(), "tag", name, None, session.catalog.untag(name))


def branch(session: Session, name: str, commit: Commit, *, move: bool) -> None:
    """Start or move a branch; see ``Store.branch``."""
    check_name("branch", name)
    check_binding(session.objects, session.binding)
    # A line is named by what began it, so that a rebuild knows it again.
    record_id = new_id()
    when = session.catalog.branch(name, commit.id, move=move, line=record_id)
    # None where the branch pointed there already, and no line began.
    if when is not None:
        _record(session, record_id, "branch", name, commit.id, when)


def delete_branch(session: Session, name: str) -> None:
    """Remove a branch; see ``Store.delete_branch``."""
    if [known.name for known in session.catalog.branches()] == [name]:
        msg = f"branch {name!r} is the only one: without it every commit would be on no branch; make another first"
        raise InvalidInputError(msg)
    check_binding(session.objects, session.binding)
    _record(session, new_id(), "branch", name, None, session.catalog.delete_branch(name))


def _record(
    session: Session,
    record_id: str,
    kind: Literal["tag", "branch"],
    name: str,
    commit_id: str | None,
    when: datetime,
) -> None:
    write_ref_record(session.objects, RefRecord(record_id, kind, name, commit_id, when))
    # Whoever took the root over before this was on record may have read the records without it.
    check_binding(session.objects, session.binding)
