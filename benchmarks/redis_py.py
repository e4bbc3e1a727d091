"""What a verb of the Redis store would cost through more of redis-py: ``python -m benchmarks.redis_py``.

The store's verbs are the same throughout; what carries their scripts differs. The figures are in ADR 22. All take turns in one process, of some
messages each. A ratio is taken round by round, to the store as it is, and the table has the medians. Processor time is the client's.

==============  ============================================================================================
the store       as it is
its packer      redis-py makes bytes of a command (``Connection.pack_commands``)
its pool        a connection is had from ``BlockingConnectionPool``
its client      ``Redis.execute_command``, on that pool; ``RedisCluster``; ``Sentinel.master_for``
==============  ============================================================================================
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from statistics import median
from typing import Any, TypeVar
from uuid import uuid4

from redis import BlockingConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import NoScriptError
from redis.retry import Retry
from redis.sentinel import Sentinel

from celery_idempotent import RedisStore
from celery_idempotent.core.records import Claimed, Inserted, MessageKey, NewMessage
from celery_idempotent.stores.redis.address import parse
from celery_idempotent.stores.redis.cluster import Cluster
from celery_idempotent.stores.redis.connection import ANSWER, CONNECT, Server
from celery_idempotent.stores.redis.pool import THE_SERVER, Call, CheckedOut, ConnectionPool, read_replies
from celery_idempotent.stores.redis.session import ScriptSession
from tests.support.servers import PrivateRedis, PrivateSentinel
from tests.support.servers.redis_cluster import PrivateRedisCluster

# Without types.
_BlockingConnectionPool: Any = BlockingConnectionPool
_ClusterNode: Any = ClusterNode
_RedisCluster: Any = RedisCluster
_Sentinel: Any = Sentinel

T = TypeVar("T")
Operation = Callable[[ScriptSession], T]

#: Messages of one turn, of each thread.
TURN = 20

#: A refusal is not repeated by the client, as the store would have it.
_ONCE = Retry(NoBackoff(), 0)


class _Packed(ScriptSession):
    def _exchange(self, calls: Sequence[Call], at_one_moment: bool) -> list[Any]:
        connection: Any = self._connections.to(THE_SERVER)
        connection.send_packed_command(connection.pack_commands([call.command for call in calls]), check_health=False)
        return read_replies(connection, len(calls))


class _WithPacker(Server):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._own = ConnectionPool()

    def run(self, operation: Operation[T], *, prepared: bool = True) -> T:
        connections = CheckedOut(self._own, self._connect, at_once=self._address.at_once, patience=CONNECT)
        with connections:
            return operation(_Packed(self, self._layout, connections, is_retry=False))


class _WithPool(Server):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pool = self._make_pool()

    def _make_pool(self) -> Any:
        ((host, port),) = self._address.hosts
        return _BlockingConnectionPool(
            max_connections=self._address.at_once,
            timeout=CONNECT,
            connection_class=self._address.connection,
            host=host,
            port=port,
            socket_timeout=ANSWER,
            socket_connect_timeout=CONNECT,
            **self._address.options,
        )

    def run(self, operation: Operation[T], *, prepared: bool = True) -> T:
        connection = self._pool.get_connection()
        try:
            connections: Any = _One(connection)
            return operation(ScriptSession(self, self._layout, connections, is_retry=False))
        except BaseException:
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)


class _One:
    """The connection that one operation uses."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def to(self, place: object) -> Any:
        return self._connection


class _ByClient(ScriptSession):
    def __init__(self, server: Server, layout: Any, client: Any) -> None:
        nothing: Any = None
        super().__init__(server, layout, nothing, is_retry=False)
        self._client = client

    def send(self, calls: Sequence[Call], *, at_one_moment: bool = False) -> list[Any]:
        try:
            return [self._client.execute_command("EVALSHA", *call.command[1:]) for call in calls]
        except NoScriptError:
            for call in calls:
                self._client.script_load(call.script.text)
            return self.send(calls)


class _WithClient(_WithPool):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._client = self._make_client()

    def _make_client(self) -> Any:
        return Redis(connection_pool=self._pool, retry=_ONCE)

    def run(self, operation: Operation[T], *, prepared: bool = True) -> T:
        return operation(_ByClient(self, self._layout, self._client))


class _WithSentinel(_WithClient):
    def _make_pool(self) -> None:
        """It brings its own."""

    def _make_client(self) -> Any:
        sentinel = _Sentinel(self._address.hosts, sentinel_kwargs={"socket_timeout": 2.0})
        return sentinel.master_for(self._address.master_name, socket_timeout=ANSWER, retry=_ONCE)


class _WithCluster(_WithSentinel):
    def _make_client(self) -> Any:
        return _redis_cluster(self._address.hosts)


def _redis_cluster(hosts: Sequence[tuple[str, int]]) -> Any:
    return _RedisCluster(startup_nodes=[_ClusterNode(host, port) for host, port in hosts], socket_timeout=ANSWER)


