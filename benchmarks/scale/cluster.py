"""A Redis Cluster of one, two and three masters: what a message costs a node, and how evenly the nodes share it."""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from typing import Any

import psutil

from benchmarks.scale.server import processor_seconds
from benchmarks.scale.traffic import new_messages, run
from celery_idempotent.stores import open_store
from tests.support.servers.redis_cluster import PrivateRedisCluster

__all__ = ["cluster"]

IN_FLIGHT = 100


def cluster(*, messages: int, rounds: int, sizes: tuple[int, ...] = (1, 2, 3)) -> list[dict[str, Any]]:
    """Return the same traffic, sent by one client through clusters of several sizes, in turns."""
    answer = []
    for size in sizes:
        rates, shares, spent, own = [], [], [], []
        with PrivateRedisCluster(size) as servers, closing(open_store(servers.url)) as store:
            nodes = [psutil.Process(node.pid) for node in servers.nodes]
            run(store, new_messages(IN_FLIGHT))
            for _ in range(rounds):
                before, began, mine = [processor_seconds(node) for node in nodes], time.monotonic(), time.process_time()
                for _ in range(messages // IN_FLIGHT):
                    run(store, new_messages(IN_FLIGHT))
                rates.append(messages / (time.monotonic() - began))
                own.append(1e3 * (time.process_time() - mine) / messages)
                used = [processor_seconds(node) - earlier for node, earlier in zip(nodes, before, strict=True)]
                spent.append(1e3 * sum(used) / messages)
                shares.append(max(used) / sum(used))
        answer.append(
            {
                "masters": size,
                "messages a second, one client": statistics.median(rates),
                "client processor ms a message": statistics.median(own),
                "server processor ms a message, all nodes": statistics.median(spent),
                "share of the busiest node": statistics.median(shares),
            }
        )
    return answer
