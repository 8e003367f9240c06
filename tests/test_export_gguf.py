"""GGUF LoRAs: read with gguf's own reader, applied by a llama that computes as llama.cpp does, compared by logits.

llama.cpp's arithmetic is written down a second time here, from its sources: the scale (src/llama-adapter.h), the shapes
that are checked when an adapter is loaded (src/llama-adapter.cpp), the rows that the base's converter moves
(conversion/llama.py), and the rotation of neighbouring rows that goes with them. Where llama.cpp itself is installed,
it is asked too.
"""

from __future__ import annotations

import builtins
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from exported import converted, deltas, load_base, save_base, trained
from tiny import batch, built, logits
from torch import nn

import peftkit
from peftkit.errors import ExportError
from peftkit.export import export
from peftkit.export.gguf import ARCHITECTURES

gguf = pytest.importorskip("gguf")

EVERY = "all-linear"
CONFIGS = {
    "lora": peftkit.LoRA(r=4, lora_alpha=16, target_modules=EVERY),
    "rslora": peftkit.LoRA(r=4, lora_alpha=16, use_rslora=True, target_modules=EVERY),
    "patterns": peftkit.LoRA(
        r=2, lora_alpha=3, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 9}, target_modules=EVERY
    ),
    "pissa": peftkit.LoRA(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=EVERY),
    "output": peftkit.LoRA(r=3, target_modules=["lm_head", "o_proj"]),
    "embedding": peftkit.LoRA(r=3, target_modules=["embed_tokens", "q_proj"]),
    "adalora": peftkit.AdaLoRA(init_r=4, target_r=2, total_step=10, target_modules=EVERY),
    "vera": peftkit.VeRA(r=6, target_modules=EVERY),
    "loha": peftkit.LoHa(r=2, alpha=3, target_modules=EVERY),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("base") / "llama")


