"""A PostgreSQL that is restarted, killed, cut off, silent, or locked by others: nothing is lost, nothing done twice."""

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import psycopg
import pytest
import torch
from sqlalchemy import Connection, text

import tailorstore as ts
from tailorstore.catalog import Catalog
from tailorstore.catalog.database import Database, _Patience
from tailorstore.catalog.urls import parse_url
from tailorstore.domain.errors import CatalogUnavailableError
from tests.catalog.kit import announce, plain_sql, publish
from tests.kit.audit import assert_root_is_exact
from tests.kit.models import assert_same
from tests.kit.postgres import PostgresServer, run_postgres
from tests.kit.postgres_proxy import CUTS, Cut, PostgresProxy, run_proxy

NOW = timedelta(0)


def weights(step: int) -> dict[str, torch.Tensor]:
    """Return what is committed at a step: ``b`` stays as it is."""
    return {"a.w": torch.full((5,), float(step)), "b.w": torch.full((2,), -0.0)}


def check_commit(store: ts.Store, commit: ts.Commit, step: int) -> None:
    """Fail unless a commit is the newest, and there once, and reads back."""
    assert commit.step == step
    assert [one.id for one in store.log() if one.step == step] == [commit.id]
    assert store.log(limit=1)[0] == commit
    with store.checkout() as checkpoint:
        assert_same(checkpoint.model_state_dict(), weights(step))


def claims(url: str) -> int:
    """Return how many claims of writers and readers a catalog has."""
    with plain_sql(url) as connection:
        return sum(
            int(row[0])
            for row in connection.execute("SELECT count(*) FROM pending UNION ALL SELECT count(*) FROM leases")
        )


# --- Cut at every request ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """A store whose catalog is spoken to through a proxy, and the same one spoken to directly."""

    proxy: PostgresProxy
    url: str
    root: str
    store: ts.Store
    watch: ts.Store
    step: int = 1

    def commit(self) -> None:
        self.step += 1
        check_commit(self.watch, self.store.commit(self.step, weights(self.step)), self.step)

    def first_commit(self) -> None:
        self.step += 1
        branch = f"first-{self.step}"
        draft = announce(self.store._catalog, self.step, branch)
        made = publish(self.store._catalog, draft)
        assert self.watch.log(branch) == [made]
        self.watch.delete_branch(branch)

    def tag(self) -> None:
        self.step += 1
        head = self.watch.show()
        assert self.store.tag(f"t{self.step}", head) == head
        assert {one.name: one.commit for one in self.watch.tags()}[f"t{self.step}"] == head.id

    def untag(self) -> None:
        name = self.watch.tags()[0].name
        self.store.delete_tag(name)
        assert name not in [one.name for one in self.watch.tags()]

    def branch(self) -> None:
        self.step += 1
        self.store.branch(f"b{self.step}")
        assert self.watch.log(f"b{self.step}") == self.watch.log()

    def move(self) -> None:
        self.step += 1
        newest, before = self.watch.log(limit=2)
        self.store.branch("moving", newest if self.step % 2 else before, move=True)
        assert self.watch.show("moving") == (newest if self.step % 2 else before)

    def unbranch(self) -> None:
        name = next(one.name for one in self.watch.branches() if one.name.startswith("b"))
        self.store.delete_branch(name)
        assert name not in [one.name for one in self.watch.branches()]

    def read(self) -> None:
        with self.store.checkout() as checkpoint:
            assert claims(self.url) == 1
            assert checkpoint.commit == self.watch.show()

    def renew(self) -> None:
        with self.watch.checkout() as checkpoint, plain_sql(self.url) as connection:
            (lease,) = [str(row[0]) for row in connection.execute("SELECT lease_id FROM leases")]
            assert self.store._catalog.renew([lease, "0" * 20], timedelta(days=1)) == [lease]
            (left,) = connection.execute("SELECT expires_at - now() > interval '23 h' FROM leases")
            assert left[0]
            assert checkpoint.step

    def collect(self) -> None:
        self.step += 1
        self.watch.commit(self.step, weights(self.step))
        dropped = [one.id for one in self.watch.log()[1:]]
        kept = {one.commit for one in self.watch.branches()}
        report = self.store.gc(ts.KeepLast(1), grace=NOW)
        assert {one.id for one in report.expired} == set(dropped) - kept
        assert report.versions_doomed == report.versions_swept
        assert report.versions_doomed >= len(report.expired)
        assert_root_is_exact(self.watch)

    def take_over(self) -> None:
        before = self.watch.log()
        epoch = self.watch._catalog.binding().epoch
        assert self.store.rebuild_catalog().epoch == epoch + 1
        assert self.store.writable
        assert self.watch._catalog.binding().epoch == epoch + 1
        assert self.watch.log() == before

    def open(self) -> None:
        with ts.open_store(self.root, catalog=self.proxy.url(self.url), create=False) as store:
            assert store.writable
            assert store.log() == self.watch.log()


