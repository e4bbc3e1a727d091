"""A log that Sentinels or a cluster say the place of, and that moves."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from celery_idempotent import RedisStore
from celery_idempotent.core.records import Claim, Inserted, MessageKey
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores.redis.layout import Layout, identity
from celery_idempotent.testing.examples import KEY, claim, new_message, pending, processing, read
from tests.support.servers import PrivateRedis, PrivateSentinel, skip_if_not_installed
from tests.support.servers.redis_cluster import PrivateRedisCluster
from tests.support.waiting import wait_until
from tests.support.worker import ROOT

# -- Sentinel ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched() -> Iterator[tuple[PrivateRedis, PrivateRedis, PrivateSentinel]]:
    """Yield a master, its replica, and the Sentinel that watches them."""
    with skip_if_not_installed(), ExitStack() as stack:
        master = stack.enter_context(PrivateRedis())
        replica = stack.enter_context(PrivateRedis(replica_of=master))
        sentinel = stack.enter_context(PrivateSentinel(master))
        with Redis.from_url(replica.url) as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        with Redis.from_url(sentinel.url) as client:
            # As the Sentinel knows it, which asks every ten seconds: until then it takes no replica for a master.
            wait_until(
                lambda: [
                    each for each in client.sentinel_slaves(sentinel.MASTER) if each["master-link-status"] == "ok"
                ],
                describe=sentinel.log_tail,
            )
        yield master, replica, sentinel


def test_the_log_goes_where_the_master_goes(watched: tuple[PrivateRedis, PrivateRedis, PrivateSentinel]) -> None:
    master, replica, sentinel = watched
    url = f"sentinel://127.0.0.1:1;sentinel://127.0.0.1:{sentinel.port}/0?master_name={sentinel.MASTER}"
    with closing(RedisStore(url)) as store, Redis.from_url(replica.url) as client:
        held = processing(store)
        wait_until(lambda: client.exists(f"{Layout('queue_log').tag(identity(KEY)).decode()}:running"))
        master.kill()

        refused: list[StoreUnavailableError] = []

        def completed() -> bool:
            try:
                return store.complete(held, result=b"1")
            except StoreUnavailableError as error:
                refused.append(error)
                return False

        wait_until(completed, describe=lambda: f"{refused}\n{sentinel.log_tail()}")
        assert _role(replica) == "master"
        assert read(store).result == b"1"
        # While there was no master, nothing was sent.
        assert refused[-1].unsent

        # The old one comes back as a replica of the new one.
        master.start()
        wait_until(lambda: _role(master) == "slave")
        assert store.record(new_message(MessageKey("later", "t"))) == Inserted()


def test_a_master_that_was_made_a_replica_is_left(watched: tuple[PrivateRedis, PrivateRedis, PrivateSentinel]) -> None:
    _, _, sentinel = watched
    url = f"sentinel://127.0.0.1:{sentinel.port}/0?master_name={sentinel.MASTER}"
    with closing(RedisStore(url)) as store, Redis.from_url(sentinel.url) as client:
        pending(store)
        before = client.sentinel_get_master_addr_by_name(sentinel.MASTER)

        def moved() -> bool:
            # A replica is fit to take over once it has been seen for a while; until then this is refused, or comes to nothing.
            with suppress(RedisError):
                client.sentinel_failover(sentinel.MASTER)
            return bool(client.sentinel_get_master_addr_by_name(sentinel.MASTER) != before)

        wait_until(moved, interval=0.5, describe=sentinel.log_tail)

        def recorded() -> bool:
            try:
                return store.record(new_message(MessageKey("later", "t"))) == Inserted()
            except StoreUnavailableError:
                return False

        wait_until(recorded, describe=sentinel.log_tail)


def _role(server: PrivateRedis) -> str | None:
    """Return what a server is just now; Sentinel ends its connections when it becomes something else."""
    with suppress(RedisError), Redis.from_url(server.url) as client:
        role: str = client.info("replication")["role"]
        return role
    return None


def test_a_name_that_no_sentinel_knows_is_unavailable(
    watched: tuple[PrivateRedis, PrivateRedis, PrivateSentinel],
) -> None:
    _, _, sentinel = watched
    store = RedisStore(f"sentinel://127.0.0.1:{sentinel.port}/0?master_name=nobody")
    with pytest.raises(StoreUnavailableError, match="no Sentinel that answers names the master 'nobody'") as caught:
        store.check()
    assert caught.value.unsent


def test_sentinels_that_are_not_there_are_unavailable_and_their_password_is_not_told() -> None:
    store = RedisStore("sentinel://127.0.0.1:1;sentinel://127.0.0.1:2/0?master_name=m&sentinel_password=hunter2")
    with pytest.raises(StoreUnavailableError, match="no Sentinel that answers names the master 'm'") as caught:
        store.check()
    assert caught.value.unsent
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_an_account_of_the_sentinels_needs_no_other_rights_than_the_page_tells(private_redis: PrivateRedis) -> None:
    page = (ROOT / "docs" / "how-to" / "redis-store.md").read_text()
    rights = page.partition("An account of the Sentinels needs `")[2].partition("`")[0].split()
    with PrivateSentinel(private_redis) as sentinel, Redis.from_url(sentinel.url) as client:
        client.execute_command("ACL", "SETUSER", "shop", "reset", "on", ">secret", *rights)
        account = "sentinel_username=shop&sentinel_password=secret"
        url = f"sentinel://127.0.0.1:{sentinel.port}/0?master_name={sentinel.MASTER}&{account}"
        with closing(RedisStore(url)) as store:
            store.check()


# -- cluster -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[PrivateRedisCluster]:
    """Three masters."""
    with skip_if_not_installed(), PrivateRedisCluster() as cluster:
        yield cluster


def test_every_node_has_its_part_of_a_log(cluster: PrivateRedisCluster) -> None:
    keys = [MessageKey(f"m{number}", "t") for number in range(300)]
    with closing(RedisStore(cluster.url)) as store:
        assert store.record_all([new_message(key, published=False) for key in keys]) == [Inserted()] * 300
        assert [row.key for row in store.unsent(limit=300)] == keys
    for node in cluster.nodes:
        with Redis.from_url(node.url) as client:
            assert len(list(client.scan_iter(match="*:row:*"))) > 50


def test_a_part_being_moved_is_unavailable_and_found_again(cluster: PrivateRedisCluster) -> None:
    tag = Layout("queue_log").tag(identity(KEY))
    moved = key_slot(tag)
    with closing(RedisStore(cluster.url)) as store, ExitStack() as stack:
        pending(store)
        clients = [stack.enter_context(Redis.from_url(node.url)) for node in cluster.nodes]
        ids = [str(_text(client.cluster("MYID"))) for client in clients]
        source = moved * len(clients) // 16384
        target = (source + 1) % len(clients)
        clients[target].cluster("SETSLOT", moved, "IMPORTING", ids[source])
        clients[source].cluster("SETSLOT", moved, "MIGRATING", ids[target])
        keys = list(clients[source].scan_iter(match=tag.decode().replace("[", "\\[") + "*"))
        assert len(keys) > 3

        # Half of it is there, half of it here: no script may see that.
        def move(key: bytes) -> None:
            clients[source].migrate("127.0.0.1", cluster.nodes[target].port, key, 0, 5000)

        move(keys[0])
        for verb in (lambda: claim(store), lambda: store.record(new_message()), lambda: store.find(KEY)):
            with pytest.raises(StoreUnavailableError, match="is being moved to another node") as caught:
                verb()
            assert caught.value.unsent
        # Others are as they were.
        other = next(
            key
            for number in range(100)
            if Layout("queue_log").tag(identity(key := MessageKey(f"m{number}", "t"))) != tag
        )
        assert store.record(new_message(other)) == Inserted()

        for key in keys[1:]:
            move(key)
        for client in (clients[target], *clients):
            client.cluster("SETSLOT", moved, "NODE", ids[target])
        assert claim(store) == Claim(KEY, 1)
        with closing(RedisStore(cluster.url)) as new:
            assert read(new).token == 1


def test_a_lost_nodes_part_is_unavailable_until_it_is_back(cluster: PrivateRedisCluster) -> None:
    place = key_slot(Layout("queue_log").tag(identity(KEY))) * len(cluster.nodes) // 16384
    with closing(RedisStore(cluster.url)) as store:
        pending(store)
        cluster.nodes[place].kill()
        with pytest.raises(StoreUnavailableError) as caught:
            claim(store)
        assert caught.value.unsent
        cluster.nodes[place].start()

        def claimed() -> bool:
            try:
                return claim(store) == Claim(KEY, 1)
            except StoreUnavailableError:
                return False  # it has yet to be found by the others

        wait_until(claimed)


def _text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value
