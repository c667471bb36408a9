"""Work spread over the machines of a Ray cluster, where any of them may die."""

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import lrface
from lrface.errors import LrfaceError, UsageError

Task = TypeVar("Task")
Result = TypeVar("Result")

# Workers that one task may lose before it, and not the machines, is taken to be the reason.
_ATTEMPTS = 4


def on_ray(
    make_worker: Callable[[], Callable[[Task], Result]],
    tasks: Sequence[Task],
    workers: int | None = None,
    address: str | None = None,
    gpus: float = 0,
) -> Iterator[tuple[int, Result]]:
    """Do tasks on actors of Ray, one at a time each; yields (position in ``tasks``, result) as they finish.

    make_worker: called once in each actor, gives what does the tasks; it, the tasks and the results travel by
    pickle. An LrfaceError raised there is raised here. workers: actors, at most one for each CPU (or each
    ``gpus`` GPUs) of the cluster; None is that many. address: of a running cluster ("auto", "host:6379",
    "ray://host:10001"); None starts one of this machine's own, bound to loopback, and stops it at the end.

    An actor that dies is replaced and its task given out again, so a task may begin more than once: what it
    writes must be the same each time and appear whole or not at all. Raises LrfaceError when Ray is not
    installed, the cluster cannot be reached or has no CPU or GPU to give, other machines have another version of
    lrface, or one task has lost four actors; UsageError for workers below 1.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, found {workers}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    try:
        import ray
    except ImportError as error:
        raise LrfaceError(
            f"engine ray needs Ray, which cannot be imported ({error}): pip install 'lrface[dist]'"
        ) from error
    own = not ray.is_initialized()
    if own:
        _connect(ray, address, workers)
    actors: list[Any] = []
    try:
        count = _room(ray, address, gpus)
        count = min(count, len(tasks), workers or count)
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Actor)
        queue = deque(range(len(tasks)))
        lost: Counter[int] = Counter()
        busy: dict[Any, tuple[int, Any]] = {}

        def give(actor: Any) -> None:
            if queue:
                position = queue.popleft()
                busy[actor.do.remote(tasks[position])] = (position, actor)

        def hire() -> None:
            actors.append(remote.remote(make_worker, lrface.__version__))
            give(actors[-1])

        for _ in range(count):
            hire()
        while busy:
            ready = ray.wait(list(busy), num_returns=1)[0][0]
            position, actor = busy.pop(ready)
            try:
                answer = ray.get(ready)
            except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
                actors.remove(actor)
                lost[position] += 1
                if lost[position] == _ATTEMPTS:
                    raise LrfaceError(
                        f"{_ATTEMPTS} workers died one after the other on the same part of the job, the last one "
                        f"with: {_first_line(error)}. Often: a machine ran out of memory. Finished parts are kept; "
                        "run the same command again"
                    ) from error
                queue.appendleft(position)
                hire()
                continue
            if isinstance(answer, LrfaceError):
                raise answer
            give(actor)
            yield position, answer
    finally:
        for actor in actors:
            ray.kill(actor)
        if own:
            ray.shutdown()


class _Actor:
    """One worker: makes what it needs with its first task, then does one task at a time."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], version: str):
        self._make = make
        self._version = version
        self._work: Callable[[Any], Any] | None = None

    def do(self, task: Any) -> Any:
        try:
            if self._work is None:
                if lrface.__version__ != self._version:
                    raise LrfaceError(
                        f"lrface is {self._version} here and {lrface.__version__} on {os.uname().nodename}; install "
                        "the same version on every machine of the cluster"
                    )
                self._work = self._make()
            return self._work(task)
        except LrfaceError as error:
            return error


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():
            # Ray itself would go on trying for minutes.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        if address is None:
            ray.init(
                address="local",
                num_cpus=workers or len(os.sched_getaffinity(0)),
                include_dashboard=False,
                # Nothing that other machines could reach.
                _node_ip_address="127.0.0.1",
                # The smallest: tasks and results are paths and counts.
                object_store_memory=80 << 20,
                # The actors are the job, not a thing beside it: Ray would give them the lowest priority.
                _system_config={"worker_niceness": 0},
                **quiet,
            )
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = "a local Ray cluster" if address is None else f"the Ray cluster at {address}"
        raise LrfaceError(f"{where} cannot be reached: {_first_line(error)}") from error


def _room(ray: Any, address: str | None, gpus: float) -> int:
    """How many actors the cluster can hold."""
    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 0))
    if gpus:
        room = min(room, int(resources.get("GPU", 0) / gpus))
    if room < 1:
        found = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        raise LrfaceError(
            f"the Ray cluster {'' if address is None else f'at {address} '}offers {found}; a worker needs one CPU"
            + (f" and {gpus:g} GPU" if gpus else "")
        )
    return room


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
