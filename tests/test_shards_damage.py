"""Damaged and hostile folders, requests that have no meaning, and the command line."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from shard_folders import LORA, adapter_folder, base_folder, tensors

import peftkit
from peftkit import cli
from peftkit.errors import BackboneError, CheckpointError, ConfigError, MergeError
from peftkit.shards import merge_shards, plan_shards


@pytest.fixture
def several(tmp_path):
    """A base of several files, and an adapter for it."""
    base = base_folder(tmp_path, "llama", torch.bfloat16, max_shard_size="20kB")
    return base, adapter_folder(tmp_path, base, peftkit.LoRA(**LORA)), tmp_path / "out"


@pytest.fixture
def single(tmp_path):
    """A base of one file, and an adapter for it."""
    base = base_folder(tmp_path)
    return base, adapter_folder(tmp_path, base, peftkit.LoRA(**LORA)), tmp_path / "out"


def reindexed(base, change):
    """Changes the index of a base."""
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def with_header(file, change):
    """Rewrites the header of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_a_missing_file(several):
    base, adapter, out = several
    gone = sorted(base.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d files that .*index.json names are missing, first {gone.name}"):
        merge_shards(base, adapter, out)


@pytest.mark.parametrize("name", ["../base2/model.safetensors", "/etc/passwd", "a\\b.safetensors", "model.bin", 7])
def test_an_index_that_leads_elsewhere(several, name):
    base, adapter, out = several
    reindexed(base, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is said to be in .*damaged or hostile"):
        merge_shards(base, adapter, out)


def test_an_index_that_promises_what_is_not_there(several):
    base, adapter, out = several
    reindexed(base, lambda index: index["weight_map"].update({"x.weight": index["weight_map"]["lm_head.weight"]}))
    with pytest.raises(CheckpointError, match=r"names 1 tensors in .* that are not there, first 'x.weight'"):
        merge_shards(base, adapter, out)


def test_a_tensor_in_two_files(several):
    from safetensors.torch import load_file, save_file

    base, adapter, out = several
    files = sorted(base.glob("*.safetensors"))
    name = "lm_head.weight"
    holder = next(f for f in files if name in load_file(f))
    other = next(f for f in files if f != holder)
    save_file({**load_file(other), name: torch.zeros(48, 32, dtype=torch.bfloat16)}, other)
    merge_shards(base, adapter, out)
    assert float(tensors(out)[name].abs().max()) > 0
    reindexed(base, lambda index: index["weight_map"].pop(name))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is in .* and in .* does not say which one counts"):
        merge_shards(base, adapter, out.with_name("more"))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (3, r"no safetensors file, or a truncated one"),
        (100, r"truncated one: a header"),
        (-1, r"is truncated: its head"),
    ],
)
def test_a_truncated_file(single, cut, message):
    base, adapter, out = single
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=message):
        merge_shards(base, adapter, out)
    assert not out.exists()


def test_something_behind_the_last_tensor(single):
    base, adapter, out = single
    with (base / "model.safetensors").open("ab") as file:
        file.write(b"x" * 9)
    with pytest.raises(CheckpointError, match=r"is followed by something else: its header describes"):
        merge_shards(base, adapter, out)


NORM = "model.norm.weight"
HEADERS = {
    "overlap": (lambda h: h[NORM].update(data_offsets=[0, 128]), r"the bytes of .* begin at"),
    "negative": (lambda h: h[NORM].update(data_offsets=[-128, 0]), r"has no dtype, shape and range of bytes"),
    "size": (lambda h: h[NORM].update(shape=[31]), r"shape \(31,\) of F32 and 128 bytes, which do not agree"),
    "huge": (lambda h: h[NORM].update(shape=[2**62, 8]), r"which do not agree"),
    "dtype": (lambda h: h[NORM].update(dtype="Q4_0"), r"has the unknown dtype 'Q4_0'"),
    "list": (lambda h: "[]", r"the header is a list"),
    "words": (lambda h: "{", r"the header is damaged"),
    "deep": (lambda h: "[" * 100_000, r"the header is damaged"),
    "twice": (lambda h: '{"a": {}, "a": {}}', r"a name stands in it twice"),
    "about": (lambda h: h.update(__metadata__={"format": 1}), r"__metadata__ is no object of texts"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header(single, case):
    base, adapter, out = single
    change, message = HEADERS[case]
    with_header(base / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        merge_shards(base, adapter, out)


def test_weights_as_pickles_are_not_opened(single):
    base, adapter, out = single
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds its weights as pickles \(pytorch_model.bin\).*save_pretrained"):
        merge_shards(base, adapter, out)


def test_no_weights_no_folder_no_adapter(single, tmp_path):
    base, adapter, out = single
    with pytest.raises(CheckpointError, match=r"nowhere is no folder; .*hf download NAME --local-dir FOLDER"):
        merge_shards(tmp_path / "nowhere", adapter, out)
    with pytest.raises(CheckpointError, match=r"expected an adapter folder with adapter_config.json"):
        merge_shards(base, tmp_path / "nowhere", out)
    with pytest.raises(ConfigError, match=r"no adapter is given"):
        merge_shards(base, [], out)
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        merge_shards(base, adapter, out)


def test_a_quantized_base_is_refused_with_the_next_step(single):
    base, adapter, out = single
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match=r"is stored quantized \(bitsandbytes\).*original 16-bit weights as BASE"):
        merge_shards(base, adapter, out)


def test_weights_that_cannot_be_folded_into_are_refused(single):
    from shard_folders import rewritten

    base, adapter, out = single
    key = "model.layers.0.self_attn.q_proj.weight"
    rewritten(base, lambda found: {**found, key: found[key].to(torch.float8_e4m3fn)})
    with pytest.raises(MergeError, match=rf"{key} is stored as F8_E4M3; adapters are folded into F64, F32, F16, BF16"):
        merge_shards(base, adapter, out, ignore=("base",))


def test_code_of_a_checkpoint_is_never_run(single):
    base, adapter, out = single
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(out)!r}, 'w').write('ran')")
    with pytest.raises(BackboneError, match=r"code from a checkpoint is never run.*give it as model="):
        merge_shards(base, adapter, out)
    assert not out.exists()


