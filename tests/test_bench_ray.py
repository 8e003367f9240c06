from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_suites import tiny_backbone, values, written
from peftkit_bench import engine, ray_workers, record
from peftkit_bench.ray_workers import ClusterError, Machine, RayWorkers, Share, difference
from peftkit_bench.record import Record

CONTENDERS = {"LoRA": {"method": "lora", "learning_rate": 0.01}}


# What a cell is given ------------------------------------------------------------------------------------------------


def cpus(*counts: int) -> list[Machine]:
    return [Machine(cpus=count, gpus=0) for count in counts]


@pytest.mark.parametrize(
    ("machines", "jobs", "cpus_each", "room"),
    [
        (cpus(8), 0, 8, 1),
        (cpus(8, 4), 0, 4, 3),  # the smallest machine's, so that cells are alike
        (cpus(0, 4), 0, 4, 1),  # a head that runs nothing
        (cpus(8, 8), 2, 8, 2),
        (cpus(8, 8), 4, 4, 4),
        (cpus(8, 2), 1, 8, 1),
        (cpus(8, 2), 2, 4, 2),
        (cpus(4, 4), 3, 2, 4),
        (cpus(1, 1), 7, 1, 2),
    ],
)
def test_share_of_cpus(machines: list[Machine], jobs: int, cpus_each: int, room: int) -> None:
    share = Share.of(machines, jobs)
    assert share.options == {"num_cpus": cpus_each, "num_gpus": 0}
    assert share.threads == cpus_each
    assert sum(share.room(machine) for machine in machines) == room


@pytest.mark.parametrize(
    ("machines", "jobs", "options", "room"),
    [
        ([Machine(cpus=16, gpus=2)], 0, {"num_cpus": 8, "num_gpus": 1}, 2),
        ([Machine(cpus=16, gpus=2), Machine(cpus=64, gpus=0)], 0, {"num_cpus": 8, "num_gpus": 1}, 2),
        ([Machine(cpus=16, gpus=2), Machine(cpus=12, gpus=4)], 3, {"num_cpus": 3, "num_gpus": 1}, 6),
        ([Machine(cpus=16, gpus=2)], 4, {"num_cpus": 4, "num_gpus": 0.5}, 4),
        ([Machine(cpus=1, gpus=2)], 0, {"num_cpus": 0, "num_gpus": 1}, 2),
    ],
)
def test_share_of_gpus(machines: list[Machine], jobs: int, options: dict[str, float], room: int) -> None:
    share = Share.of(machines, jobs)
    assert share.options == options
    assert share.threads == max(1, options["num_cpus"])
    assert sum(share.room(machine) for machine in machines) == room


def test_cluster_without_anything_to_run_on_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"found 1 machines with none; start them with 'ray start --num-cpus N'"):
        Share.of(cpus(0), 0)


# What is wrong with a machine ----------------------------------------------------------------------------------------


def planned(folder: Path, hash_: str | None, subject: str = "peftkit") -> Any:
    known = {"peftkit": "1", "torch": "2", "transformers": "5", "peft": "0.21"}
    return SimpleNamespace(
        environment={"versions": known},
        cell=SimpleNamespace(contender=SimpleNamespace(subject=subject)),
        prepared=SimpleNamespace(folder=str(folder), backbone={"hash": hash_}),
    )


def test_machine_with_other_versions_is_refused(tmp_path: Path) -> None:
    same = {"peftkit": "1", "torch": "2", "transformers": "5", "peft": "0.21"}
    assert difference(planned(tmp_path, None), same) is None
    found = difference(planned(tmp_path, None), {**same, "torch": "3", "transformers": "6"})
    assert found is not None
    assert "a machine of the cluster has torch 3 instead of 2, transformers 6 instead of 5; install" in found
    without_peft = {name: version for name, version in same.items() if name != "peft"}
    assert difference(planned(tmp_path, None), without_peft) is None
    assert "peft missing instead of 0.21" in str(difference(planned(tmp_path, None, "peft"), without_peft))


def test_machine_with_another_backbone_is_refused(tmp_path: Path) -> None:
    same = {"peftkit": "1", "torch": "2", "transformers": "5"}
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert difference(planned(tmp_path, "9af8a7d1f9e2b6c0"), same) is not None
    from peftkit_bench.preparing import weights_hash

    right = weights_hash(tmp_path)
    assert difference(planned(tmp_path, right), same) is None
    assert f"has other weights at {tmp_path}" in str(difference(planned(tmp_path, "0" * 16), same))
    gone = tmp_path / "gone"
    assert f"has no folder at {gone}, where the backbone is" in str(difference(planned(gone, right), same))


def test_missing_ray_is_said_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"pip install 'peftkit\[ray\]'"):
        RayWorkers("auto", 0)


