"""The commits of a store, one at a time: by this process alone or by all ranks, waited for or in the background."""

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TypeVar

from tailorstore.domain.errors import TailorError
from tailorstore.domain.light import LightSettings
from tailorstore.domain.names import LayerRule
from tailorstore.domain.records import Commit, LayerDocument
from tailorstore.engine.commit import Committer, Request
from tailorstore.engine.pending import PendingCommit
from tailorstore.engine.plan import Layout
from tailorstore.engine.publish import Head, Publisher
from tailorstore.engine.ranks.commit import CollectiveCommitter
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.joining import RanksSetting, join
from tailorstore.engine.session import Session
from tailorstore.engine.tensors.measures import Gauge

Result = TypeVar("Result")

_all: "weakref.WeakSet[Commits]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # A child has none of its parent's threads: a commit under way is the parent's, and so is whoever holds the lock.
    for commits in _all:
        commits._leave_parent()  # noqa: SLF001 - the same module


os.register_at_fork(after_in_child=_after_fork_in_child)


class Commits:
    """Carries out a store's commits on one branch."""

    def __init__(
        self,
        session: Session,
        *,
        branch: str,
        rule: LayerRule,
        layout: Layout,
        light: LightSettings,
        ranks: RanksSetting,
    ) -> None:
        """Take the settings of a store."""
        self.branch = branch
        self.gauge = Gauge()
        """Measures the layers; whoever watches optimizers does so through this one for good."""
        self._session = session
        self._rule = rule
        self._layout = layout
        self._light = light
        self._setting = ranks
        self._ranks: Ranks | None = None
        self._lock = threading.Lock()
        self._pending: PendingCommit | None = None
        self._committer: Committer | CollectiveCommitter | None = None
        _all.add(self)

    @property
    def known_documents(self) -> Mapping[str, LayerDocument] | None:
        """Documents that are in memory, of the newest head that is known."""
        head = self._head()
        return head.documents if head is not None else None

    def ranks(self) -> Ranks | None:
        """Return the ranks that commit and restore together, joining them at the first call; ``None``: this one alone.

        A commit under way has ended when this returns: it would use the same group.
        """
        if not self._setting.is_joint():
            return None
        self._session.check_open()
        with self._lock:
            self.wait()
            return self._joined()

    def commit(self, request: Callable[[], Request], *, block: bool) -> Commit | PendingCommit:
        """Commit, or begin to; see ``Store.commit``.

        Args:
            request: checks what the caller asked for, and gives it; of many ranks, where its error is that of all.
            block: whether to wait.
        """
        if not self._setting.is_joint():
            checked = request()
            request = lambda: checked  # noqa: E731 - before a commit under way is waited for
        with self._lock:
            ranks = self._joined() if self._setting.is_joint() else None
            if ranks is None:
                self._session.check_writable("commit")
            self._settle_with(ranks)
            committer = self._committer_of(ranks)
            try:
                prepared = committer.prepare(request, staged=not block)
                if block:
                    return committer.carry_out(prepared)  # type: ignore[arg-type]
                pending = PendingCommit(
                    prepared.draft.step,
                    self.branch,
                    lambda: committer.carry_out(prepared),  # type: ignore[arg-type]
                )
                # Known before it begins: after an interrupt the next commit must not use the memory of one that runs.
                self._pending = pending
                pending.start()
            except BaseException as error:
                if self._pending is None or self._pending.give_up(error):
                    committer.abandon()
                raise
            return pending

    def _joined(self) -> Ranks:
        if self._ranks is None:
            self._ranks = join(self._setting, self._session.objects)
        return self._ranks

    def wait(self) -> None:
        """Wait for a commit under way; its error is for ``commit``, ``result`` and ``close``."""
        pending = self._pending
        if pending is not None:
            pending.wait()

    def finish(self) -> None:
        """Wait for a commit under way; raise its error if nobody has seen that yet."""
        with self._lock:
            self._settle()

    def between(self, work: Callable[[], Result]) -> Result:
        """Do something while no commit is under way, after which commits start anew."""
        with self._lock:
            # An error of the commit under way is for the next one: it may be what this work is meant to mend.
            self.wait()
            found = work()
            self.start_anew()
        return found

    def start_anew(self) -> None:
        """Forget what was known of the branch: the catalog is another one."""
        self._committer = None
        self.gauge.forget_all()

    def close(self) -> None:
        """Wait for a commit under way, then give memory, leases and connections back.

        Raises:
            TailorError: the commit under way failed and nobody has seen that yet; all is closed all the same.
        """
        with self._lock:
            try:
                self._settle()
            finally:
                if self._committer is not None:
                    self._committer.close()
                if self._ranks is not None:
                    self._ranks.close()
                self._session.close()

    def _committer_of(self, ranks: Ranks | None) -> Committer | CollectiveCommitter:
        # torch.distributed may have been initialised since the commit before.
        if self._committer is None or isinstance(self._committer, CollectiveCommitter) != (ranks is not None):
            self._committer = self._collective(ranks) if ranks is not None else self._single()
        return self._committer

    def _single(self) -> Committer:
        return Committer(self._publisher(), self._layout, self._rule, self._light, self.gauge)

    def _collective(self, ranks: Ranks) -> CollectiveCommitter:
        # No call to other ranks: one of them may have to start anew where others need not.
        objects, opening = self._session.objects, self._publisher
        return CollectiveCommitter(
            ranks, objects, opening, self.branch, self._layout, self._rule, self._light, self.gauge
        )

    def _publisher(self) -> Publisher:
        session = self._session
        session.check_writable("commit")
        return Publisher(session.objects, session.catalog, session.binding, session.keeper, self.branch)

    def _head(self) -> Head | None:
        committer = self._committer
        if isinstance(committer, CollectiveCommitter):
            return committer.head
        return committer.publisher.head if committer is not None else None

    def _settle(self) -> None:
        pending = self._pending
        if pending is not None:
            # Forgotten only once it has ended: an interrupt while waiting must not let the next commit use its memory.
            pending.wait()
            self._pending = None
            pending.settle()

    def _settle_with(self, ranks: Ranks | None) -> None:
        """Settle on all ranks: an error of the commit before is raised on all if one of them has not seen it."""
        if ranks is None:
            self._settle()
            return
        self.wait()
        with ranks.together("ending the commit before"):
            try:
                self._settle()
            except TailorError as error:
                # As a new one: of this very error all ranks know, but not that nobody here has seen it.
                raise type(error)(str(error)) from error

    def _leave_parent(self) -> None:
        self._lock = threading.Lock()
        self._pending = None
        self._setting = self._setting.of_child()
        self._ranks = None
