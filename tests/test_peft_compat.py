"""Adapter folders, both ways between peftkit and the installed Hugging Face peft, on four architectures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import NOISE, batch, built, randomise
from torch import nn

import peftkit
from peftkit.errors import CheckpointError

pytestmark = [
    # peft's own use of transformers, which is not what is tested here.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer of type Linear has no bias"),
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor\(s\) have invalid shape. \S*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B within the state dictionary"),
    pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B from state dictionary"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*Norm'>' encountered, proceed at your own risk"),
]

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}
FEED_FORWARD = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["intermediate.dense"], "t5": ["wo"]}
IA3_TARGETS = {
    "llama": ["k_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["key", "value"], "t5": ["k", "v"],
}  # fmt: skip
NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "bert": ["LayerNorm"],
    "t5": ["layer_norm", "final_layer_norm"],
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}

CASES = {
    "lora": {
        "plain": {"r": 4, "lora_alpha": 16},
        "dora": {"r": 4, "use_dora": True},
        "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
        "bias": {"r": 4, "lora_bias": True},
        "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
        "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
        "pissa": {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"},
        "olora": {"r": 4, "lora_alpha": 4, "init_lora_weights": "olora"},
    },
    "adalora": {"plain": {"init_r": 6, "target_r": 4, "total_step": 10, "lora_alpha": 16}},
    "vera": {
        "plain": {"r": 8, "projection_prng_key": 3},
        "regenerated": {"r": 8, "projection_prng_key": 3, "save_projection": False},
    },
    "loha": {"plain": {"r": 4, "alpha": 6}},
    "lokr": {
        "plain": {"r": 2, "alpha": 6},
        "both": {"r": 2, "alpha": 6, "decompose_both": True},
        "factor": {"r": 2, "decompose_factor": 4},
        "whole": {"r": 64, "alpha": 6},
    },
    "oft": {
        "plain": {"oft_block_size": 8},
        "exact": {"oft_block_size": 8, "use_cayley_neumann": False},
        "rank": {"r": 4, "oft_block_size": 0},
        "shared": {"oft_block_size": 8, "block_share": True},
    },
    "ia3": {"plain": {}},
    "prefix": {"plain": {"num_virtual_tokens": 5}, "projected": {
        "num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 12}},
    "prompt": {"plain": {"num_virtual_tokens": 5, "prompt_tuning_init": "RANDOM"}},
    "ptuning": {
        "mlp": {"num_virtual_tokens": 5, "encoder_hidden_size": 12},
        "lstm": {"num_virtual_tokens": 5, "encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
    },
    "layernorm": {"plain": {}},
}  # fmt: skip
"""Fields by method and case; every method that declares a peft format must be here."""

_NO_CONV1D = "Conv1D"
CANNOT: dict[tuple[str, str, str], str] = {
    **{(method, case, "gpt2"): _NO_CONV1D for method in ("loha", "lokr", "oft") for case in CASES[method]},
    # It decomposes the transposed weight as if it were not transposed, and swaps the two sides of the factors.
    ("lora", "olora", "gpt2"): "mat1 and mat2 shapes cannot be multiplied",
}
"""(method, case, backbone) -> what peft itself says when it is asked for that."""

PAIRS = [
    pytest.param(method, case, name, id=f"{method}-{case}-{name}")
    for method, cases in CASES.items()
    for case in cases
    for name in TARGETS
    if (method, case, name) not in CANNOT
]


def fields_for(method, case, name):
    """The fields of a case on a backbone, under the names that both libraries use."""
    fields = dict(CASES[method][case])
    if peftkit.METHODS[method].attach.value in ("weight",):
        fields["target_modules"] = TARGETS[name]
    if method == "ia3":
        fields["target_modules"] = [*IA3_TARGETS[name], *FEED_FORWARD[name]]
        fields["feedforward_modules"] = FEED_FORWARD[name]
    if name == "t5":
        fields.update(T5_LAYOUT.get(method, {}))
    if method == "layernorm":
        fields["target_modules"] = NORMS[name]
    return fields


def their_config(method, fields, name):
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peftkit.METHODS[method].peft.peft_type]
    known = {f.name for f in kind.__dataclass_fields__.values()}
    extra = {"fan_in_fan_out": True} if name == "gpt2" and "fan_in_fan_out" in known else {}
    return kind(**fields, **extra, task_type=TASKS[name])


def theirs(method, fields, name, seed=1):
    """A tiny model that peft adapted, with random adapter weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(built(name), their_config(method, fields, name)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(NOISE * torch.randn_like(parameter))
    return model


def ours(method, fields, name, seed=1, **options):
    """A tiny model that peftkit adapted, with random adapter weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peftkit.wrap(built(name), peftkit.METHODS[method].config(**fields), **options)
        return randomise(model, options.get("name", "default"), seed)


def output(name, model):
    """Logits of the real tokens; soft prompts put others before them."""
    inputs = batch(name, model if isinstance(model, nn.Module) else None)
    with torch.no_grad():
        found = model(**inputs).logits
    return found[:, -inputs["labels"].shape[1] :] if TASKS[name] != "SEQ_CLS" else found


T5_LAYOUT = {
    # peft stores as many rows again for the decoder, and computes without them; peftkit stores them when asked to.
    "prompt": {"num_transformer_submodules": 2},
}
OWN_LAYOUT = {
    ("ptuning", "t5"): "peft stores rows for the decoder and never uses them; peftkit leaves them out",
    ("prefix", "t5"): "peft gives encoder and decoder one prefix; peftkit trains one each",
}
SLACK = {
    # peft subtracts the start from the base weight, rounded to float32; peftkit leaves the weight alone.
    ("lora", "pissa"): 3.0,
    ("lora", "olora"): 3.0,
}


def assert_equal_logits(name, a, b, slack=1.0):
    first, second = output(name, a), output(name, b)
    assert first.shape == second.shape
    # 1e-6 for logits of order one; the sums in a product are ordered differently, so larger logits err by more.
    bound = slack * 1e-6 * max(1.0, float(first.abs().max()))
    assert float((first - second).abs().max()) <= bound
    assert float((first - output(name, built(name))).abs().max()) > 1e-3


def tensors_in(folder):
    return {key: tuple(value.shape) for key, value in load_file(folder / "adapter_model.safetensors").items()}


def test_every_method_with_a_peft_format_has_a_case():
    assert set(CASES) == {name for name, method in peftkit.METHODS.items() if method.peft is not None}


@pytest.mark.parametrize(("method", "case", "name"), PAIRS)
def test_folder_of_peft_loads_and_computes_the_same(method, case, name, tmp_path):
    model = theirs(method, fields_for(method, case, name), name)
    model.save_pretrained(tmp_path)
    loaded = peftkit.load(built(name), tmp_path)
    assert_equal_logits(name, model, loaded, SLACK.get((method, case), 1.0))


@pytest.mark.parametrize(("method", "case", "name"), PAIRS)
def test_folder_of_peftkit_loads_in_peft_and_computes_the_same(method, case, name, tmp_path):
    fields = fields_for(method, case, name)
    model = ours(method, fields, name)
    peftkit.save(model, tmp_path / "ours")
    # peft's AdaLoRA raises in a forward with labels unless it was loaded for training.
    loaded = peft.PeftModel.from_pretrained(built(name), tmp_path / "ours", is_trainable=method == "adalora").eval()
    assert_equal_logits(name, model, loaded, SLACK.get((method, case), 1.0))
    theirs(method, fields, name).save_pretrained(tmp_path / "theirs")
    if (method, name) in OWN_LAYOUT:
        return
    assert tensors_in(tmp_path / "ours") == tensors_in(tmp_path / "theirs")
    written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    expected = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    for key in CASES[method][case]:
        assert written[key] == expected[key], key
    assert written["peft_type"] == expected["peft_type"]
    assert written["task_type"] == expected["task_type"]


@pytest.mark.parametrize(("method", "case", "name"), sorted(CANNOT))
def test_peft_itself_cannot(method, case, name):
    with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError)) as caught:
        output(name, theirs(method, fields_for(method, case, name), name))
    assert CANNOT[method, case, name] in str(caught.value)


# LoRA's further forms -------------------------------------------------------------------------------------------------


def both_ways(name, theirs_config, fields, tmp_path, *, tokens=None):
    """A folder of each library, loaded in the other, computes the same and holds the same tensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(built(name), theirs_config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(NOISE * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    assert_equal_logits(name, model, peftkit.load(built(name), tmp_path / "theirs"))
    own = randomise(peftkit.wrap(built(name), peftkit.LoRA(**fields)))
    peftkit.save(own, tmp_path / "ours")
    assert_equal_logits(name, own, peft.PeftModel.from_pretrained(built(name), tmp_path / "ours").eval())
    return tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")


def test_rank_and_alpha_patterns_agree_both_ways(tmp_path):
    fields = {
        "r": 4, "lora_alpha": 8, "target_modules": TARGETS["llama"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "^model.layers.0.mlp.gate_proj": 3},
        "alpha_pattern": {"up_proj": 3, "layers.0.self_attn.v_proj": 5},
    }  # fmt: skip
    theirs, ours = both_ways("llama", peft.LoraConfig(**fields, task_type="CAUSAL_LM"), fields, tmp_path)
    assert ours == theirs


def test_layers_and_exclusions_agree_both_ways(tmp_path):
    fields = {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    theirs, ours = both_ways("llama", peft.LoraConfig(**fields, task_type="CAUSAL_LM"), fields, tmp_path / "layers")
    assert ours == theirs
    fields = {"r": 4, "target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"}
    theirs, ours = both_ways("llama", peft.LoraConfig(**fields, task_type="CAUSAL_LM"), fields, tmp_path / "exclude")
    assert ours == theirs


@pytest.mark.parametrize("target", ["all-linear", r".*self_attn\.(q|v)_proj"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_target_strings_agree_both_ways(target, name, tmp_path):
    target = target if name == "llama" or target == "all-linear" else r".*attention\.self\.(query|value)"
    fields = {"r": 4, "target_modules": target}
    theirs, ours = both_ways(name, peft.LoraConfig(**fields, task_type=TASKS[name]), fields, tmp_path)
    assert ours == theirs


def test_modules_to_save_agree_both_ways(tmp_path):
    fields = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}
    theirs, ours = both_ways("llama", peft.LoraConfig(**fields, task_type="CAUSAL_LM"), fields, tmp_path)
    assert ours == theirs


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as embedding layers found")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
def test_embeddings_agree_both_ways(name, tmp_path):
    table = "embed_tokens" if name == "llama" else "wte"
    fields = {"r": 4, "target_modules": [table, TARGETS[name][0]]}
    extra = {"fan_in_fan_out": True} if name == "gpt2" else {}
    theirs, ours = both_ways(name, peft.LoraConfig(**fields, **extra, task_type="CAUSAL_LM"), fields, tmp_path)
    # peft adds a copy of the frozen table to the folder, which the adapter does not need.
    assert ours == {key: shape for key, shape in theirs.items() if not key.endswith("base_layer.weight")}


def test_copy_of_a_base_embedding_in_a_folder_is_checked(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(built("llama"), config)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in tensors_in(tmp_path))
    peftkit.load(built("llama"), tmp_path)
    other = built("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 3] += 1
    with pytest.raises(
        peftkit.errors.BaseMismatchError, match=r"embed_tokens\.base_layer\.weight is a copy of the base"
    ):
        peftkit.load(other, tmp_path)
    peftkit.load(other, tmp_path, ignore=("base",))


def test_named_adapters_in_subfolders_load_both_ways(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(built("llama"), config, adapter_name="first")
    model.add_adapter("second", config)
    model.save_pretrained(tmp_path / "theirs")
    own = built("llama")
    for name in ("first", "second"):
        peftkit.load(own, tmp_path / "theirs", name=name)
        model.set_adapter(name)
        assert_equal_logits("llama", model, own)
    assert output("llama", own).shape
    for name in ("first", "second"):
        peftkit.save(own, tmp_path / "ours", name=name)
    again = peft.PeftModel.from_pretrained(built("llama"), tmp_path / "ours/first", adapter_name="first").eval()
    again.load_adapter(tmp_path / "ours/second", adapter_name="second")
    for name in ("first", "second"):
        again.set_adapter(name)
        peftkit.activate(own, name)
        assert_equal_logits("llama", again, own)


def test_dropout_and_half_precision_survive_the_folder(tmp_path):
    fields = {"r": 4, "lora_dropout": 0.25, "target_modules": ["q_proj"]}
    model = ours("lora", fields, "llama", dtype=torch.bfloat16)
    peftkit.save(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    loaded = peftkit.load(built("llama"), tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).lora_dropout == 0.25
    assert_equal_logits("llama", peft.PeftModel.from_pretrained(built("llama"), tmp_path).eval(), loaded)


# What peftkit does not compute is refused, by field and value ---------------------------------------------------------

REFUSED = {
    "bias": "all",
    "layer_replication": [[0, 2], [0, 2]],
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1, 2],
    "target_parameters": ["a.b"],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "arrow_config": {"top_k": 3},
    "lora_ga_config": {"direction": "x"},
    "use_bdlora": {"nblocks": 2},
}


@pytest.mark.parametrize("key", REFUSED)
def test_folder_with_a_field_that_changes_the_maths_is_refused(key, tmp_path):
    theirs("lora", fields_for("lora", "plain", "llama"), "llama").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: REFUSED[key]}))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {key}=.* is not implemented by peftkit's lora"):
        peftkit.load(built("llama"), tmp_path)


# Bytes ---------------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
sys.path[:0] = {paths!r}
import peftkit, torch
from tiny import built, randomise
for name, (method, fields) in json.loads({work!r}).items():
    fields = {{k: set(v) if isinstance(v, list) else v for k, v in fields.items()}}
    torch.manual_seed(1)
    model = randomise(peftkit.wrap(built("llama"), peftkit.METHODS[method].config(**fields)))
    peftkit.save(model, sys.argv[1] + "/" + name, about={{"b": 1, "a": 2}})
"""


@pytest.mark.slow
def test_folders_are_the_same_bytes_in_every_process(tmp_path):
    here = Path(__file__).parent
    work = {method: (method, fields_for(method, next(iter(cases)), "llama")) for method, cases in CASES.items()}
    patterns = {"rank_pattern": {"q_proj": 2, "v_proj": 3}, "modules_to_save": ["input_layernorm", "lm_head"]}
    work["patterns"] = ("lora", {"target_modules": TARGETS["llama"], **patterns})
    script = SCRIPT.format(paths=[str(here), str(here.parent)], work=json.dumps(work))
    running = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / seed)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        assert process.wait() == 0, process.stderr.read()
        process.stderr.close()
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert len(files) == 4 * len(work)
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file
