"""Workers on a Ray cluster: each cell one Ray task, scheduled and retried by Ray, on whichever machine has room."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peftkit.errors import PeftkitError
from peftkit_bench import record
from peftkit_bench.cell import Finished, Job
from peftkit_bench.cells import DECISIVE, Cell, compiled, versions
from peftkit_bench.preparing import weights_hash
from peftkit_bench.tasks.contract import Prepared
from peftkit_bench.workers import Outcome, work

RETRIES = 3
"""Times that Ray starts a cell again whose process or machine died."""
ANSWER_SECONDS = 10.0
"""How long an address is waited for."""
LOOK_SECONDS = 10.0
"""How often the cluster is asked whether it has grown, while cells run."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class ClusterError(PeftkitError, RuntimeError):
    """Ray is not installed, no cluster answers, or it has nothing that a cell could run on."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What Ray may use of one machine."""

    cpus: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """What each cell is given, the same for all so that their times can be compared."""

    cpus: int
    cells_per_gpu: int = 0
    """0: cells run on CPUs."""

    @classmethod
    def of(cls, machines: Sequence[Machine], jobs: int) -> Share:
        """The share of a cell.

        One GPU, with its part of the machine's CPUs, where any machine has one. Otherwise as many CPUs as the smallest
        machine has; where `jobs` is given, the most CPUs with which so many cells find room at the same time.

        Args:
            machines: of the cluster.
            jobs: cells at a time; 0: one a GPU, or one a machine.

        Raises:
            ClusterError: no machine has a CPU or a GPU for cells.
        """
        gpus = sum(machine.gpus for machine in machines)
        if gpus:
            each = max(1, math.ceil(jobs / gpus))
            cpus = min(machine.cpus // (machine.gpus * each) for machine in machines if machine.gpus)
            return cls(cpus=cpus, cells_per_gpu=each)
        sizes = [machine.cpus for machine in machines if machine.cpus]
        if not sizes:
            raise ClusterError(
                f"expected a Ray cluster with CPUs or GPUs, found {len(machines)} machines with none; "
                "start them with 'ray start --num-cpus N', or wait until they have joined"
            )
        if not jobs:
            return cls(cpus=min(sizes))
        fitting = [c for c in range(1, max(sizes) + 1) if sum(size // c for size in sizes) >= jobs]
        return cls(cpus=max(fitting, default=1))

    def room(self, machine: Machine) -> int:
        """How many cells a machine holds."""
        by_cpu = machine.cpus // self.cpus if self.cpus else None
        if not self.cells_per_gpu:
            return by_cpu or 0
        by_gpu = machine.gpus * self.cells_per_gpu
        return by_gpu if by_cpu is None else min(by_gpu, by_cpu)

    @property
    def threads(self) -> int:
        """Threads that a cell computes with."""
        return max(1, self.cpus)

    @property
    def options(self) -> dict[str, Any]:
        """The same as Ray has it."""
        return {"num_cpus": self.cpus, "num_gpus": 1 / self.cells_per_gpu if self.cells_per_gpu else 0}


class RayWorkers:
    """The machines of a Ray cluster; it is joined when something is first asked of it, and left after the last cell."""

    def __init__(self, address: str, jobs: int) -> None:
        """See the class.

        Args:
            address: "auto": the cluster that RAY_ADDRESS names or that this machine is in, else one that is started on
                this machine for the run; "local": one that is started; otherwise where the head is, "10.0.0.1:6379"
                from a machine of the cluster, "ray://10.0.0.1:10001" from any other.
            jobs: cells at a time; 0: as many as there is room for.

        Raises:
            ClusterError: Ray is not installed.
        """
        self._address, self._asked = address, jobs
        self._ray = _imported()
        self._joined = False

    @property
    def jobs(self) -> int:
        """See `Workers`."""
        return self._asked or self._room(self._machines())

    @property
    def where(self) -> str:
        """See `Workers`."""
        machines = self._machines()
        cpus, gpus = sum(each.cpus for each in machines), sum(each.gpus for each in machines)
        parts = [(len(machines), "machine"), (cpus, "CPU"), *([(gpus, "GPU")] if gpus else [])]
        cells = f"{self.jobs} cell{'s' * (self.jobs != 1)} at a time"
        return f"{cells} on Ray: " + ", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in parts)

    def outcomes(self, ready: Callable[[], Job | None]) -> Iterator[Outcome]:
        """See `Workers`; ends what runs, and leaves the cluster, when it is closed.

        The records' `jobs` is how many cells one machine may run at the same time: those of other machines do not
        disturb its times.
        """
        ray, share = self._ray, self._share
        # A process of its own for each cell, so that the peak of its memory is its own too.
        task = ray.remote(max_calls=1, max_retries=RETRIES, **share.options)(_run)
        running: dict[Any, Cell] = {}
        shared: dict[int, tuple[Prepared, Any]] = {}
        try:
            while True:
                machines = self._machines()
                own = {"threads": share.threads, "jobs": max([1, *(share.room(each) for each in machines)])}
                while len(running) < (self._asked or self._room(machines)) and (job := ready()) is not None:
                    if id(job.prepared) not in shared:
                        shared[id(job.prepared)] = job.prepared, ray.put(job.prepared)
                    plan = {f.name: getattr(job, f.name) for f in fields(job) if f.name != "prepared"}
                    running[task.remote(shared[id(job.prepared)][1], {**plan, **own})] = job.cell
                if not running:
                    return
                for done in ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS)[0]:
                    outcome = self._outcome(done)
                    yield running.pop(done), outcome
        finally:
            for left in running:
                # Whatever keeps a task from being cancelled, leaving the cluster ends it.
                with contextlib.suppress(Exception):
                    ray.cancel(left, force=True)
            self._leave()

    def _outcome(self, done: Any) -> Finished | str:
        try:
            found: Finished | str = self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            return _COLOUR.sub("", str(error))
        except self._ray.exceptions.RayError as error:
            return f"{_COLOUR.sub('', str(error))} Ray started the cell {RETRIES + 1} times."
        return found

    @functools.cached_property
    def _share(self) -> Share:
        return Share.of(self._machines(), self._asked)

    def _room(self, machines: Sequence[Machine]) -> int:
        return max(1, sum(self._share.room(each) for each in machines))

    def _machines(self) -> list[Machine]:
        """Of the cluster as it is now."""
        self._join()
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [Machine(cpus=int(each.get("CPU", 0)), gpus=int(each.get("GPU", 0))) for each in alive]

    def _join(self) -> None:
        ray = self._ray
        if ray.is_initialized():
            return
        # Read where a cluster is started here: no statistics are sent, and cells are run like other processes, whose
        # times they are compared with, not at Ray's low priority.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray has no option that keeps its notes on dead workers off the screen, where the progress is.
        internal: Any = importlib.import_module("ray._private.worker")
        internal._worker_logs_enabled = False
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        named = (os.environ.get("RAY_ADDRESS") or "auto") if self._address == "auto" else self._address
        try:
            _answers(named)
            try:
                ray.init(address=named, **quiet, **({"include_dashboard": False} if named == "local" else {}))
            except ConnectionError:
                if named != "auto":
                    raise
                ray.init(address="local", include_dashboard=False, **quiet)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray cluster could be joined at {named}: {error}\nStart one with 'ray start --head' and give the "
                "address that it prints; the machines need the same versions of Python and Ray"
            ) from None
        self._joined = True

    def _leave(self) -> None:
        """Leaves a cluster that was joined, and ends one that was started, here; the caller's own is left as it is."""
        if self._joined:
            self._joined = False
            self._ray.shutdown()


def _imported() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ClusterError("Ray is not installed, which --ray needs; pip install 'peftkit[ray]'") from None


def _answers(address: str) -> None:
    """Raises OSError where nobody listens at host:port, of which Ray would make sure for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()


def _run(prepared: Prepared, plan: Mapping[str, Any]) -> Finished | str:
    """One cell, on the machine that Ray chose; what is wrong with the machine or the cell as text."""
    job = Job(prepared=prepared, **plan)
    here = {
        **record.environment(),
        "versions": versions(),
        "compiled": compiled(),
        "commit": job.environment.get("commit"),
    }
    return difference(job, here["versions"]) or work(Job(prepared=prepared, **{**plan, "environment": here}))


def difference(job: Job, found: Mapping[str, str]) -> str | None:
    """Why this machine would not give what the cell's key promises; None where it would.

    Args:
        job: the cell, with the versions of the machine that planned it in its environment.
        found: the versions here.
    """
    wanted = job.environment["versions"]
    counted = [each for each in DECISIVE if each != "peft" or job.cell.contender.subject == "peft"]
    others = [
        f"{each} {found.get(each, 'missing')} instead of {wanted[each]}"
        for each in counted
        if each in wanted and found.get(each) != wanted[each]
    ]
    if others:
        return (
            f"a machine of the cluster has {', '.join(others)}; install the versions of the machine that starts the "
            "run on all of them"
        )
    folder, wanted_hash = job.prepared.folder, job.prepared.backbone["hash"]
    if wanted_hash is not None and weights_hash(Path(folder)) != wanted_hash:
        what = "other weights" if Path(folder).is_dir() else "no folder"
        return (
            f"a machine of the cluster has {what} at {folder}, where the backbone is on the machine that starts the "
            "run; put it on a shared disk, at the same path everywhere"
        )
    return None
