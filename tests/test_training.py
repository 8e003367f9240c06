"""Training through the stock transformers.Trainer: adapter-only checkpoints, exact resumption, schedules."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import peftkit
from peftkit import training
from peftkit.errors import ConfigError, StateError, TrainingError

pytestmark = [
    # transformers pins memory in its data loader whether there is an accelerator or not.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
]

ADALORA = peftkit.AdaLoRA(init_r=4, target_r=2, tinit=2, tfinal=2, target_modules=("query", "value"))
CONFIGS = {
    "lora": peftkit.LoRA(r=2, lora_dropout=0.1),
    "adalora": ADALORA,
    "prefix": peftkit.METHODS["prefix"].config(num_virtual_tokens=3),
}


def model_with(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cfg = BertConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=2,
        )
        model = BertForSequenceClassification(cfg).to(dtype)
        return model if config is None else peftkit.wrap(model, config)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token rows whose label is whether the first token is in the upper half of the vocabulary."""

    def __init__(self, count: int, seed: int) -> None:
        self.tokens = torch.randint(0, 64, (count, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": (row[0] >= 32).long()}


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "save_steps": 4,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 11,
            "logging_steps": 1000,
            **fields,
        }
    )


def trainer(model: nn.Module, folder: Path, callbacks: list[Any] | None = None, **fields: Any) -> Trainer:
    return Trainer(
        model=model,
        args=arguments(folder, **fields),
        train_dataset=Rows(40, 1),
        eval_dataset=Rows(16, 2),
        callbacks=[training.callback(model), *(callbacks or [])],
    )


