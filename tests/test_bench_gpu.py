"""The aims on a GPU: everything runs on a CPU at small sizes, and what fails or is missing is said."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peftkit_bench import gpu

CPU = torch.device("cpu")
AIMS = {
    ("lora_linear", "bfloat16 linear", 1.15),
    ("lora_linear", "frozen linear", 1.12),
    ("nf4_linear", "the bytes", 1.4),
    ("nf4_linear", "bitsandbytes, then LoRA", 1 / 1.5),
    ("merge_lora", "the bytes", 1 / 0.8),
    ("multi_lora", "the bytes", 1.5),
}


def without_bitsandbytes(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    monkeypatch.setattr(gpu, "ROUNDS", 1)


def test_every_aim_is_there_and_a_peer_that_is_not_installed_is_said(monkeypatch):
    without_bitsandbytes(monkeypatch)
    aims = gpu.measure(CPU)
    assert {(a.op, a.against, a.at_most) for a in aims if a.at_most is not None} == AIMS
    missing = [a for a in aims if a.against_seconds is None]
    assert [(a.against, a.note) for a in missing] == [
        ("bitsandbytes, then LoRA", "not measured: the peer is not installed")
    ]
    assert all(a.seconds is not None and a.seconds > 0 for a in aims)
    assert all(a.ratio == pytest.approx(a.seconds / a.against_seconds) for a in aims if a.against_seconds)


def test_one_that_fails_does_not_keep_the_others_from_being_measured(monkeypatch):
    without_bitsandbytes(monkeypatch)

    def fails(problems):
        raise RuntimeError("no kernel image\nis available")
        yield

    monkeypatch.setattr(gpu, "FILES", {"merge_lora": (fails, gpu._merging)})
    first, second = gpu.measure(CPU)
    assert (first.seconds, first.note) == (None, "RuntimeError: no kernel image")
    assert second.seconds is not None


def aim(**changes):
    whole = {
        "op": "nf4_linear", "label": "one row", "device": "cuda", "seconds": 3e-6, "against": "the bytes",
        "against_seconds": 2e-6, "ratio": 1.5, "at_most": 1.4, "compiled": True,
    }  # fmt: skip
    return gpu.Aim(**{**whole, **changes})


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({}, "| 3.0 µs | the bytes | 1.50 | 1.40 | no |"),
        ({"ratio": 1.3}, "| 3.0 µs | the bytes | 1.30 | 1.40 | yes |"),
        ({"compiled": False}, "| 3.0 µs (plain torch) | the bytes | 1.50 | 1.40 | no |"),
        ({"at_most": None}, "| 3.0 µs | the bytes | 1.50 | - | - |"),
        ({"device": "cpu"}, "| not measured | the bytes | no GPU | 1.40 | - |"),
        ({"seconds": None, "ratio": None, "note": "it broke"}, "| not measured | the bytes | it broke | 1.40 | - |"),
        ({"ratio": None, "note": "not measured: x"}, "| 3.0 µs | the bytes | not measured: x | 1.40 | - |"),
    ],
)
def test_table_tells_what_was_measured_from_what_was_not(changes, row):
    assert gpu.table([aim(**changes)]).splitlines()[-1] == f"| nf4_linear | one row {row}"


def test_command_records_nothing_without_a_gpu(monkeypatch, tmp_path, capsys):
    without_bitsandbytes(monkeypatch)
    monkeypatch.setattr(gpu, "FILES", {"merge_lora": (gpu._merging,)})
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "nothing is recorded" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
