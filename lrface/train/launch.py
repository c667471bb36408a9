"""Processes of a distributed run: where this one stands, and lrface's own launcher for one machine.

A process is told its place by the launcher here, by torchrun (both: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT) or by srun (SLURM_PROCID, SLURM_LOCALID and the SLURM_STEP_... of its step).
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from lrface.errors import UsageError

PIPE = "LRFACE_LAUNCHER_PIPE"  # number of the descriptor that closes when the launcher ends
GRACE = 10.0  # seconds that ranks get to end by themselves after one has failed
CONSEQUENCE = 3  # exit code of a rank that ends because of another
LOST = "lost contact with the other ranks"


@dataclass(frozen=True)
class Place:
    """Where a process stands: ``rank`` of ``ranks`` in all, ``local_rank`` of ``local_ranks`` on its machine."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    address: str = ""
    port: int = 0

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Write it the way torchrun does, which PyTorch and Fabric read."""
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.ranks),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_ranks),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port),
        )


def find_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher gave this process, or None where there was no launcher.

    Raises:
        UsageError: a variable is missing or no number.
    """

    def number(name: str, default: int | None = None) -> int:
        text = environ.get(name, "" if default is None else str(default))
        if not text.isdigit():
            raise UsageError(
                f"the environment variable {name} must be a number in a distributed run; found {text!r}"
            )
        return int(text)

    if "RANK" in environ and "WORLD_SIZE" in environ:
        ranks = number("WORLD_SIZE")
        if ranks > 1 and not environ.get("MASTER_ADDR"):
            raise UsageError("RANK and WORLD_SIZE are set but MASTER_ADDR is not: start with torchrun")
        return Place(
            number("RANK"),
            ranks,
            number("LOCAL_RANK", 0),
            number("LOCAL_WORLD_SIZE", ranks),
            environ.get("MASTER_ADDR", ""),
            number("MASTER_PORT", 0 if ranks == 1 else None),
        )
    # Of a step of srun's, and not of the batch script around it, which has SLURM_PROCID and SLURM_NTASKS too.
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        ranks = number("SLURM_STEP_NUM_TASKS")
        nodes = number("SLURM_STEP_NUM_NODES", 1)
        if ranks % nodes:
            raise UsageError(
                f"srun started {ranks} tasks on {nodes} nodes; every node needs as many: --ntasks-per-node"
            )
        job = number("SLURM_JOB_ID", 0)
        return Place(
            number("SLURM_PROCID"),
            ranks,
            number("SLURM_LOCALID"),
            ranks // nodes,
            environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            # One port for all of a job without asking anybody; jobs that share a node differ in their numbers.
            number("MASTER_PORT", 20000 + job % 20000),
        )
    return None


def is_first() -> bool:
    """Whether this process speaks for its run: rank 0, or the only one."""
    place = find_place()
    return place is None or place.rank == 0


def wanted(devices: int, nodes: int) -> bool:
    """Whether this process is to start the ranks: the recipe asks for several, and nobody has started them.

    Raises:
        UsageError: a value below 1, or more than there are ranks.
    """
    place = find_place()
    return expected_ranks(devices, nodes, place) > 1 and place is None


def first_host(hosts: str) -> str:
    """The first machine of a SLURM list such as ``gpu[03-05,09],login1``."""
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", hosts)
    assert match is not None  # every group may be empty
    return "".join(part or "" for part in match.groups())


def expected_ranks(devices: int, nodes: int, place: Place | None) -> int:
    """How many ranks the run has: what its launcher says, and what the recipe says where there is none.

    Raises:
        UsageError: a value below 1, or the launcher and the recipe disagree.
    """
    for name, value in (("devices", devices), ("nodes", nodes)):
        if value < 1:
            raise UsageError(f"trainer.{name} must be at least 1; found {value}")
    wanted = devices * nodes
    if place is None:
        return wanted
    if wanted not in (1, place.ranks):
        raise UsageError(
            f"trainer.devices={devices} and trainer.nodes={nodes} ask for {wanted} ranks, but the launcher started "
            f"{place.ranks}; leave both out where torchrun or srun starts the processes"
        )
    return place.ranks


def check_batch(batch_size: int, ranks: int) -> None:
    """data.batch_size is that of all ranks together. Raises UsageError unless they can share it evenly."""
    if batch_size % ranks:
        lower = batch_size // ranks * ranks
        raise UsageError(
            f"data.batch_size={batch_size} is the batch of all {ranks} ranks together and must divide by {ranks}; take "
            f"{f'{lower} or ' if lower else ''}{lower + ranks}"
        )