class StopAt(TrainerCallback):
    """Interrupts training as a killed job does, right after the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    return [k for k in first if not torch.equal(first[k], second[k])]


@pytest.mark.parametrize("method", CONFIGS)
def test_trainer_resumes_to_the_same_weights(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = model_with(CONFIGS[method])
    trainer(whole, tmp_path / "whole").train()
    before = model_with(CONFIGS[method])
    assert any("peftkit" in key for key in differing(whole, before))
    with pytest.raises(KeyboardInterrupt):
        trainer(before, tmp_path / "cut", [StopAt(4)]).train()
    resumed = model_with(CONFIGS[method])
    caplog.clear()
    trainer(resumed, tmp_path / "cut").train(resume_from_checkpoint=True)
    assert differing(whole, resumed) == []
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text


@pytest.mark.parametrize("method", CONFIGS)
def test_trainer_checkpoint_holds_the_adapters_and_nothing_of_the_base(method: str, tmp_path: Path) -> None:
    model = model_with(CONFIGS[method])
    trainer(model, tmp_path, max_steps=5).train() if method != "adalora" else trainer(
        model, tmp_path, max_steps=6
    ).train()
    folder = next(tmp_path.glob("checkpoint-4"))
    held = safetensors.torch.load_file(folder / "model.safetensors")
    assert held
    assert set(held) == {k for k in model.state_dict() if "peftkit" in k.split(".")}
    base = sum(p.numel() for p in model_with(None).parameters())
    assert sum(t.numel() for t in held.values()) < base / 2
    assert not any(n.name.startswith("pytorch_model") for n in folder.iterdir())
    again = peftkit.load(model_with(None), folder)
    own = model_with(CONFIGS[method])
    own.load_state_dict(held, strict=False)
    torch.testing.assert_close(logits(again), logits(own), rtol=0, atol=1e-6)
    assert (logits(again) - logits(model_with(CONFIGS[method]))).abs().max() > 1e-5


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=Rows(8, 3).tokens).logits


def test_trainer_prunes_adalora_and_saves_what_is_left(tmp_path: Path) -> None:
    model = model_with(ADALORA)
    run = trainer(model, tmp_path)
    run.train()
    allocator = model.get_submodule("peftkit.default")
    assert (allocator.steps, allocator.final, allocator.live()) == (8, True, 8)
    run.save_model(tmp_path / "final")
    again = peftkit.load(model_with(None), tmp_path / "final")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "final" / "adapter_config.json").read_text())["total_step"] == 8


def test_trainer_drives_adalora_through_accumulation_warmup_clipping_and_bf16(tmp_path: Path) -> None:
    model = model_with(ADALORA)
    losses = []

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer(
        model,
        tmp_path,
        [Losses()],
        gradient_accumulation_steps=3,
        warmup_steps=3,
        max_grad_norm=0.5,
        bf16=True,
        max_steps=16,
        logging_steps=8,
    ).train()
    allocator = model.get_submodule("peftkit.default")
    assert (allocator.steps, allocator.final, allocator.live()) == (16, True, 8)
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_trainer_stops_early_and_warns_of_the_unfinished_budget(tmp_path: Path) -> None:
    model = model_with(ADALORA)
    run = trainer(
        model,
        tmp_path,
        [EarlyStoppingCallback(early_stopping_patience=1)],
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        max_steps=400,
        learning_rate=1e-12,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        label_smoothing_factor=0.0,
    )
    with pytest.warns(UserWarning, match=r"training ended at step \d+ of total_step=400"):
        run.train()
    assert run.state.global_step < 400


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_trainer_loads_the_best_checkpoint_at_the_end(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_with(CONFIGS[method])
    seen: dict[int, dict[str, Tensor]] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen[state.global_step] = copy.deepcopy(model.state_dict())

    scores = iter([0.1, 0.9, 0.5])
    run = trainer(
        model,
        tmp_path,
        [Keep()],
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        max_steps=12,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.compute_metrics = lambda _: {"score": next(scores)}
    if method == "adalora":
        with pytest.warns(UserWarning, match="training ended at step 8 of total_step=12"):
            run.train()
    else:
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-8")
    after = model.state_dict()
    assert [k for k in after if not torch.equal(after[k], seen[8][k])] == []
    assert any(not torch.equal(seen[12][k], seen[8][k]) for k in after)
    assert "missing keys" not in caplog.text


def test_stock_trainer_without_the_callback_says_what_to_do(tmp_path: Path) -> None:
    model = model_with(ADALORA)
    run = Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(40, 1))
    with pytest.raises(TrainingError, match=r"total_step.*set_total_steps.*peftkit.training.callback\(model\)"):
        run.train()


def test_own_trainer_adds_the_callback_by_itself(tmp_path: Path) -> None:
    model = model_with(ADALORA)
    run = training.Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(40, 1))
    run.train()
    assert model.get_submodule("peftkit.default").live() == 8
    assert isinstance(run, Trainer)
    plain = training.Trainer(model=model_with(None), args=arguments(tmp_path), train_dataset=Rows(40, 1))
    assert not any("Peftkit" in type(c).__name__ for c in plain.callback_handler.callbacks)


def test_own_trainer_trains_adapters_on_a_quantized_base(tmp_path: Path) -> None:
    class Quantizer:
        is_trainable, is_qat_trainable = True, False

    model = model_with(CONFIGS["lora"])
    model.is_quantized, model.hf_quantizer = True, Quantizer()
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(40, 1))
    training.Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(40, 1))
    assert "_hf_peft_config_loaded" not in model.__dict__


def test_trainer_refuses_a_schedule_longer_than_the_training(tmp_path: Path) -> None:
    model = model_with(peftkit.AdaLoRA(total_step=50))
    with pytest.raises(TrainingError, match="final after 50 optimizer steps, but training ends after 8"):
        trainer(model, tmp_path).train()


def test_trainer_end_is_an_error_when_the_optimizer_bypassed_the_hooks(tmp_path: Path) -> None:
    model = model_with(ADALORA)
    run = trainer(model, tmp_path, max_steps=6, save_strategy="no")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def foreign(self: torch.optim.Optimizer, closure: Any = None) -> None:
        """What an engine with kernels of its own does: torch sees no step."""
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(parameter.grad, alpha=0.1)

    optimizer.step = types.MethodType(foreign, optimizer)
    run.optimizer = optimizer
    with pytest.raises(TrainingError, match="budget was never updated: 0 optimizer steps were seen"):
        run.train()


def test_training_of_a_merged_or_plain_model_is_no_schedule() -> None:
    plain = model_with(None)
    assert list(training.stepped_adapters(plain)) == []
    training.check_training_ended(plain)
    with pytest.raises(StateError, match="is not wrapped"):
        training.callback(plain)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        training.set_total_steps(model_with(ADALORA), 0)


# The two methods of a wrapped model -----------------------------------------------------------------------------------


def test_save_pretrained_writes_the_adapter_folder_only(tmp_path: Path) -> None:
    model = model_with(CONFIGS["lora"])
    peftkit.wrap(model, peftkit.BitFit(), name="bias")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "config.json").exists()
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "bias" / "adapter_model.safetensors").exists()
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_save_pretrained_refuses_what_an_adapter_folder_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="push_to_hub=True"):
        model_with(CONFIGS["lora"]).save_pretrained(tmp_path, push_to_hub=True)


def test_save_pretrained_of_the_unwrapped_model_is_its_own_again(tmp_path: Path) -> None:
    model = peftkit.unwrap(model_with(CONFIGS["lora"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_load_state_dict_reports_nothing_missing_for_all_the_adapters() -> None:
    model, other = model_with(CONFIGS["lora"]), model_with(CONFIGS["lora"])
    torch.nn.init.ones_(other.get_submodule("bert.encoder.layer.0.attention.self.query.peftkit.default").lora_B)
    held = training.adapter_state_dict(other)
    result = model.load_state_dict(held, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert differing(model, other) == []


def test_load_state_dict_reports_what_is_missing_otherwise() -> None:
    model = model_with(CONFIGS["lora"])
    held = training.adapter_state_dict(model)
    first = next(iter(held))
    del held[first]
    result = model.load_state_dict(held, strict=False)
    assert first in result.missing_keys
    assert "classifier.weight" in result.missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(training.adapter_state_dict(model))
    whole = model.load_state_dict(model.state_dict())
    assert (whole.missing_keys, whole.unexpected_keys) == ([], [])


def test_importing_peftkit_imports_no_transformers() -> None:
    code = "import sys, peftkit; assert 'transformers' not in sys.modules; peftkit.training.adapter_state_dict"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