def test_a_shape_that_is_not_the_models(single):
    base, adapter, out = single
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))
    with pytest.raises(
        CheckpointError, match=r"has shape \(32, 64\), and .*down_proj.weight in Llama.* has \(32, 65\)"
    ):
        merge_shards(base, adapter, out)


@pytest.mark.parametrize("method", [m for m, found in peftkit.METHODS.items() if not found.mergeable])
def test_methods_that_cannot_be_merged(tmp_path, method):
    from test_conformance import SMALL

    base = base_folder(tmp_path, "bert")
    adapter = adapter_folder(tmp_path, base, peftkit.METHODS[method].config(**SMALL.get(method, {})))
    with pytest.raises(MergeError, match=rf"{method} \(.*adapter\) cannot be merged: it is no change of weights"):
        merge_shards(base, adapter, tmp_path / "out")


def test_requests_without_a_meaning(single):
    base, adapter, out = single
    for options, message in (
        ({"into": "nf4"}, r"into='nf4': a folder is merged into bf16, fp16, fp32"),
        ({"ignore": ("missing",)}, r"ignore takes 'unexpected' and 'base', found 'missing'"),
        ({"max_memory": "lots"}, r"max_memory='lots': expected a number of bytes such as"),
        ({"max_memory": "2 parsecs"}, r"expected a number of bytes such as 2000000000, '2GB' or '512MiB'"),
        ({"shard_size": 0}, r"shard_size must be a positive number of bytes, found 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge_shards(base, adapter, out, **options)
    for weight in (0, float("nan"), float("inf"), "1", True):
        with pytest.raises(ConfigError, match=r"the weight of .* must be a finite number other than 0, found"):
            merge_shards(base, {adapter: weight}, out)
    with pytest.raises(ConfigError, match=r"an adapter is given twice"):
        merge_shards(base, [adapter, adapter / "."], out)
    assert not out.exists()


def test_too_little_memory_says_how_much_is_needed(single):
    base, adapter, out = single
    with pytest.raises(MergeError, match=r"q_proj.weight takes [\d.]+ kB to be folded, .*max_memory is 1 kB. Allow"):
        merge_shards(base, adapter, out, max_memory=1000)


def test_what_cannot_be_folded_by_rows_says_so(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoKr(target_modules=("q_proj",)))
    with pytest.raises(MergeError, match=r"to be folded, all at once, because lokr cannot be folded there by rows"):
        merge_shards(base, adapter, tmp_path / "out", max_memory=1000)
    plan_shards(base, adapter, tmp_path / "out")


# The command line ---------------------------------------------------------------------------------------------------


def run(capsys, *words):
    """Exit code, output and messages of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(w) for w in words])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def test_command_merges_and_says_what_is_kept(single, capsys):
    base, adapter, out = single
    code, told, messages = run(capsys, "merge", base, adapter, out, "--dry-run", "--into", "bf16")
    assert code == 0
    assert "14 tensors change, 7 are copied" in told
    assert not out.exists()
    code, told, messages = run(capsys, "merge", base, adapter, out, "--into", "bf16", "--shard-size", "1GB")
    assert code == 0, messages
    assert "merged adapter into 14 parameters: least effect kept" in told
    assert f"written: {out}" in told
    assert messages == ""
    code, told, messages = run(capsys, "merge", base, adapter, out)
    assert (code, told) == (2, "")
    assert "exists; choose another folder" in messages
    code, told, messages = run(capsys, "merge", base, adapter, out, "--overwrite", "--json")
    assert code == 0
    assert len(json.loads(told)["sites"]) == 14


def test_command_takes_weights(single, capsys, tmp_path):
    base, adapter, out = single
    other = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA), name="a=b", seed=8)
    code, _, messages = run(capsys, "merge", base, f"{adapter}=0.5", out, "--adapter", other)
    assert code == 0, messages
    assert json.loads((out / "merge_report.json").read_text())["adapters"] == ["adapter x 0.5", "a=b"]
    code, _, messages = run(capsys, "merge", base, f"{adapter}=much", tmp_path / "more")
    assert code == 2
    assert "expected FOLDER or FOLDER=WEIGHT, such as my-adapter=0.5" in messages
    code, _, messages = run(capsys, "merge", base, adapter, tmp_path / "more", "--adapter", f"{adapter}=2")
    assert code == 2
    assert "is given twice" in messages


def test_command_shows_bytes_and_time_left_on_a_terminal(single, capsys, monkeypatch):
    import io

    from peftkit.cli import merge as command

    base, adapter, out = single

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("COLUMNS", "120")
    with command._bar() as progress:
        merge_shards(base, adapter, out, progress=progress)
    assert "merging" in shown.getvalue()
    assert "/s" in shown.getvalue()
    assert "kB" in shown.getvalue()