#: What carries the scripts, by what there is at the other end; the first is the store as it is.
WAYS: Mapping[str, Mapping[str, type[Server] | None]] = {
    "server": {"the store": None, "its packer": _WithPacker, "its pool": _WithPool, "its client": _WithClient},
    "batch": {"the store": None, "its packer": _WithPacker},
    "sentinel": {"the store": None, "its client": _WithSentinel},
    "cluster": {"the store": None, "its client": _WithCluster},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.redis_py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=300, help="%(default)s; of eight threads an eighth")
    # In a process of its own, which another one may disturb.
    parser.add_argument("--at", nargs=3, metavar=("KIND", "URL", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.at:
        kind, url, threads = arguments.at
        _compare(kind, url, int(threads), arguments.rounds)
        return
    with ExitStack() as servers:
        master = servers.enter_context(PrivateRedis(persistent=False))
        sentinel = servers.enter_context(PrivateSentinel(master))
        cluster = servers.enter_context(PrivateRedisCluster())
        urls = {
            "server": master.url,
            "batch": master.url,
            "sentinel": f"sentinel://127.0.0.1:{sentinel.port}/0?master_name={sentinel.MASTER}",
            "cluster": cluster.url,
        }
        for kind, url in urls.items():
            for threads, processes in ((1, 1),) if kind == "batch" else ((1, 1), (8, 1), (1, 2)):
                print(f"\n{kind}, {threads} thread(s), {processes} process(es)", flush=True)
                command = [sys.executable, "-m", "benchmarks.redis_py", "--rounds", str(arguments.rounds // threads)]
                started = [
                    subprocess.Popen([*command, "--at", kind, url, str(threads)], stdout=subprocess.PIPE, text=True)
                    for _ in range(processes)
                ]
                outputs = [process.communicate()[0] for process in started]
                assert not any(process.returncode for process in started)
                print("\n".join(outputs), end="", flush=True)
        _compare_discovery(urls["cluster"])


def _compare(kind: str, url: str, threads: int, rounds: int) -> None:
    """Have all ways take turns; print what a verb takes, or a message of a batch."""
    work = _together if kind == "batch" else _one_by_one
    stores: dict[str, RedisStore] = {}
    for name, way in WAYS[kind].items():
        store = stores[name] = RedisStore(url, table="redis-py")
        if way is None:
            store.init()
        else:
            store._server = way(parse(url), store._server._layout, store._init)
            store._run = store._server.run
        _turn(store, 1, work)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in stores}
    order = list(stores)
    for _ in range(max(rounds, 1)):
        random.shuffle(order)
        for name in order:
            took[name].append(_turn(stores[name], threads, work))
    base = took["the store"]
    for name, found in took.items():
        wall, cpu = (median(times[which] for times in found) for which in (0, 1))
        more_wall, more_cpu = (
            median(times[which] / first[which] for times, first in zip(found, base, strict=True)) for which in (0, 1)
        )
        print(f"{name:12} {wall:7.1f} us ({more_wall:.2f})   processor {cpu:6.1f} us ({more_cpu:.2f})", flush=True)


def _turn(store: RedisStore, threads: int, work: Callable[[RedisStore, str], int]) -> tuple[float, float]:
    """Return microseconds of what is counted, and of processor time."""
    names = [uuid4().hex for _ in range(threads)]
    began, began_cpu = time.perf_counter(), time.process_time()
    if threads == 1:
        counted = work(store, names[0])
    else:
        with ThreadPoolExecutor(threads) as pool:
            counted = sum(pool.map(lambda name: work(store, name), names))
    return (time.perf_counter() - began) / counted * 1e6, (time.process_time() - began_cpu) / counted * 1e6


def _one_by_one(store: RedisStore, name: str) -> int:
    """Record, claim and complete some messages; how many verbs that are."""
    messages = _messages(name, TURN)
    for message in messages:
        store.record(message)
    for message in messages:
        claimed = store.claim(message, worker="host:1", lease=60.0, grace=5.0)
        assert isinstance(claimed, Claimed)
        assert store.complete(claimed.claim, result=None)
    return 3 * len(messages)


def _together(store: RedisStore, name: str) -> int:
    """Record many messages; how many."""
    messages = _messages(name, 500)
    assert all(isinstance(answer, Inserted) for answer in store.record_all(messages))
    return len(messages)


def _messages(name: str, count: int) -> list[NewMessage]:
    return [
        NewMessage(
            MessageKey(f"noop:{name} {number}", "noop"),
            task_id=f"{number:-<36}",
            queue="celery",
            fingerprint="0" * 64,
            message=b"." * 200,
        )
        for number in range(count)
    ]


def _compare_discovery(url: str) -> None:
    """Print what it takes to find out where the shards are: at a process's first verb, and when one has moved."""
    store = RedisStore(url)
    server = store._server
    assert isinstance(server, Cluster)

    def by_redis_py() -> None:
        with closing(_redis_cluster(server._address.hosts)) as cluster:
            assert all(cluster.get_node_from_key(tag) for tag in store._server._layout.tags)

    print("\nto find the nodes of a cluster")
    for name, find in {"the store": lambda: server._find_slots(ConnectionPool()), "RedisCluster": by_redis_py}.items():
        find()
        began, took = time.process_time(), 20
        for _ in range(took):
            find()
        print(f"{name:12} processor {(time.process_time() - began) / took * 1e3:5.1f} ms")


if __name__ == "__main__":
    main()
