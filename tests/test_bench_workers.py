from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peftkit_bench import workers
from peftkit_bench.cell import Job
from peftkit_bench.workers import LocalWorkers

LONG = 600.0


def play(job: Job) -> Any:
    """What a cell of these tests does, in place of training: its name says."""
    what, _, value = job.cell.name.partition(" ")  # type: ignore[union-attr]
    if what == "sleep":
        time.sleep(float(value))
    elif what == "exit":
        os._exit(int(value))
    elif what == "signal":
        os.kill(os.getpid(), getattr(signal, value))
    elif what == "raise":
        raise ValueError(value)
    elif what == "half":
        # The length of a message, and less than that of it, as when a process is killed while it sends.
        sender = sys._getframe(2).f_locals["sender"]
        os.write(sender.fileno(), (1000).to_bytes(4, "big") + b"x")
        os._exit(0)
    elif what == "linger":
        import threading

        threading.Thread(target=time.sleep, args=(LONG,)).start()
    elif what == "wait":
        Path(value).write_text(str(os.getpid()))
        time.sleep(LONG)
    return SimpleNamespace(
        name=job.cell.name,
        shown=os.environ.get("CUDA_VISIBLE_DEVICES"),
        gpu=job.environment.get("gpu"),
        pid=os.getpid(),
    )


def child(sender: Any, job: Job, shown: str | None) -> None:
    workers.cells_module.run_cell = play  # type: ignore[assignment]
    workers._child(sender, job, shown)


class Started:
    """Makes processes that `play`, where the real ones train; they import what these tests import, and no more."""

    def __init__(self, real: Any) -> None:
        self.real, self.Pipe = real, real.Pipe

    def Process(self, target: object, args: tuple[Any, ...], daemon: bool) -> Any:  # multiprocessing's
        assert target is workers._child
        return self.real.Process(target=child, args=args, daemon=daemon)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalWorkers]:
    real = workers._context
    monkeypatch.setattr(workers, "_context", lambda kind: Started(real(kind)))

    def made(jobs: int, gpus: int = 0) -> LocalWorkers:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return LocalWorkers(jobs, "no-such-model")

    return made


def job(name: str, size: int = 0) -> Any:
    prepared: Any = SimpleNamespace(backbone={"type": "no-such-model"}, ballast=b"x" * size)
    cell: Any = SimpleNamespace(name=name)
    return Job(suite=None, prepared=prepared, cell=cell, environment={}, threads=1, jobs=1)  # type: ignore[arg-type]


def supply(*names: str) -> Callable[[], Job | None]:
    waiting = iter(names)
    return lambda: next((job(name) for name in waiting), None)


def test_local_workers_give_outcomes_as_they_finish(local) -> None:
    found = [(cell.name, outcome.name) for cell, outcome in local(3).outcomes(supply("sleep 1.5", "a", "b"))]
    assert found[-1] == ("sleep 1.5", "sleep 1.5")
    assert sorted(found[:2]) == [("a", "a"), ("b", "b")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exit 7", "the process ended with status 7 before the cell was finished"),
        ("exit 0", "the process ended with status 0 before the cell was finished"),
        ("signal SIGKILL", r"ended by signal SIGKILL \(out of memory, if nobody did\) before the cell was finished"),
        ("signal SIGSEGV", r"ended by signal SIGSEGV before the cell"),
        ("half", "ended with status 0 before the cell was finished"),
        ("raise no such thing", r"(?s)Traceback.*ValueError: no such thing"),
    ],
)
def test_local_workers_tell_how_a_cell_ended_and_go_on(local, name: str, said: str) -> None:
    found = {cell.name: outcome for cell, outcome in local(1).outcomes(supply("a", name, "b"))}
    assert list(found) == ["a", name, "b"]
    assert isinstance(found[name], str)
    assert re.search(said, found[name])
    assert (found["a"].name, found["b"].name) == ("a", "b")


def test_local_workers_run_each_cell_in_a_process_of_its_own(local) -> None:
    pids = {outcome.pid for _, outcome in local(1).outcomes(supply("a", "b", "c"))}
    assert len(pids) == 3
    assert os.getpid() not in pids


