"""Workers of this machine: each cell in a process of its own, one a GPU where there are GPUs."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.context import BaseContext
from typing import Any, Protocol

import torch

from peftkit_bench import cell as running
from peftkit_bench.cell import Finished, Job
from peftkit_bench.cells import Cell

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
    try:
        return running.run_cell(job)
    except Exception:
        return traceback.format_exc()


class LocalWorkers:
    """Processes of this machine, with its cores shared among them."""

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
        running: dict[Any, tuple[Any, Cell, int]] = {}
        context = _context(self._kind)
        try:
            while True:
                while len(running) < self.jobs and (job := ready()) is not None:
                    slot = min(set(range(self.jobs)) - {taken for _, _, taken in running.values()})
                    receiver, sender = context.Pipe(duplex=False)
                    gpu = slot % self.gpus if self.gpus else None
                    process = context.Process(target=_child, args=(sender, job, gpu), daemon=True)  # type: ignore[attr-defined]
                    process.start()
                    sender.close()
                    running[receiver] = (process, job.cell, slot)
                if not running:
                    return
                for found in connection.wait(list(running)):
                    source: Any = found
                    process, cell, _ = running.pop(source)
                    try:
                        outcome = source.recv()
                    except EOFError:
                        process.join()
                        outcome = f"the process ended with status {process.exitcode} before the cell was finished"
                    process.join()
                    source.close()
                    yield cell, outcome
        finally:
            for process, _, _ in running.values():
                process.kill()
                process.join()


def _context(kind: str) -> BaseContext:
    """Where workers come from: forks of a process that has done the imports and nothing else, where there is fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, f"transformers.models.{kind}.modeling_{kind}"])
    return context


def _child(sender: connection.Connection, job: Job, gpu: int | None) -> None:
    """A process's whole life: one cell, and its record or the traceback sent back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its workers
    if gpu is not None:
        # Before CUDA is first used in this process, so that the cell sees one GPU, its own.
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(gpu)
        job = dataclasses.replace(job, environment={**job.environment, "gpu": gpu})
    sender.send(work(job))
    sender.close()


def _visible(gpu: int) -> str:
    """The name of one of the GPUs that this process was shown."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",")[gpu] if shown else str(gpu)