@pytest.fixture(scope="module")
def proxy(postgres_server: PostgresServer) -> Iterator[PostgresProxy]:
    """Give a proxy before the server that the tests share."""
    with run_proxy(postgres_server.port) as running:
        yield running


@pytest.fixture
def bench(proxy: PostgresProxy, postgres_url: str) -> Iterator[Bench]:
    """Give a store with two commits."""
    root = f"memory://{postgres_url.rpartition('/')[2]}/run"
    with (
        ts.open_store(root, catalog=postgres_url) as watch,
        ts.open_store(root, catalog=proxy.url(postgres_url)) as store,
    ):
        for step in (0, 1):
            watch.commit(step, weights(step))
        yield Bench(proxy, postgres_url, root, store, watch)
    proxy.arm(0, "before")


def cut_everywhere(bench: Bench, act: Callable[[], None]) -> Counter[Cut]:
    """Let an act lose its connection at each of its requests; return how often it did, by kind.

    The kinds take turns; the reply to each COMMIT of a write is lost both while the server works and after it. Of reads
    every sixth request is enough.
    """
    # The first time there is more to look at than later.
    act()
    bench.proxy.arm(0, "before")
    act()
    plan: list[tuple[int, Cut]] = []
    reading = False
    for at, request in enumerate(bench.proxy.requests(), 1):
        if request.startswith("BEGIN"):
            reading = request.endswith("READ ONLY")
        if request == "COMMIT" and not reading:
            plan += [(at, "sent"), (at, "after")]
        elif not reading or at % 6 == 0:
            plan.append((at, CUTS[len(plan) % len(CUTS)]))
    done: Counter[Cut] = Counter()
    for at, how in plan:
        bench.proxy.arm(at, how)
        act()
        done[how] += bool(bench.proxy.cut)
        bench.proxy.arm(0, how)
    return done


@pytest.mark.parametrize(
    ("act", "points"),
    [
        ("commit", 20),
        ("tag", 10),
        ("branch", 10),
        ("move", 10),
        ("read", 8),
        ("renew", 6),
        ("collect", 35),
        ("take_over", 35),
        ("open", 12),
    ],
)
def test_a_connection_may_be_cut_at_every_request(bench: Bench, act: str, points: int) -> None:
    done = cut_everywhere(bench, getattr(bench, act))
    assert sum(done.values()) >= points, done
    # Nothing is left of what was tried twice.
    bench.watch = ts.open_store(bench.root, catalog=bench.url)
    assert claims(bench.url) == 0
    bench.watch.gc(grace=NOW)
    assert_root_is_exact(bench.watch)
    assert bench.watch.verify().ok
    bench.watch.close()


def test_a_connection_may_be_cut_at_every_request_of_a_first_commit(bench: Bench) -> None:
    done = cut_everywhere(bench, bench.first_commit)
    assert sum(done.values()) >= 20, done
    assert claims(bench.url) == 0


def test_a_reply_that_is_lost_while_the_server_still_commits(bench: Bench) -> None:
    """The attempt that follows meets the first one in the middle of its commit, which a trigger makes last."""
    with plain_sql(bench.url) as connection:
        connection.execute(
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql"
            " AS 'BEGIN PERFORM pg_sleep(.3); RETURN NULL; END'"
        )
        for table in ("commits", "tags"):
            connection.execute(
                f"CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED"
                " FOR EACH ROW EXECUTE FUNCTION dawdle()"
            )
    for act, table in ((bench.commit, "commits"), (bench.tag, "tags")):
        act()
        bench.proxy.arm(0, "sent")
        act()
        for at in range(1, bench.proxy.requests().count("COMMIT") + 1):
            bench.proxy.arm(at, "sent", "COMMIT")
            act()
            assert bench.proxy.cut == "COMMIT"
            # The second attempt found that it need not write what the first one had.
            assert sum(request.startswith(f"INSERT INTO {table} ") for request in bench.proxy.requests()) <= 1
    bench.proxy.arm(0, "sent")
    assert claims(bench.url) == 0


def test_a_server_that_falls_silent_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.postgres.SILENCE_SECONDS", 0.2)
    bench.commit()
    bench.proxy.arm(0, "silence")
    bench.commit()
    middle = len(bench.proxy.requests()) // 2
    for at, only in ((1, ""), (3, ""), (middle, ""), (1, "COMMIT"), (1, "UPDATE")):
        bench.proxy.arm(at, "silence", only)
        bench.commit()
        assert bench.proxy.cut
    bench.proxy.arm(0, "silence")
    assert claims(bench.url) == 0


