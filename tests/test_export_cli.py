"""`peftkit export`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exported import load_base, save_base, trained

import peftkit
from peftkit import cli


@pytest.fixture
def command(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    found = {"base": save_base("llama", root / "base")}
    for name, config in {"lora": peftkit.LoRA(r=4, use_rslora=True), "dora": peftkit.LoRA(r=4, use_dora=True)}.items():
        found[name] = peftkit.save(trained(load_base("llama", found["base"]), config), root / name)
    return found


@pytest.mark.parametrize("target", ["peft", "merged", "gguf", "vllm"])
def test_each_target_is_written_and_said(target, folders, command, tmp_path):
    code, out, err = command("export", folders["lora"], tmp_path / "out", "--to", target)
    assert (code, err) == (0, "")
    assert f"written for {target}: {tmp_path / 'out'}" in out
    assert "model.layers.0.self_attn.q_proj" in out
    assert (tmp_path / "out/README.md").exists()


def test_conversion_prints_its_error(folders, command, tmp_path):
    code, out, _ = command("export", folders["dora"], tmp_path / "out", "--to", "peft", "--rank", 8)
    assert code == 0
    assert "lora as LoRA of rank 8 on 4 weights in float32, as the nearest product of two factors" in out
    code, out, _ = command("export", folders["dora"], tmp_path / "json", "--to", "vllm", "--error", 0.5, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["totals"]["largest_error"] <= 0.5
    assert found["totals"]["exact"] is False
    assert found["sites"][0]["path"] == "model.layers.0.self_attn.q_proj"


def test_refusal_ends_with_its_message_and_writes_nothing(folders, command, tmp_path):
    code, out, err = command("export", folders["dora"], tmp_path / "out", "--to", "gguf")
    assert (code, out) == (2, "")
    assert err.startswith(
        "peftkit: the update of lora (DoraAdapter) at model.layers.0.self_attn.q_proj is not low-rank"
    )
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_export(folders, command, tmp_path):
    code, _, _ = command(
        "export", folders["lora"], tmp_path / "a.gguf", "--to", "gguf", "--dtype", "float16", "--base", folders["base"],
        "--base-name", "someone/llama",
    )  # fmt: skip
    assert code == 0
    content = (tmp_path / "a.gguf").read_bytes()
    assert b"someone/llama" in content
    code, _, err = command("export", folders["lora"], tmp_path / "a.gguf", "--to", "gguf")
    assert code == 2
    assert "a.gguf exists already" in err
    assert command("export", folders["lora"], tmp_path / "a.gguf", "--to", "gguf", "--overwrite")[0] == 0
    assert len((tmp_path / "a.gguf").read_bytes()) > len(content)
    code, _, err = command("export", folders["lora"], tmp_path / "v", "--to", "vllm", "--max-lora-rank", 1)
    assert code == 2
    assert "its rank is 4" in err
    assert command("export", folders["lora"], tmp_path / "m", "--to", "merged", "--into", "bf16")[0] == 0
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"


def test_adapter_of_another_name_is_found(folders, command, tmp_path):
    model = peftkit.load(load_base("llama", folders["base"]), folders["lora"], name="poems")
    peftkit.save(model, tmp_path / "several", name="poems")
    code, _, err = command("export", tmp_path / "several", tmp_path / "out", "--to", "peft")
    assert code == 2
    assert "it holds adapters in poems" in err
    assert command("export", tmp_path / "several", tmp_path / "out", "--to", "peft", "--name", "poems")[0] == 0