def read(file: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """The metadata and the tensors of a GGUF file; a tensor of ne [a, b] as a matrix (b, a)."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = torch.tensor(values).reshape(shape).double()
    return fields, tensors


def updates(file: Path) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to each tensor of the base at a scale of 1: (out, in), and (tokens, width) for embeddings."""
    fields, tensors = read(file)
    alpha = fields["adapter.lora.alpha"]
    found = {}
    for name in sorted({n.rpartition(".")[0] for n in tensors}):
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        rank = b.shape[1]  # b->ne[0]
        scale = alpha / rank if alpha else 1.0
        if name == "token_embd.weight":
            found[name] = scale * a @ b.T  # a row of a for each token, then b
            continue
        assert a.shape[0] == rank
        found[name] = scale * b @ a
    return found


def run_llama(weights: dict[str, torch.Tensor], config, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a Llama as llama.cpp computes it: neighbouring rows of a head are rotated together.

    Args:
        tokens: (length,).
    """

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    theta = config.rope_parameters["rope_theta"]
    angles = torch.arange(len(tokens)).double()[:, None] * theta ** (-torch.arange(0, size, 2).double() / size)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., 0::2], x[..., 1::2]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)

    x = weights["token_embd.weight"][tokens]
    causal = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)
    for i in range(config.num_hidden_layers):
        block = {n.removeprefix(f"blk.{i}."): w for n, w in weights.items() if n.startswith(f"blk.{i}.")}
        h = norm(x, block["attn_norm.weight"])
        q, k, v = (h @ block[f"attn_{n}.weight"].T for n in "qkv")
        q = rotated(q.view(-1, heads, size))
        k = rotated(k.view(-1, groups, size)).repeat_interleave(heads // groups, 1)
        v = v.view(-1, groups, size).repeat_interleave(heads // groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + causal
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ block["attn_output.weight"].T
        h = norm(x, block["ffn_norm.weight"])
        gate = F.silu(h @ block["ffn_gate.weight"].T) * (h @ block["ffn_up.weight"].T)
        x = x + gate @ block["ffn_down.weight"].T
    return norm(x, weights["output_norm.weight"]) @ weights["output.weight"].T


def test_the_llama_below_is_the_llama_of_transformers(llama):
    model = load_base("llama", llama)
    tokens = batch("llama", model)["input_ids"][0]
    found = run_llama(converted(model), model.config, tokens)
    assert torch.allclose(found.float(), logits("llama", model)[0], atol=1e-5)


@pytest.mark.parametrize("label", list(CONFIGS))
def test_llama_cpp_computes_the_same(label, llama, tmp_path):
    model = trained(load_base("llama", llama), CONFIGS[label])
    peftkit.save(model, tmp_path / "adapter")
    made = export(model, tmp_path / "one.gguf", to="gguf")
    again = export(tmp_path / "adapter", tmp_path / "two.gguf", to="gguf")
    assert (made.exact, made.sites) == (True, again.sites)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    weights = converted(model)
    for name, update in updates(tmp_path / "one.gguf").items():
        weights[name] = weights[name] + update
    tokens = batch("llama", model)["input_ids"][0]
    expected = logits("llama", model)[0]
    found = run_llama(weights, model.config, tokens)
    # float32 on one side; sums of products in another order.
    assert float((found - expected).abs().max()) <= 3e-6 * max(1.0, float(expected.abs().max()))
    assert float((expected - logits("llama", load_base("llama", llama))[0]).abs().max()) > 1e-2


# Loads the base and an adapter into llama.cpp and prints the log-probabilities after a prompt.
ASK = """
import json, sys
import xllamacpp

folder, label, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = f"{folder}/base.gguf", 64, False, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if label:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = f"{folder}/{label}.gguf", 1.0
    params.lora_adapters = [adapter]
server = xllamacpp.Server(params)
answer = server.handle_completions({"prompt": prompt, "n_predict": 1, "temperature": 0.0, "logprobs": 48})
answer = json.loads(answer) if isinstance(answer, str) else answer
found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("ANSWER", json.dumps({entry["id"]: entry["logprob"] for entry in found}))
"""
PROMPT = [5, 17, 33, 9, 41, 12, 7, 20, 3, 44]


def write_base(file: Path, model) -> None:
    """The whole tiny Llama as a GGUF model, with a vocabulary of made-up pieces."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"p{i:02}" for i in range(3, config.vocab_size))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, weight in converted(model).items():
        writer.add_tensor(name, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(folder: Path, label: str) -> torch.Tensor:
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(folder), label, json.dumps(PROMPT)], capture_output=True, text=True, timeout=120
    )
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("ANSWER ")] or pytest.fail(done.stderr[-2000:])
    found = {int(k): v for k, v in json.loads(line.removeprefix("ANSWER ")).items()}
    return torch.tensor([found[i] for i in range(48)], dtype=torch.float64)


def test_llama_cpp_itself_computes_the_same(llama, tmp_path):
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("the package xllamacpp, which brings llama.cpp, is not installed")

    def expected(model) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([PROMPT])).logits[0, -1].double().log_softmax(-1)

    base = load_base("llama", llama)
    write_base(tmp_path / "base.gguf", base)
    without = expected(base)
    # Sums of products in float32 on both sides, ordered differently.
    assert float((ask(tmp_path, "") - without).abs().max()) <= 1e-5
    for label in ("patterns", "pissa", "embedding", "output"):
        model = trained(load_base("llama", llama), CONFIGS[label])
        export(model, tmp_path / f"{label}.gguf", to="gguf")
        meant = expected(model)
        assert float((ask(tmp_path, label) - meant).abs().max()) <= 1e-5, label
        assert float((meant - without).abs().max()) > 0.1