def test_a_machine_that_vanished_is_noticed(postgres_url: str) -> None:
    """By the kernel, which is told to; that it then does cannot be shown on one machine."""
    database = Database(parse_url(postgres_url + "?keepalives_idle=7"))

    def look(connection: Connection) -> tuple[dict[str, str], list[str]]:
        session = connection.connection.driver_connection
        assert isinstance(session, psycopg.Connection)
        limits = ("lock_timeout", "idle_in_transaction_session_timeout", "tcp_keepalives_idle", "tcp_keepalives_count")
        return session.info.get_parameters(), [str(connection.scalar(text(f"SHOW {name}"))) for name in limits]

    options, limits = database.read(look)
    assert limits == ["10s", "20s", "10", "4"]
    assert {name: options[name] for name in ("keepalives_idle", "keepalives_interval", "keepalives_count")} == {
        "keepalives_idle": "7",
        "keepalives_interval": "5",
        "keepalives_count": "4",
    }
    assert options["tcp_user_timeout"] == "30000"
    database.close()


# --- Restarted, killed, away -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fragile() -> Iterator[PostgresServer]:
    """Give a server that waits for the disk and may be killed."""
    with run_postgres(durable=True, restartable=True) as server:
        yield server


@pytest.fixture
def fragile_url(fragile: PostgresServer) -> Iterator[str]:
    """Give an empty database of it."""
    fragile.wait_until_up()
    with fragile.create_database() as url:
        yield url
        fragile.wait_until_up()


def kick(server: PostgresServer, url: str) -> None:
    """End all sessions of a database."""
    with contextlib.closing(server.connect()) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [url.rpartition("/")[2]]
        )


def test_a_training_run_does_not_notice_restarts_and_crashes(fragile: PostgresServer, fragile_url: str) -> None:
    root = f"memory://{fragile_url.rpartition('/')[2]}/run"
    over = threading.Event()

    def train(branch: str) -> list[ts.Commit]:
        made: list[ts.Commit] = []
        with ts.open_store(root, catalog=fragile_url, branch=branch) as store:
            while not over.is_set():
                step = len(made)
                made.append(store.commit(step, weights(step)))
                store.tag(f"{branch}-{step}")
                if step % 5 == 4:
                    store.delete_tag(f"{branch}-{step - 1}")
        return made

    ts.open_store(root, catalog=fragile_url).close()
    with ThreadPoolExecutor(2) as pool:
        runs = {branch: pool.submit(train, branch) for branch in ("one", "two")}
        for by, seconds in (
            (signal.SIGINT, 0.1),
            (signal.SIGKILL, 0.1),
            (signal.SIGQUIT, 0.1),
            (signal.SIGKILL, 1.5),
        ):
            time.sleep(0.3)
            with fragile.away(by):
                time.sleep(seconds)
            fragile.wait_until_up()
            for _ in range(3):
                time.sleep(0.1)
                kick(fragile, fragile_url)
        over.set()
        made = {branch: run.result(60) for branch, run in runs.items()}
    with ts.open_store(root, catalog=fragile_url) as store:
        tags = {tag.name: tag.commit for tag in store.tags()}
        for branch, commits in made.items():
            assert len(commits) > 3
            assert store.log(branch) == commits[::-1]
            kept = [one for one in commits if not (one.step % 5 == 3 and one.step + 1 < len(commits))]
            assert {name: id_ for name, id_ in tags.items() if name.startswith(branch)} == {
                f"{branch}-{one.step}": one.id for one in kept
            }
            for commit in commits:
                with store.checkout(commit) as checkpoint:
                    assert_same(checkpoint.model_state_dict(), weights(commit.step))
        assert store.verify().ok
        assert claims(fragile_url) == 0
        store.gc(grace=NOW)
        assert_root_is_exact(store)