def test_address_where_nobody_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=rf"joined at {address}: .*refused.*\nStart one with 'ray start --head'"):
            RayWorkers(address, 0).where  # noqa: B018  # joins
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match=rf"joined at {address}: "):
            RayWorkers("auto", 0).jobs  # noqa: B018  # joins


# A cluster -----------------------------------------------------------------------------------------------------------


def local_records(folder: Path) -> list[Record]:
    return [found for found in record.read(folder) if isinstance(found, Record)]


def result(found: Record) -> tuple[Any, ...]:
    """What a cell computed."""
    return found.losses, found.stopping, found.score, found.outcomes, found.adapter_parameters, found.threads


def cells_running() -> set[int]:
    """Processes that run a cell and were started, at some remove, by this one: Ray names them so."""
    parents: dict[int, int] = {}
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::_run"):
                found.add(pid)

    def mine(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and mine(parents[pid]))

    return {pid for pid in found if mine(pid)}


class Killer(threading.Thread):
    """Kills the first process that it has seen run a cell for a second; keeps all that it has seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: dict[int, float] = {}
        self.killed: int | None = None

    def run(self) -> None:
        while True:
            now = time.monotonic()
            for pid in cells_running():
                if now - self.seen.setdefault(pid, now) > 1 and self.killed is None:
                    os.kill(pid, signal.SIGKILL)
                    self.killed = pid
            time.sleep(0.05)


def on_cluster(folder: Path) -> dict[str, Any]:
    """What was seen of a run on two machines made of this one, where a cell's process is killed, and then a machine.

    For a process of its own: Ray leaves threads and sockets behind, which warnings would be about.
    """
    ray: Any = importlib.import_module("ray")
    cluster: Any = importlib.import_module("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    second = cluster.add_node(num_cpus=1)
    killer = Killer()
    killer.start()
    where: list[str] = []
    alive: list[int] = []

    class Losing(RayWorkers):
        """Workers that lose a machine after the first outcome."""

        def outcomes(self, ready: Any) -> Any:
            where.append(self.where)
            for number, found in enumerate(super().outcomes(ready)):
                if number == 0:
                    cluster.remove_node(second, allow_graceful=False)
                else:
                    limit = time.monotonic() + 60
                    while len(self._machines()) > 1 and time.monotonic() < limit:
                        time.sleep(0.1)  # Ray takes a while to notice
                alive.append(len(self._machines()))
                yield found

    ray_workers.RayWorkers = Losing  # type: ignore[misc]
    page = engine.run(folder / "smoke.yaml", folder / "ray", ray=cluster.address, progress=True)
    left = not ray.is_initialized()
    cluster.shutdown()
    return {
        "page": str(page),
        "where": where,
        "killed": killer.killed,
        "processes": len(killer.seen),
        "machines": alive,
        "left": left,
    }


@pytest.fixture
def temporary() -> Iterator[str]:
    """A folder with a short name, as the sockets in it have, for what Ray leaves behind; no other Ray looks there."""
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        yield folder


@pytest.mark.slow
def test_cells_on_two_machines_are_recorded_once_each_when_a_process_and_a_machine_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: str
) -> None:
    pytest.importorskip("ray", reason="Ray")
    if not Path("/proc/self/stat").exists():
        pytest.skip("/proc, where the processes of cells are found")
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "backbone").mkdir()
    suite = values(tiny_backbone(tmp_path / "backbone"), contenders=CONTENDERS, seeds=[0, 1, 2])
    written(tmp_path / "smoke.yaml", suite)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_TMPDIR": temporary,
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    code = "import json, sys, pathlib, test_bench_ray as t; print(json.dumps(t.on_cluster(pathlib.Path(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=350
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # and nothing else: Ray is silent
    assert "worker died" not in done.stderr
    assert told["where"] == ["2 cells at a time on Ray: 2 machines, 2 CPUs"]
    assert told["killed"] is not None
    assert told["processes"] > 3  # the killed cell ran again
    assert told["machines"][-1] == 1
    assert told["left"]
    assert Path(told["page"]).stat().st_size > 0
    found = local_records(tmp_path / "ray")
    assert sorted((r.contender, r.seed) for r in found) == [("LoRA", 0), ("LoRA", 1), ("LoRA", 2)]
    assert {(r.threads, r.jobs, r.environment["cores"]) for r in found} == {(1, 1, record.environment()["cores"])}
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # what the engine gives a cell at most
    engine.run(tmp_path / "smoke.yaml", tmp_path / "local", jobs=1, progress=False)
    here = {r.key: r for r in local_records(tmp_path / "local")}
    assert {r.key: result(r) for r in found} == {key: result(r) for key, r in here.items()}