def free_port() -> int:
    """A TCP port of this machine that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    command: Sequence[str],
    devices: int,
    nodes: int,
    say: Callable[[str], None],
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Run ``command`` in ``devices`` processes on this machine, one a rank, until all have ended.

    Rank 0 has this process's standard output and error; the others' errors are shown when one of them is the first to
    fail. SIGINT, SIGTERM and SIGUSR1 go on to every rank. When a rank fails, the others get ten seconds to end and are
    then killed; when this process dies, however it does, they end too. On several machines the same call runs on each,
    with NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment.

    Returns:
        0; 130 after Ctrl-C; 2 where the first rank to fail was called wrongly, else 1.

    Raises:
        UsageError: several nodes without the variables above.
    """
    address, port, node = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", ""), 0
    if nodes > 1:
        number = environ.get("NODE_RANK", "")
        if not (address and port.isdigit() and number.isdigit() and int(number) < nodes):
            raise UsageError(
                f"trainer.nodes={nodes}: run the same command on every machine with NODE_RANK=0 to {nodes - 1}, "
                "MASTER_ADDR (the machine of node 0) and MASTER_PORT (a free port there) in the environment, or let "
                "srun or torchrun start the processes"
            )
        node = int(number)
    else:
        address, port = "127.0.0.1", str(free_port())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours, theirs = os.pipe()  # the ranks hold the reading end of a pipe that is never written to
    children: list[subprocess.Popen[bytes]] = []
    outputs: list[IO[bytes] | None] = []
    first = node * devices
    forwarded: list[int] = []

    def forward(received: int, _frame: Any) -> None:
        forwarded.append(received)
        for child in children:
            if child.poll() is None:
                child.send_signal(received)

    old = {
        number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        for local in range(devices):
            # Threads of all ranks together are as many as there are cores: more would wait for each other.
            own = {"OMP_NUM_THREADS": str(max(1, cores // devices)), **environ, PIPE: str(ours)}
            Place(first + local, devices * nodes, local, devices, address, int(port)).export(own)
            output = None if local == 0 else tempfile.TemporaryFile()
            outputs.append(output)
            children.append(
                subprocess.Popen(
                    command,
                    env=own,
                    stdin=subprocess.DEVNULL,
                    stdout=None if local == 0 else subprocess.DEVNULL,
                    stderr=output,
                    pass_fds=(ours,),
                    start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
                )
            )
        codes = _watch(children, forwarded)
        good = _good(forwarded)
        if forwarded and node == 0 and codes[0] in (0, 130):
            # Rank 0 has saved what all ranks agreed on and said so. A rank that PyTorch aborts while it closes its
            # connections, the others being gone (seen once, under load), has nothing left to lose.
            good = good | {-signal.SIGABRT}
        if set(codes) <= good:
            return 0 if codes[0] in (None, CONSEQUENCE) else codes[0]
        return _report(codes, children, outputs, first, devices * nodes, say)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for received, handler in old.items():
            signal.signal(received, handler)
        for kept in outputs:
            if kept is not None:
                kept.close()
        os.close(ours)
        os.close(theirs)


def _good(forwarded: Sequence[int]) -> set[int]:
    """Exit codes that are no failure: when all were told to stop, one may have lost others that already had."""
    return {0, 130, CONSEQUENCE} if forwarded else {0}


def _watch(children: Sequence[subprocess.Popen[bytes]], forwarded: Sequence[int]) -> list[int | None]:
    """Exit codes of all, None for those that had to be killed because another had failed."""
    failed_at: float | None = None
    while True:
        codes = [child.poll() for child in children]
        if failed_at is None and any(code is not None and code not in _good(forwarded) for code in codes):
            failed_at = time.monotonic()
        if None not in codes:
            return codes
        if failed_at is not None and time.monotonic() - failed_at > GRACE:
            for child, code in zip(children, codes, strict=True):
                if code is None:
                    child.kill()
                    child.wait()
            return codes
        time.sleep(0.05)


def _report(
    codes: Sequence[int | None],
    children: Sequence[subprocess.Popen[bytes]],
    outputs: Sequence[IO[bytes] | None],
    first: int,
    ranks: int,
    say: Callable[[str], None],
) -> int:
    """Say which rank was the cause, with its own last words; returns the exit code of the run."""
    words: list[str] = []
    for output in outputs:
        text = ""
        if output is not None:
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
        words.append(text)
    # A rank that was killed did not choose to end; one that only lost the others is no cause.
    failed = {local: code for local, code in enumerate(codes) if code}
    local = min(failed, key=lambda index: (failed[index] > 0, failed[index] == CONSEQUENCE, index))
    silent = [index for index, code in enumerate(codes) if code is None]
    code = failed[local]
    if code == CONSEQUENCE and silent:  # nobody failed: one stood still until the others gave up
        local = silent[0]
    who = f"rank {first + local} of {ranks} (process {children[local].pid})"
    go_on = "the other ranks were stopped; the same command goes on from the last checkpoint"
    if code < 0:
        name = signal.Signals(-code).name
        why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        if words[local] and name != "SIGKILL":  # what aborts says why
            say("\n".join(words[local].splitlines()[-20:]))
        say(f"error: {who} was killed by {name}{why}; {go_on}")
        return 1
    if local not in failed:
        say(f"error: {who} gave no answer and was killed; {go_on}")
        return 1
    if words[local]:
        say("\n".join(words[local].splitlines()[-20:]))
    if code != 2:
        said = "above" if local == 0 or words[local] else "missing"
        say(f"error: {who} ended with exit code {code}, its message is {said}; {go_on}")
    return 2 if code == 2 else 1


def end_with_launcher(environ: MutableMapping[str, str] = os.environ) -> None:
    """In a rank: end at once when the launcher has ended without stopping it (it was killed)."""
    descriptor = environ.pop(PIPE, None)
    if descriptor is None:
        return

    def wait(number: int) -> None:
        os.read(number, 1)  # returns only when the other end is closed
        print("the launcher of this run is gone: ending", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait, args=(int(descriptor),), daemon=True).start()
