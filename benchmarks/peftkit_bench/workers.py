"""Workers of this machine: each cell in a process of its own, one a GPU where there are GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import BaseContext
from typing import Any, Protocol

import torch
from transformers.models.auto.configuration_auto import model_type_to_module_name

from peftkit_bench import cell as cells_module
from peftkit_bench.cell import Finished, Job
from peftkit_bench.cells import Cell

EXIT_SECONDS = 10.0
"""Time that a process has to end in after it has sent its outcome."""
Outcome = tuple[Cell, Finished | str]
"""A cell with what came out of it, or with what went wrong."""


class Workers(Protocol):
    """Where cells are run."""

    @property
    def jobs(self) -> int:
        """Cells that are run at the same time."""

    @property
    def where(self) -> str:
        """What they run on, for the screen."""

    def outcomes(self, ready: Callable[[], Job | None]) -> Iterator[Outcome]:
        """Each cell's outcome as it finishes; ends when nothing runs and nothing is ready.

        Args:
            ready: the next job that can be run now; None: none can, before something that runs has finished.
        """


def work(job: Job) -> Finished | str:
    """Runs one cell in this process; what went wrong as text, so that it can be sent anywhere."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Before the cell's clock starts. Models whose code comes from elsewhere have no such module.
    with contextlib.suppress(ImportError):
        importlib.import_module(modeling(job.prepared.backbone["type"]))
    try:
        return cells_module.run_cell(job)
    except Exception:
        return traceback.format_exc()


def modeling(kind: str) -> str:
    """The module of transformers that has the models of a type."""
    name = model_type_to_module_name(kind)
    return f"transformers.models.{name}.modeling_{name}"


@dataclass(kw_only=True)
class _Worker:
    """A process that runs a cell."""

    process: Any
    cell: Cell
    slot: int


class LocalWorkers:
    """Processes of this machine, one for each cell, with its cores shared among those that run at the same time."""

    def __init__(self, jobs: int, backbone_type: str) -> None:
        self.jobs = jobs
        self.gpus = torch.cuda.device_count()
        self._kind = backbone_type

    @property
    def where(self) -> str:
        """See `Workers`."""
        place = f"{self.gpus} GPU{'s' * (self.gpus != 1)}" if self.gpus else "the CPU"
        return f"{self.jobs} cell{'s' * (self.jobs != 1)} at a time on {place}"

    def outcomes(self, ready: Callable[[], Job | None]) -> Iterator[Outcome]:
        """See `Workers`; ends the processes when it is closed."""
        workers: dict[Any, _Worker] = {}
        context = _context(self._kind)
        try:
            while True:
                while len(workers) < self.jobs and (job := ready()) is not None:
                    slot = min(set(range(self.jobs)) - {each.slot for each in workers.values()})
                    try:
                        receiver, process = self._started(context, job, slot)
                    except (OSError, EOFError) as error:
                        yield job.cell, f"no process could be started that takes the cell: {error!r}"
                    else:
                        workers[receiver] = _Worker(process=process, cell=job.cell, slot=slot)
                if not workers:
                    return
                for receiver in connection.wait(list(workers)):
                    outcome = _received(receiver, workers[receiver].process)
                    yield workers.pop(receiver).cell, outcome
        finally:
            for receiver, worker in workers.items():
                worker.process.kill()
                worker.process.join()
                receiver.close()

    def _started(self, context: BaseContext, job: Job, slot: int) -> tuple[Any, Any]:
        """Where the outcome will come from, and the process.

        Raises:
            OSError: the process ended before it had read its job, or the system has no room for another one.
        """
        shown = None
        if self.gpus:
            gpu = slot % self.gpus
            shown = _visible(gpu)
            job = dataclasses.replace(job, environment={**job.environment, "gpu": gpu})
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, job, shown), daemon=True)  # type: ignore[attr-defined]
        try:
            process.start()
        except BaseException:
            receiver.close()
            raise
        finally:
            sender.close()
        return receiver, process


def _received(receiver: Any, process: Any) -> Finished | str:
    """What a process sent, or how it ended; it has ended in any case."""
    try:
        outcome: Finished | str = receiver.recv()
    except (EOFError, OSError):
        process.join()
        outcome = f"the process {_ending(process.exitcode)} before the cell was finished"
    process.join(EXIT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    receiver.close()
    return outcome


def _ending(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    # So do the kernel and container runtimes when memory runs out, and nothing else of itself.
    why = " (out of memory, if nobody did)" if name == "SIGKILL" else ""
    return f"was ended by signal {name}{why}"


def _context(kind: str) -> BaseContext:
    """Where workers come from: on Linux forks of a process that has done the imports and nothing else.

    Elsewhere each does its own: libraries that macOS loads with them do not survive a fork.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, modeling(kind)])
    return context


def _child(sender: connection.Connection, job: Job, shown: str | None) -> None:
    """A process's whole life: one cell, and its record or the traceback sent back.

    Args:
        shown: the name of the one GPU that it may see; None: there is none.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if shown is not None:
        # Before CUDA is first used in this process.
        os.environ["CUDA_VISIBLE_DEVICES"] = shown
    sender.send(work(job))
    sender.close()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, which nobody else does where the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _visible(gpu: int) -> str:
    """The name of one of the GPUs that this process was shown."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",")[gpu].strip() if shown else str(gpu)
