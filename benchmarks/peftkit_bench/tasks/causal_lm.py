"""Causal language modelling: the tokens of plain text, or of completions; perplexity, exact answers, code that passes.

A row with a completion is a prompt (column `prompt`, or `text` where there is none) and what should follow it: the loss
counts the completion's tokens alone. Every other row is plain text: the loss counts all its tokens.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from peftkit_bench import sandbox
from peftkit_bench.spec import SuiteError
from peftkit_bench.tasks import loading
from peftkit_bench.tasks.batching import in_batches, masks, padded
from peftkit_bench.tasks.contract import Batch, Column, Prepared, RowError, Split

EVALUATION_ROWS = 8
"""Few, since the logits of a row are as large as the vocabulary times its length."""
GENERATION_ROWS = 32
SANDBOXES = 2
"""Programs that are run at a time."""
IGNORED = -100
MARK = "####"
"""What stands before the final answer in GSM8K and data sets after its example."""
_FENCED = re.compile(r"```[\w+-]*\n(.*?)(?:```|\Z)", re.S)


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """The next token."""

    name: ClassVar[str] = "causal-lm"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(name="text", what="plain text; the prompt where there is a completion", required=False,
               also=("content",)),
        Column(name="prompt", what="text", required=False, also=("question", "instruction", "problem")),
        Column(name="completion", what="text that should follow the prompt", required=False, answer=True,
               also=("answer", "output", "response", "solution", "code")),
        Column(name="tests", what="list of lines of Python, such as asserts", required=False, answer=True,
               also=("test_list",)),
        Column(name="setup", what="Python that stands between a program and its tests", required=False, answer=True,
               also=("test_setup_code",)),
    )  # fmt: skip
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "exact match", "pass rate")
    architecture: ClassVar[str] = "AutoModelForCausalLM"
    max_tokens: int = 256
    """Rows are cut to this many tokens: texts at the end, prompts at the front."""
    metric: str = "perplexity"
    """"exact match" and "pass rate" are of completions that the model generates, always the likeliest token."""
    max_new_tokens: int = 64
    """A generated completion is no longer."""
    template: str = "{prompt}\n"
    """What the model is shown of a row with a completion; may name {prompt}, and {test}, the first of its tests."""
    answer_pattern: str = ""
    """Regular expression of the final answer in a completion, its last match counts, and of that group 1 where there
    is one. Empty: what follows the last "####", or the whole completion where the row's own has no such mark."""
    program: str = "{completion}"
    """Of what the program that is run consists; may name {prompt} and {completion}."""
    seconds: float = sandbox.SECONDS
    """Each program has so long."""

    def __post_init__(self) -> None:
        """Checks what does not depend on the rows."""
        for name in ("max_tokens", "max_new_tokens"):
            if getattr(self, name) < 2:
                raise SuiteError(f"task, {name}: expected at least 2, found {getattr(self, name)}")
        if self.metric not in self.metrics:
            raise SuiteError(f"task, metric: expected one of {', '.join(self.metrics)}, found {self.metric!r}")
        for name, known in (("template", ("prompt", "test")), ("program", ("completion", "prompt"))):
            _check_template(name, getattr(self, name), known)
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise SuiteError(
                f"task, answer_pattern: {self.answer_pattern!r} is no regular expression: {error}"
            ) from None

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`: {"text"}, or {"prompt", "completion"} and what else the row has."""
        if row.get("completion") is None:
            if row.get("prompt") is not None:
                raise RowError("column 'completion' is missing, which should follow the row's 'prompt'")
            return {"text": loading.text(row, "text")}
        prompt = loading.text(row, "text" if row.get("prompt") is None else "prompt")
        found: dict[str, Any] = {"prompt": prompt, "completion": loading.text(row, "completion")}
        tests = row.get("tests")
        if tests is not None:
            if not isinstance(tests, list | tuple) or not tests or not all(isinstance(each, str) for each in tests):
                raise RowError(f"column 'tests': expected a list of lines of Python, found {tests!r:.80}")
            found["tests"] = list(tests)
        if row.get("setup"):
            found["setup"] = loading.text(row, "setup")
        if self.metric == "exact match" and self._answer(found["completion"], found["completion"]) is None:
            raise RowError(
                f"column 'completion': expected a final answer as answer_pattern {self.answer_pattern!r} finds it, "
                f"found {found['completion']!r:.80}"
            )
        return found

    def facts(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """See `Task`: nothing; what is judged by its completions has to have some."""
        needed = {"perplexity": (), "exact match": ("completion",), "pass rate": ("completion", "tests")}[self.metric]
        for split, found in rows.items():
            for column in needed:
                without = sum(column not in row for row in found)
                if without and split != "train":
                    raise RowError(
                        f"metric {self.metric!r} needs the column {column!r}, which {without} of {len(found)} {split} "
                        "rows lack"
                    )
        return {}

    def encode(self, tokenizer: Any, row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`: the tokens, and `start`, how many of them stand before the first that counts."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if "text" in row:
            ids = list(tokenizer(row["text"])["input_ids"])[: self.max_tokens]
            # A first token has nothing to be predicted from.
            return {"input_ids": ids, "start": 1}
        prompt = list(
            tokenizer(self.template.format(prompt=row["prompt"], test=(row.get("tests") or [""])[0]))["input_ids"]
        )
        if prompt[-1:] == end:
            prompt.pop()
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], *end]
        room = max(self.max_tokens - len(completion), self.max_tokens // 2)
        if len(prompt) > room:
            first = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
            prompt = [*first, *prompt[len(prompt) - room + len(first) :]]
        return {"input_ids": [*prompt, *completion][: self.max_tokens], "start": len(prompt)}

    def skeleton(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.skeleton(AutoModelForCausalLM, folder)

    def model(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.model(AutoModelForCausalLM, folder)

    def collate(self, encoded: Sequence[Mapping[str, Any]], padding: int) -> Batch:
        """See `Task`."""
        ids = [row["input_ids"] for row in encoded]
        labels = [[IGNORED] * row["start"] + row["input_ids"][row["start"] :] for row in encoded]
        return {"input_ids": padded(ids, padding), "attention_mask": masks(ids), "labels": padded(labels, IGNORED)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task`: the mean over the tokens that count."""
        nats, counted = _nats(model, batch)
        return nats.sum() / counted.sum().clamp(min=1)

    @torch.no_grad()
    def predict(self, model: nn.Module, prepared: Prepared, split: str) -> list[Any]:
        """See `Task`: [nats, tokens]; or the generated text; or {"text", "passed", "reason"} of a program."""
        if self.metric == "perplexity":
            return [list(each) for each in self._row_nats(model, prepared, split)]
        chosen = prepared.splits[split]
        texts = self._generate(model, prepared, chosen)
        if self.metric == "exact match":
            return list(texts)
        with ThreadPoolExecutor(SANDBOXES) as pool:
            return list(pool.map(self._judged, texts, chosen.rows))

    def _row_nats(self, model: nn.Module, prepared: Prepared, split: str) -> list[tuple[float, int]]:
        chosen = prepared.splits[split]
        found = [(0.0, 0)] * len(chosen)
        for rows, batch in in_batches(self, model, chosen, prepared.padding, EVALUATION_ROWS):
            nats, counted = _nats(model, batch)
            sums = nats.double().sum(1).tolist()
            for index, total, tokens in zip(rows, sums, counted.sum(1).tolist(), strict=True):
                found[index] = (total, tokens)
        return found

    @torch.no_grad()
    def nats(self, model: nn.Module, prepared: Prepared, split: str) -> float | None:
        """See `Task`."""
        found = self._row_nats(model, prepared, split)
        tokens = sum(count for _, count in found)
        return sum(total for total, _ in found) / tokens if tokens else None

    def _generate(self, model: Any, prepared: Prepared, chosen: Split) -> list[str]:
        """The completion that follows each prompt, greedily, without special tokens."""
        tokenizer = _tokenizer(prepared.folder)
        device = next(model.parameters()).device
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=prepared.padding,
            eos_token_id=tokenizer.eos_token_id,
        )
        prompts = [row["input_ids"][: row["start"]] for row in chosen.encoded]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found = [""] * len(prompts)
        for start in range(0, len(order), GENERATION_ROWS):
            rows = order[start : start + GENERATION_ROWS]
            # On the left, so that what is generated follows the prompt at once.
            ids = padded([prompts[i] for i in rows], prepared.padding, left=True).to(device)
            mask = masks([prompts[i] for i in rows], left=True).to(device)
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for index, new in zip(rows, made[:, ids.shape[1] :].tolist(), strict=True):
                found[index] = tokenizer.decode(new, skip_special_tokens=True)
        return found

    def _judged(self, text: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The generated text, and whether its program passes the row's tests."""
        fenced = _FENCED.search(text)
        program = self.program.format(prompt=row["prompt"], completion=fenced[1] if fenced else text)
        checks = "\n".join([row.get("setup", ""), *row["tests"]])
        outcome = sandbox.run(program, checks=checks, seconds=self.seconds)
        return {"text": text, "passed": outcome.passed, "reason": outcome.reason}

    def _answer(self, completion: str, reference: str) -> str | None:
        """The final answer in a completion, normalised; None where it has none."""
        if self.answer_pattern:
            matches = list(re.finditer(self.answer_pattern, completion))
            if not matches:
                return None
            last = matches[-1]
            return normalised(last[1] if last.re.groups and last[1] is not None else last[0])
        if MARK in reference:
            _, mark, answer = completion.rpartition(MARK)
            return normalised(answer.strip().partition("\n")[0]) if mark else None
        return normalised(completion)

    def counts(self, predictions: Sequence[Any], prepared: Prepared, split: str) -> list[tuple[float, ...]]:
        """See `Task`."""
        if self.metric == "perplexity":
            return [(float(nats), float(tokens)) for nats, tokens in predictions]
        if self.metric == "pass rate":
            return [(float(each["passed"]),) for each in predictions]
        references = [row["completion"] for row in prepared.splits[split].rows]
        return [
            (
                float(
                    (answer := self._answer(text, reference)) is not None
                    and answer == self._answer(reference, reference)
                ),
            )
            for text, reference in zip(predictions, references, strict=True)
        ]


def normalised(answer: str) -> str:
    """The answer without what does not matter: "$1,200.00 " and "1200" give "1200", " Yes." and "yes" give "yes"."""
    found = " ".join(unicodedata.normalize("NFKC", answer).casefold().split()).rstrip(".").strip()
    number = re.sub(r"(?<=\d),(?=\d{3})", "", found.removeprefix("$").removesuffix("%").strip())
    try:
        value = Decimal(number)
    except InvalidOperation:
        return found
    return f"{value.normalize():f}" if value.is_finite() else found


def _nats(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Nats of the tokens after the first, 0 where they do not count; whether they do; both (rows, tokens - 1)."""
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    # Where virtual tokens stand before a row, a model of another package gives logits for them too.
    logits = output.logits[:, -batch["input_ids"].shape[1] :][:, :-1]
    # Only where they count: logits in float32 are the largest tensor by far.
    nats = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    nats[counted] = F.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
    return nats, counted


def _check_template(name: str, template: str, known: Sequence[str]) -> None:
    """Raises a SuiteError unless the template names the first of the known fields, and no other than them."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise SuiteError(f"task, {name}: {template!r}: {error}; a brace that is meant as such is doubled") from None
    if known[0] not in fields or set(fields) - set(known):
        raise SuiteError(
            f"task, {name}: expected {{{known[0]}}}, and maybe {{{known[1]}}}, in it, found {template!r}; "
            "a brace that is meant as such is doubled"
        )


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)
