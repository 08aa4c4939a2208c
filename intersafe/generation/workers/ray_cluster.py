"""Ray: starts it on this machine, or joins an existing cluster, to grow a run on several cores or machines."""

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from intersafe.errors import InputError
from intersafe.recipe.sections import Recipe

OBJECTS = 128 * 2**20
"""Bytes of Ray's object store on this machine: our messages are small and do not use it."""


@dataclass(frozen=True)
class Cluster:
    """Where a run is grown: on this machine (`local`) or in an existing cluster, and by how many workers."""

    address: str = "local"
    """`local`, `auto`, `host:port` or `ray://host:port`."""
    workers: int | None = None
    """None: one per core."""


@contextlib.asynccontextmanager
async def joined(cluster: Cluster | None) -> AsyncIterator[int]:
    """Connects to Ray for the length of the block; yields the number of workers, 0 without a cluster."""
    if cluster is None:
        yield 0
        return
    ray = library()
    before = ray.is_initialized()
    if not before:
        await asyncio.to_thread(_join, ray, cluster)
    try:
        # Ray reports lost workers on stdout, where our results go; we report them on stderr.
        with contextlib.suppress(AttributeError):
            ray._private.worker._worker_logs_enabled = False
        cores = int((await asyncio.to_thread(ray.cluster_resources)).get("CPU", 0))
        yield max(1, cluster.workers or cores)
    finally:
        if not before:
            await asyncio.to_thread(ray.shutdown)


def library() -> Any:
    """The library; `InputError` if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise InputError(
            "ray is not installed", at="--ray", remedy="pip install 'intersafe[ray]', on every machine"
        ) from None
    return ray


def _join(ray: Any, cluster: Cluster) -> None:
    """Starts Ray on this machine or joins a cluster; `InputError` if there is none."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address == "local":
        cores = max(cluster.workers or 1, _cores())
        ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=OBJECTS, **quiet)
        return
    _check_address(cluster.address)
    try:
        ray.init(cluster.address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(cluster.address, first_line(error)) from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_address(address: str) -> None:
    """`InputError` if nothing listens there: Ray itself would try for minutes and then end the process."""
    found = re.fullmatch(r"(?:ray://)?(?P<host>[^:/]+|\[[^\]]+\]):(?P<port>[0-9]{1,5})", address)
    if found is None:
        if address != "auto":
            raise _no_cluster(address, "no address")
        return
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, getattr(error, "strerror", None) or str(error)) from None


def _no_cluster(address: str, why: str) -> InputError:
    return InputError(
        f"no Ray cluster at {address} ({why})",
        at="--ray",
        remedy="start one with `ray start --head` and give its host:port, or leave the address out for this machine",
    )


def first_line(error: BaseException) -> str:
    """The first line of an error of Ray, which may fill a page."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def check_recipe(recipe: Recipe) -> None:
    """`InputError` for settings that do not work with workers on several machines."""
    if recipe.cast.painter and recipe.cast.painter.spec.backend == "diffusers":
        raise InputError(
            "a painter in process does not work with --ray",
            at="cast.painter",
            remedy="serve it over HTTP: docs/images.md",
        )
    for role, member in recipe.cast.members.items():
        if member.in_process:
            raise InputError(
                f"{member.spec.model!r} in process does not work with --ray",
                at=f"cast.{role}",
                remedy=f"serve it: vllm:{member.spec.model}@http://host:8000/v1, docs/engines.md",
            )
    if any(member.batch for member in recipe.cast.members.values()):
        raise InputError(
            "`batch: true` does not work with --ray", at="cast", remedy="drop one: a batch needs one core only"
        )