def test_file_says_what_llama_cpp_asks_for(llama, tmp_path):
    model = trained(load_base("llama", llama), CONFIGS["patterns"])
    export(model, tmp_path / "out.gguf", to="gguf", base_name="someone/llama")
    fields, tensors = read(tmp_path / "out.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 5.0
    assert fields["general.base_model.0.name"] == "someone/llama"
    assert str(fields["peftkit.base_hash"]).startswith("sha256:")
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(tensors) == {f"blk.{i}.{k}.weight.lora_{x}" for i in range(2) for k in kinds for x in "ab"}
    # llama.cpp takes ne[0] of b as the rank: (out, rank), and ne of a as (rank, in).
    assert tensors["blk.0.attn_q.weight.lora_a"].shape == (5, 32)
    assert tensors["blk.0.attn_q.weight.lora_b"].shape == (32, 5)
    assert tensors["blk.1.ffn_down.weight.lora_a"].shape == (2, 64)
    assert tensors["blk.1.attn_k.weight.lora_b"].shape == (16, 2)


def test_embedding_is_stored_by_rows_of_tokens(llama, tmp_path):
    export(trained(load_base("llama", llama), CONFIGS["embedding"]), tmp_path / "out.gguf", to="gguf")
    _, tensors = read(tmp_path / "out.gguf")
    assert tensors["token_embd.weight.lora_a"].shape == (48, 3)
    assert tensors["token_embd.weight.lora_b"].shape == (32, 3)


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_factors_are_stored_in_the_dtype_that_was_asked_for(dtype, kind, llama, tmp_path):
    model = trained(load_base("llama", llama), CONFIGS["patterns"])
    made = export(model, tmp_path / "out.gguf", to="gguf", dtype=dtype)
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors} == {kind}
    meant, found = deltas(model), updates(tmp_path / "out.gguf")
    site = next(s for s in made.sites if s.path == "model.layers.0.mlp.up_proj")
    truly = float((meant[site.path] - found["blk.0.ffn_up.weight"]).norm() / meant[site.path].norm())
    # The scale is folded in with a rounding of its own, for which the report is an upper bound.
    assert truly <= site.error_relative * 1.0001 + 1e-7
    assert site.error_relative <= {"float32": 1e-6, "float16": 4 * 2**-11, "bfloat16": 4 * 2**-8}[dtype]
    if dtype != "float32":
        assert site.error_relative <= 4 * truly


