"""Who takes part in a soak: each of these is a process that does one thing over and over until it is told to end."""

import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import tailorstore as ts
from tailorstore.domain.errors import (
    ConflictError,
    HeadMovedError,
    IntegrityError,
    LeaseExpiredError,
    RefNotFoundError,
    RootTakenError,
    StepOrderError,
)
from tailorstore.domain.records import VerifyReport
from tailorstore.engine import gc
from tailorstore.engine.publish import check_binding
from tests.soak.content import LAYERS, LIGHT, compare, sources_after, state_at
from tests.soak.ledger import Board, Ledger, Line

STEPS_APART: Final = 64
"""Steps of one place differ by this much, so that no two places ever commit the same step."""

SHARED: Final = "shared"
"""The branch on which several commit."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A store, and what everybody knows about it."""

    folder: Path
    url: str
    catalogs: tuple[str, ...]
    """One, or several that take the root over from each other."""
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    lease: timedelta = timedelta(seconds=6)
    grace: timedelta = timedelta(seconds=5)
    keep_last: int = 4
    seed: int = 0

    @property
    def contested(self) -> bool:
        return len(self.catalogs) > 1

    def open(self, branch: str = "main", catalog: int = 0, *, read_only: bool = False) -> ts.Store:
        url = self.catalogs[catalog]
        if read_only:
            url += "?mode=ro" if url.startswith("sqlite") else "?options=-c%20default_transaction_read_only%3Don"
        return ts.open_store(
            self.url,
            catalog=url,
            branch=branch,
            storage_options=self.storage_options,
            light=LIGHT,
            lease=self.lease,
        )

    def ledger(self, name: str) -> Ledger:
        return Ledger(self.folder / f"{name}.jsonl")


class Pulse:
    """Notices when this process did not get to run: then its leases may lapse without anybody being to blame."""

    def __init__(self) -> None:
        self._last_stall = -1e9
        self._longest = 0.0
        threading.Thread(target=self._beat, daemon=True, name="pulse").start()

    def _beat(self) -> None:
        while True:
            before = time.monotonic()
            time.sleep(0.1)
            late = time.monotonic() - before
            if late > 1:
                self._last_stall, self._longest = time.monotonic(), late

    def stalled(self, within: timedelta) -> bool:
        """Whether it stood still for more than a second not long ago."""
        return time.monotonic() - self._last_stall < 3 * within.total_seconds()


@dataclass(slots=True)
class Member:
    """A process at its place."""

    setting: Setting
    board: Board
    place: int
    name: str
    catalog: int
    dice: random.Random
    pulse: Pulse

    def count(self, what: str, count: int = 1) -> None:
        self.board.add(self.place, what, count)

    def complain(self, what: str, detail: str) -> None:
        """Note something that must not be."""
        self.count(what)
        with (self.setting.folder / "complaints.txt").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {self.name}: {what}: {detail}\n")

    def on(self) -> bool:
        return not self.board.stopped

    def rest(self, seconds: float) -> None:
        """Do nothing for about so long."""
        end = time.monotonic() + seconds * self.dice.uniform(0.5, 1.5)
        while self.on() and time.monotonic() < end:
            time.sleep(min(0.1, max(0.0, end - time.monotonic())))

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Count the conflicts that are bound to happen here, and let them pass."""
        try:
            yield
        except HeadMovedError:
            self.count("refused: head moved")
        except StepOrderError:
            self.count("refused: step order")
        except RootTakenError:
            if not self.setting.contested:
                raise
            self.count("refused: root taken")
        except LeaseExpiredError:
            if not self.pulse.stalled(self.setting.lease):
                raise
            self.count("refused: lease expired after a stall")
        except RefNotFoundError:
            # Expired between being listed and being asked for.
            self.count("refs gone")


def run_member(member: Member, work: Callable[[Member], None]) -> None:
    """Work until the end; errors that nobody expects are noted, and it goes on with a new store."""
    while member.on():
        try:
            work(member)
        except ConflictError as error:
            if member.setting.contested and isinstance(error, RootTakenError):
                member.count("refused: root taken")
            else:
                member.complain("unexpected errors", traceback.format_exc())
            member.rest(0.1)
        except Exception:  # noqa: BLE001 - whatever it is, the soak must tell
            member.complain("unexpected errors", traceback.format_exc())
            member.rest(0.3)


# --- Trainers ----------------------------------------------------------------------------------------------------


def train(member: Member) -> None:
    """Commit on a branch of one's own; now and then tag, fork, move it back."""
    setting, branch = member.setting, member.name
    ledger = setting.ledger(branch)
    with setting.open(branch, member.catalog) as store:
        if not store.writable:
            member.rest(0.1)
            return
        line = Line.of(ledger)
        sources = _head_sources(store, branch, member)
        tick = line.last_step // STEPS_APART
        while member.on():
            tick += 1
            step = tick * STEPS_APART + member.place
            mask = _mask(member.dice)
            sources = sources_after(sources, step, LAYERS if mask is None else mask)
            _commit(member, store, ledger, step, mask, sources)
            if not setting.contested and member.dice.random() < 0.15:
                line = Line.of(ledger)
                if _change_names(member, store, ledger, line):
                    sources = _head_sources(store, branch, member)
            member.rest(0.02)