def test_process_that_does_not_end_after_its_outcome_is_ended(local, monkeypatch) -> None:
    monkeypatch.setattr(workers, "EXIT_SECONDS", 0.3)
    start = time.monotonic()
    found = [outcome.name for _, outcome in local(1).outcomes(supply("linger", "a"))]
    assert found == ["linger", "a"]
    assert time.monotonic() - start < LONG / 2


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for a moment."""
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


def appeared(path: Path) -> int:
    """The process id in a file, waited for."""
    for _ in range(1800):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.1)
    pytest.fail(f"{path} was never written")


def test_closing_ends_what_runs(local, tmp_path) -> None:
    outcomes = local(2).outcomes(supply("sleep 0.5", f"wait {tmp_path / 'pid'}"))
    assert next(outcomes)[0].name == "sleep 0.5"
    pid = appeared(tmp_path / "pid")
    outcomes.close()
    assert gone(pid)


def test_interrupt_while_waiting_ends_what_runs(local, tmp_path, monkeypatch) -> None:
    real = workers.connection.wait
    interrupts = [KeyboardInterrupt]

    def interrupted(sources: Any, timeout: float | None = None) -> Any:
        appeared(tmp_path / "pid")
        if interrupts:
            raise interrupts.pop()
        return real(sources, timeout)

    monkeypatch.setattr(workers.connection, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(local(1).outcomes(supply(f"wait {tmp_path / 'pid'}")))
    assert gone(appeared(tmp_path / "pid"))


def test_cells_end_when_the_process_that_started_them_is_killed(tmp_path) -> None:
    code = (
        "import sys, test_bench_workers as t\n"
        "from peftkit_bench import workers\n"
        "if __name__ == '__main__':\n"
        "    real = workers._context\n"
        "    workers._context = lambda kind: t.Started(real(kind))\n"
        "    list(workers.LocalWorkers(1, 'no-such-model').outcomes(t.supply('wait ' + sys.argv[1])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], env=environment) as driver:
        pid = appeared(tmp_path / "pid")
        driver.kill()
    assert gone(pid)


def test_search_that_grows_is_run_to_its_end(local) -> None:
    """A trial is ready only when the one before it has its outcome; cells beside it do not end the run early."""
    seen: list[str] = []
    asked: list[str | None] = []
    trials = {f"trial {n}": n for n in range(4)}

    def ready() -> Job | None:
        started = [name for name in asked if name is not None]
        name = next((t for t, n in trials.items() if t not in started and (n == 0 or f"trial {n - 1}" in seen)), None)
        if name is None and "sleep 1" not in started:
            name = "sleep 1"
        asked.append(name)
        return job(name) if name is not None else None

    for cell, _ in local(3).outcomes(ready):
        seen.append(cell.name)
    assert sorted(seen) == ["sleep 1", *trials]
    assert None in asked


@pytest.mark.parametrize("shown", [None, "5, GPU-abc,7"])
def test_each_process_sees_one_gpu_and_no_gpu_has_two_while_there_are_enough(local, monkeypatch, shown) -> None:
    if shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    names = ["0", "1", "2"] if shown is None else ["5", "GPU-abc", "7"]
    running: list[int] = []
    found = local(3, gpus=3)
    assert found.where == "3 cells at a time on 3 GPUs"
    real = found._started

    def spied(real_context: object, each: Job, slot: int) -> Any:
        running.append(slot)
        return real(real_context, each, slot)

    monkeypatch.setattr(found, "_started", spied)
    ended = []
    for cell, outcome in found.outcomes(supply("sleep 1.2", "sleep 0.2", "sleep 1.2", "a", "b")):
        assert outcome.shown == names[outcome.gpu]
        ended.append((cell.name, outcome.gpu))
    assert running[:3] == [0, 1, 2]
    # The second GPU is free first, and takes what waits until another one is.
    assert ended[0] == ("sleep 0.2", 1)
    assert ("a", 1) in ended


def test_more_cells_than_gpus_share_them_evenly(local) -> None:
    found = [outcome.gpu for _, outcome in local(4, gpus=2).outcomes(supply(*["sleep 1"] * 4))]
    assert sorted(found) == [0, 0, 1, 1]


def test_without_gpus_what_is_visible_stays_as_it_is(local) -> None:
    ((_, outcome),) = local(8).outcomes(supply("a"))
    assert (outcome.shown, outcome.gpu) == (os.environ.get("CUDA_VISIBLE_DEVICES"), None)


def test_process_that_cannot_take_its_job_is_told_and_the_others_go_on(local, monkeypatch) -> None:
    found = local(2)
    real = found._started

    def broken(real_context: Any, each: Any, slot: int) -> Any:
        if each.cell.name == "broken":
            raise BrokenPipeError(32, "Broken pipe")
        return real(real_context, each, slot)

    monkeypatch.setattr(found, "_started", broken)
    outcomes = {cell.name: outcome for cell, outcome in found.outcomes(supply("broken", "a"))}
    assert outcomes["broken"] == ("no process could be started that takes the cell: BrokenPipeError(32, 'Broken pipe')")
    assert outcomes["a"].name == "a"


def test_platforms_without_safe_forks_start_new_processes(monkeypatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sys, "platform", "darwin")
        spawning = workers._context("bert")
    assert isinstance(spawning, context.SpawnContext)
    monkeypatch.setattr(workers, "_context", lambda kind: Started(spawning))
    ((_, outcome),) = LocalWorkers(1, "bert").outcomes(supply("a"))
    assert outcome.name == "a"


@pytest.mark.parametrize(
    ("kind", "module"), [("bert", "bert.modeling_bert"), ("xlm-roberta", "xlm_roberta.modeling_xlm_roberta")]
)
def test_what_is_imported_before_a_cell_is_the_module_of_the_backbone(kind: str, module: str) -> None:
    assert workers.modeling(kind) == f"transformers.models.{module}"


def test_nothing_asks_for_gpus_before_processes_are_forked() -> None:
    """A process that has, and those that are forked from it, see the same GPUs whatever they are told later."""
    code = (
        "import json, sys, traceback, torch\n"
        "asked = []\n"
        "def spy(name, value):\n"
        "    def called(*a, **k):\n"
        "        asked.append(name + ' ' + traceback.format_stack()[-2])\n"
        "        return value\n"
        "    return called\n"
        "torch.cuda.is_available = spy('is_available', False)\n"
        "torch.cuda.device_count = spy('device_count', 0)\n"
        "torch.cuda.init = spy('init', None)\n"
        "from peftkit_bench import workers\n"
        "__import__(workers.modeling('bert'))\n"
        "print(json.dumps(asked))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