def test_a_server_that_stays_away_fails_the_commit_and_nothing_more(
    fragile: PostgresServer, fragile_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailorstore.catalog.database.OUTAGE_SECONDS", 2)
    pause = _Patience.pause
    pauses: list[float] = []

    def noted(patience: _Patience) -> float:
        pauses.append(pause(patience))
        return pauses[-1]

    monkeypatch.setattr(_Patience, "pause", noted)
    root = f"memory://{fragile_url.rpartition('/')[2]}/run"
    store = ts.open_store(root, catalog=fragile_url)
    first = store.commit(1, weights(1))
    with fragile.away(signal.SIGKILL):
        with pytest.raises(CatalogUnavailableError, match=r"waited for, 2 s"):
            store.commit(2, weights(2))
        assert sum(pauses) > 1
        assert pauses[-1] > pauses[0]
        # Nobody waits for it a second time.
        pauses.clear()
        with pytest.raises(CatalogUnavailableError):
            store.log()
        store.close()
        assert pauses == []
    fragile.wait_until_up()
    with ts.open_store(root, catalog=fragile_url) as store:
        assert store.log() == [first]
        check_commit(store, store.commit(2, weights(2)), 2)


def test_a_store_is_opened_while_the_server_starts(fragile: PostgresServer, fragile_url: str) -> None:
    root = f"memory://{fragile_url.rpartition('/')[2]}/run"
    with ThreadPoolExecutor(1) as pool:
        with fragile.away(signal.SIGINT):
            opening = pool.submit(ts.open_store, root, catalog=fragile_url)
            time.sleep(0.5)
            assert not opening.done()
        with opening.result(30) as store:
            assert store.writable


# --- Locks -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked_store(url: str) -> Iterator[None]:
    """Hold the lock of all stores of a catalog."""
    with psycopg.connect(url.replace("+psycopg", "")) as holder:
        holder.execute("SELECT pk FROM stores FOR UPDATE")
        yield


def test_a_lock_is_waited_for_in_several_attempts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.postgres.LOCK_WAIT_SECONDS", 0.1)
    with ThreadPoolExecutor(1) as pool, ts.open_store(bench.root, catalog=bench.url) as store:
        with locked_store(bench.url):
            tagged = pool.submit(store.tag, "best")
            time.sleep(0.6)
            assert not tagged.done()
        assert tagged.result(30) == store.show("best")
        monkeypatch.setattr("tailorstore.catalog.database.LOCK_SECONDS", 0.4)
        with locked_store(bench.url), pytest.raises(CatalogUnavailableError, match="stayed locked by another process"):
            store.tag("worst")
        assert [tag.name for tag in store.tags()] == ["best"]
        store.tag("worst")


def test_a_client_that_stops_in_a_transaction_lets_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.postgres.IDLE_SECONDS", 1)
    database = Database(parse_url(bench.url))
    attempts: list[int] = []
    locked = threading.Event()

    def dreamy(connection: Connection) -> int:
        attempts.append(1)
        connection.execute(text("SELECT pk FROM stores FOR UPDATE"))
        locked.set()
        if len(attempts) == 1:
            time.sleep(1.6)
        return int(connection.execute(text("SELECT count(*) FROM stores")).scalar_one())

    with ThreadPoolExecutor(1) as pool:
        dreaming = pool.submit(database.write, dreamy)
        locked.wait(20)
        began = time.monotonic()
        bench.watch.tag("best")
        assert time.monotonic() - began < 1.5
        assert dreaming.result(30) == 1
    assert len(attempts) == 2
    database.close()


def test_transactions_that_cannot_be_put_in_an_order_both_take_effect(postgres_url: str) -> None:
    catalog = Catalog.open(postgres_url)
    for name in ("store-1", "store-2"):
        catalog.register(name, "file:///x", 1)
    catalog.close()
    database = Database(parse_url(postgres_url))
    both = threading.Barrier(2)
    runs: list[str] = []

    def skewed(mine: str, other: str) -> None:
        def work(connection: Connection) -> None:
            connection.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
            seen = connection.scalar(text("SELECT epoch FROM stores WHERE store_id = :store"), {"store": other})
            runs.append(mine)
            if len(runs) <= 2:
                both.wait(20)
            # Each adds to its own what it saw of the other: in any order one of them sees the other's sum.
            add = text("UPDATE stores SET epoch = epoch + :seen WHERE store_id = :store")
            connection.execute(add, {"seen": seen, "store": mine})

        database.write(work)

    with ThreadPoolExecutor(2) as pool:
        for one in [pool.submit(skewed, "store-1", "store-2"), pool.submit(skewed, "store-2", "store-1")]:
            one.result(30)
    assert len(runs) >= 3
    epochs = database.read(lambda connection: connection.scalars(text("SELECT epoch FROM stores")).all())
    assert sorted(epochs) == [2, 3]
    database.close()


def test_a_write_that_must_happen_once_happens_once(bench: Bench) -> None:
    """Of two databases one asks for receipts: cut after its commits it never runs again what took effect."""
    for once, expected in ((True, 1), (False, 2)):
        database = Database(parse_url(bench.proxy.url(bench.url)))
        database.read(lambda connection: connection.scalar(text("SELECT 1")))
        ran: list[int] = []

        def work(connection: Connection, ran: list[int] = ran) -> int:
            ran.append(1)
            connection.execute(text("UPDATE stores SET epoch = epoch + 1"))
            return len(ran)

        before = bench.watch._catalog.binding().epoch
        bench.proxy.arm(7 if once else 4, "after")
        assert database.write(work, once=once) == expected
        assert bench.proxy.cut == "COMMIT"
        assert bench.watch._catalog.binding().epoch == before + expected
        database.close()
    with plain_sql(bench.url) as connection:
        connection.execute("UPDATE receipts SET created_at = created_at - interval '2 days'")
        bench.watch._catalog._database.write(lambda _: None, once=True)
        assert [row[0] for row in connection.execute("SELECT count(*) FROM receipts")] == [1]