def _commit(member: Member, store: ts.Store, ledger: Ledger, step: int, mask: Any, sources: dict[str, int]) -> None:
    ledger.write(begin=step)
    extra = {"sources": sources, "step": step}
    if member.dice.random() < 0.25:
        pending = store.commit(step, state_at(step), None, mask, extra=extra, block=False)
        found = pending.result(120)
    else:
        found = store.commit(step, state_at(step), None, mask, extra=extra)
    ledger.write(done=step, id=found.id)
    member.count("commits")


def _mask(dice: random.Random) -> dict[str, str] | None:
    if dice.random() < 0.2:
        return None
    return {layer: dice.choice(("full", "light")) for layer in dice.sample(LAYERS, dice.randint(1, len(LAYERS)))}


def _head_sources(store: ts.Store, branch: str, member: Member) -> dict[str, int] | None:
    """Return where the head's layers come from, by the word of whoever committed it; ``None`` before the first."""
    if branch not in {ref.name for ref in store.branches()}:
        return None
    with store.checkout(branch) as checkpoint:
        _compare(member, checkpoint)
        found: dict[str, int] = checkpoint.extra["sources"]
    return found


def _change_names(member: Member, store: ts.Store, ledger: Ledger, line: Line) -> bool:
    """Do something with tags and branches; returns whether one's own branch was moved."""
    recent = store.log(limit=member.setting.keep_last)
    chosen = member.dice.choice(recent)
    name = f"{member.name}-{line.made}"
    with member.expecting():
        match member.dice.choice(("tag", "tag", "fork", "move", "remove", "remove")):
            case "tag" if len(line.tags) < 3:
                ledger.write(naming=name)
                store.tag(name, chosen.id)
                ledger.write(tagged=name, at=chosen.step)
                member.count("tags made")
            case "fork" if len(line.forks) < 2:
                ledger.write(naming=name)
                store.branch(name, chosen.id)
                ledger.write(forked=name, at=chosen.step)
                member.count("branches made")
            case "move" if len(recent) > 1:
                back = member.dice.choice(recent[1:])
                # Before it is done: from here on nobody can tell what the branch has after that step.
                ledger.write(moved=back.step)
                store.branch(member.name, back.id, move=True)
                member.count("branches moved")
                return True
            case "remove" if line.tags or line.forks:
                victim = member.dice.choice([*line.tags, *line.forks])
                ledger.write(removing=victim)
                if victim in line.tags:
                    store.delete_tag(victim)
                    member.count("tags removed")
                else:
                    store.delete_branch(victim)
                    member.count("branches removed")
    return False