OTHERS = {
    "mistral": (EVERY, "llama", {"self_attn.q_proj": "attn_q", "mlp.gate_proj": "ffn_gate"}),
    "qwen2": (EVERY, "qwen2", {"self_attn.q_proj": "attn_q", "mlp.down_proj": "ffn_down"}),
    "gpt2": (EVERY, "gpt2", {"attn.c_attn": "attn_qkv", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_architectures_have_their_names_and_rows(name, tmp_path):
    targets, architecture, names = OTHERS[name]
    model = trained(built(name), peftkit.LoRA(r=3, lora_alpha=5, target_modules=targets))
    export(model, tmp_path / "out.gguf", to="gguf")
    fields, _ = read(tmp_path / "out.gguf")
    assert fields["general.architecture"] == architecture
    found, meant = updates(tmp_path / "out.gguf"), deltas(model)
    assert len(found) == len(meant)
    for path, update in meant.items():
        layer = path.split(".")[2]
        for ours, theirs in names.items():
            if path.endswith(ours):
                stored = found[f"blk.{layer}.{theirs}.weight"]
                if (name, theirs) == ("mistral", "attn_q"):
                    update = update.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
                assert torch.allclose(stored, update, atol=1e-6 * float(update.abs().max()))


def test_every_architecture_in_the_table_is_known_to_the_package():
    for kind, architecture in ARCHITECTURES.items():
        assert hasattr(gguf.MODEL_ARCH, architecture.name), kind
        assert kind in transformers.CONFIG_MAPPING


def test_folder_holds_the_file_and_its_card(llama, tmp_path):
    model = trained(load_base("llama", llama), CONFIGS["lora"])
    made = export(model, tmp_path / "out", to="gguf", about={"data": "poems"})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "adapter.gguf", "peftkit.json"]
    assert made.path == tmp_path / "out"
    card = (tmp_path / "out/README.md").read_text()
    assert "llama-cli -m base.gguf --lora adapter.gguf" in card
    assert "## Data\n\npoems" in card
    export(model, tmp_path / "alone.gguf", to="gguf")
    assert (tmp_path / "alone.gguf").read_bytes() == (tmp_path / "out/adapter.gguf").read_bytes()


def refused(model, tmp_path, match: str, **options) -> None:
    with pytest.raises(ExportError, match=match):
        export(model, tmp_path / "out", to="gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_llama_cpp_cannot_apply_is_refused(tmp_path):
    way_out = "--to merged"
    dora = trained(built("llama"), peftkit.LoRA(r=2, use_dora=True))
    refused(dora, tmp_path, r"lora \(DoraAdapter\) at model.layers.0.self_attn.q_proj is not low-rank")
    whole = trained(built("llama"), peftkit.LoRA(r=2, modules_to_save=["lm_head"]))
    refused(whole, tmp_path, rf"factors only, and lm_head was trained whole \(modules_to_save\).*{way_out}")
    head = trained(built("bert"), peftkit.LoRA(r=2))
    refused(head, tmp_path, r"classifier was trained whole")
    unknown = trained(built("bert"), peftkit.LoRA(r=2, modules_to_save=()))
    refused(unknown, tmp_path, rf"how llama.cpp stores bert models is not known here \(llama, mistral, .*{way_out}")
    plain = trained(built("mlp"), peftkit.LoRA(r=2, target_modules=["first"]))
    refused(plain, tmp_path, r"how llama.cpp stores Perceptron models is not known")
    prefix = peftkit.wrap(built("llama"), peftkit.PrefixTuning(num_virtual_tokens=2))
    refused(prefix, tmp_path, r"prefix is no change of weights, so no LoRA computes it")
    biased = trained(built("gpt2"), peftkit.LoRA(r=2, lora_bias=True))
    refused(biased, tmp_path, r"lora changes transformer.h.0.attn.c_attn.bias too", rank=2)


def test_dense_update_is_stored_at_a_rank_that_was_chosen(llama, tmp_path):
    model = trained(load_base("llama", llama), peftkit.LoRA(r=2, use_dora=True))
    made = export(model, tmp_path / "out.gguf", to="gguf", error=0.3)
    assert not made.exact
    found, meant = updates(tmp_path / "out.gguf"), deltas(model)
    path = "model.layers.1.self_attn.v_proj"
    truly = float((found["blk.1.attn_v.weight"] - meant[path]).norm() / meant[path].norm())
    assert truly == pytest.approx(next(s.error_relative for s in made.sites if s.path == path), rel=1e-4)
    assert truly <= 0.3


def test_tied_embeddings_are_refused(tmp_path):
    model = trained(built("gpt2"), peftkit.LoRA(r=2, target_modules=["wte"]))
    refused(model, tmp_path, r"transformer.wte.weight is tied to lm_head.weight, and llama.cpp.*would use it for both")
    model = trained(built("gpt2"), peftkit.LoRA(r=2, target_modules=["lm_head"]))
    refused(model, tmp_path, r"lm_head.weight is tied to transformer.wte.weight")


def test_module_without_a_tensor_is_refused(tmp_path):
    model = built("llama")
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    wrapped = peftkit.wrap(model, peftkit.LoRA(r=2, target_modules=["extra"]))
    refused(wrapped, tmp_path, r"llama.cpp's llama models have no tensor for model.layers.1.mlp.extra.weight")


def test_missing_package_is_said(tmp_path, monkeypatch):
    actual = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "gguf":
            raise ImportError(name)
        return actual(name, *arguments, **keywords)

    model = trained(built("llama"), peftkit.LoRA(r=2))
    monkeypatch.setattr(builtins, "__import__", without)
    refused(model, tmp_path, r"the package gguf is not installed; pip install 'peftkit\[export\]'")


def test_file_that_is_there_is_kept_unless_told(llama, tmp_path):
    model = trained(load_base("llama", llama), CONFIGS["lora"])
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(ExportError, match=r"out.gguf exists already; .*--overwrite"):
        export(model, tmp_path / "out.gguf", to="gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"
    export(model, tmp_path / "out.gguf", to="gguf", overwrite=True)
    assert read(tmp_path / "out.gguf")[0]["general.type"] == "adapter"
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ExportError, match=r"folder.gguf is a folder; choose a file name"):
        export(model, tmp_path / "folder.gguf", to="gguf", overwrite=True)


def test_write_that_fails_leaves_the_old_file_and_nothing_else(llama, tmp_path, monkeypatch):
    model = trained(load_base("llama", llama), CONFIGS["lora"])
    export(model, tmp_path / "out.gguf", to="gguf")
    before = (tmp_path / "out.gguf").read_bytes()

    def full(self, *_, **__):
        self.fout[0].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(
        peftkit.errors.CheckpointError, match=r"could not be written, and is as it was: .*No space left"
    ):
        export(model, tmp_path / "out.gguf", to="gguf", overwrite=True)
    assert (tmp_path / "out.gguf").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