def contend(member: Member) -> None:
    """Commit on a branch on which others commit, too: one of them wins."""
    ledger = member.setting.ledger(member.name)
    with member.setting.open(SHARED, member.catalog) as store:
        while member.on():
            known = SHARED in {ref.name for ref in store.branches()}
            head = store.log(limit=1)[0].step if known else 0
            step = (head // STEPS_APART + 1) * STEPS_APART + member.place
            with member.expecting():
                # Who wrote the layer that never changes is not known here.
                _commit(member, store, ledger, step, None, dict.fromkeys(LAYERS, step))
            member.rest(0.1)


# --- Readers -----------------------------------------------------------------------------------------------------


def read(member: Member) -> None:
    """Check composites out, hold some of them for longer than a lease lives, and compare every bit."""
    with member.setting.open("main", member.catalog) as store:
        until = time.monotonic() + 5
        while member.on() and time.monotonic() < until:
            _read_one(member, store, leased=store.owned)
            member.rest(0.03)


def visit(member: Member) -> None:
    """Read without leases, as those do who may only read: within the grace period."""
    with member.setting.open("main", member.catalog, read_only=True) as store:
        until = time.monotonic() + 5
        while member.on() and time.monotonic() < until:
            _read_one(member, store, leased=False)
            member.rest(0.05)


def _read_one(member: Member, store: ts.Store, *, leased: bool) -> None:
    setting = member.setting
    began = time.monotonic()
    ref = _any_ref(member, store)
    if ref is None:
        return
    with member.expecting():
        try:
            with store.checkout(ref) as checkpoint:
                owner = not setting.contested or _owns(store)
                if leased and member.dice.random() < 0.3:
                    # Longer than what nobody holds is left alone; where catalogs contend, leases protect less.
                    share = 0.2 if setting.contested else 2.0
                    member.rest(setting.grace.total_seconds() * share)
                    member.count("held under a lease")
                _compare(member, checkpoint)
        except IntegrityError as error:
            within_grace = timedelta(seconds=time.monotonic() - began) < setting.grace
            if setting.contested and not (owner and within_grace):
                # The catalog that was asked has lost the root: what it promised is in nobody's books.
                member.count("reads of a lost root")
            elif not leased and not within_grace:
                member.count("reads later than the grace period")
            else:
                member.complain("wrong composites", f"{ref}: {error}\n{traceback.format_exc()}")


def _owns(store: ts.Store) -> bool:
    if not store.owned:
        return False
    try:
        check_binding(store._objects, store._session.binding)
    except RootTakenError:
        return False
    return True


def _any_ref(member: Member, store: ts.Store) -> str | None:
    branches = [ref.name for ref in store.branches()]
    if not branches:
        return None
    if member.dice.random() < 0.5:
        return member.dice.choice([*branches, *(ref.name for ref in store.tags())])
    name = member.dice.choice(branches)
    with member.expecting():
        commits = store.log(name)
        chosen = member.dice.choice(commits)
        return member.dice.choice((chosen.id, f"{name}@{chosen.step}"))
    return None


def _compare(member: Member, checkpoint: ts.Checkpoint) -> None:
    size, wrong = compare(checkpoint)
    member.count("composites read")
    member.count("bytes compared", size)
    if wrong:
        member.complain("wrong composites", f"step {checkpoint.step}: {'; '.join(wrong)}")


# --- Upkeep ------------------------------------------------------------------------------------------------------


def collect(member: Member) -> None:
    """Drop all but the newest commits, over and over, with a grace period of some seconds."""
    # Storage and processes have one clock here.
    gc._CLOCK_SKEW = timedelta(0)
    setting = member.setting
    with setting.open("main", member.catalog) as store:
        while member.on() and store.writable:
            report = store.gc(ts.KeepLast(setting.keep_last), grace=setting.grace)
            member.count("gc runs")
            member.count("objects deleted", report.objects_deleted)
            member.count("versions swept", report.versions_swept)
            member.count("leftovers swept", report.leftovers_swept)
            member.count("commits expired", len(report.expired))
            if report.deletes_failed:
                member.complain("unexpected errors", f"{report.deletes_failed} objects could not be deleted")
            member.rest(0.5)
    member.rest(0.3)


def verify(member: Member) -> None:
    """Verify the whole store."""
    with member.setting.open("main", member.catalog) as store:
        while member.on():
            _note_damages(member, store, "verifies", store.verify)
            member.rest(1)
            if not store.owned or (member.setting.contested and not _owns(store)):
                return


def scrub(member: Member) -> None:
    """Verify a part of the store after the other."""
    with member.setting.open("main", member.catalog) as store:
        while member.on():
            _note_damages(member, store, "scrubs", lambda: store.scrub(0.2))
            member.rest(0.5)


def _note_damages(member: Member, store: ts.Store, what: str, look: Callable[[], VerifyReport]) -> None:
    report = look()
    member.count(what)
    member.count("objects verified", report.objects)
    if report.damages and not (member.setting.contested and not _owns(store)):
        member.complain("wrong composites", f"damages: {report.damages}")


def take_over(member: Member) -> None:
    """Take the root over after its owner had it for some seconds; sometimes also from oneself."""
    member.rest(3)
    with member.setting.open("main", member.catalog) as store, member.expecting():
        if not _owns(store) or member.dice.random() < 0.2:
            store.rebuild_catalog()
            member.count("take-overs")


ROLES: Final[dict[str, Callable[[Member], None]]] = {
    "trainer": train,
    "rival": contend,
    "reader": read,
    "visitor": visit,
    "collector": collect,
    "verifier": verify,
    "scrubber": scrub,
    "taker": take_over,
}


def work_at(setting: Setting, board: Board, place: int, name: str, catalog: int, life: int) -> None:
    """Be the process at a place, for as long as its parent lives; ``life`` counts how often it was started."""
    parent = os.getppid()

    def follow() -> None:
        # Whatever happens to the one that watches, nobody stays behind.
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    role = name.rstrip("0123456789-")
    dice = random.Random(f"{setting.seed} {name} {life}")
    member = Member(setting, board, place, name, catalog, dice, Pulse())
    run_member(member, ROLES[role])
