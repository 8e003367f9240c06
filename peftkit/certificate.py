"""The certificate of a merge: what was stored against what was meant, for each parameter and in total."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkit.errors import CheckpointError, MergeError

if TYPE_CHECKING:
    from peftkit_kernels import Stored

FILE = "merge_report.json"
"""Name of the report in an exported folder."""


@dataclass(frozen=True, kw_only=True)
class SiteMerge:
    """What merging did to one parameter. W is the weight before, W' the merged weight as it was meant."""

    path: str
    parameter: str
    dtype: str
    """How the parameter is stored afterwards: a dtype, "nf4", "fp4" or "int8"."""
    delta_relative: float
    """‖W' - W‖ / ‖W‖."""
    error_relative: float
    """‖stored - W'‖ / ‖W' - W‖; 0 where nothing was to change."""
    changed: float
    """Share of stored elements that changed; of codes, where codes are stored before and after."""
    effect_kept: float
    """⟨stored - W, W' - W⟩ / ‖W' - W‖²: 1 means that the whole effect is stored, 0 none of it."""
    delta_norm: float = 0.0
    """‖W' - W‖."""
    activation_error: float | None = None
    """‖X (stored - W')ᵀ‖ / ‖X (W' - W)ᵀ‖ on calibration inputs X; None: none were given."""
    activation_effect: float | None = None
    """The effect kept on calibration inputs, as in `effect_kept`; None: none were given."""
    original_error: float | None = None
    """‖stored - (W₁₆ + W' - W)‖ / ‖W' - W‖ with the original weight W₁₆; None: it was not given."""
    copied: bool = False
    """Whether the parameter was trained whole, as a new head is: what is meant is the trained copy itself."""
    residual_rank: int = 0
    """Rank of what stays beside the stored weight, and is counted as stored."""

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.parameter}".lstrip(".")


_COLUMNS = ("parameter", "stored as", "delta/weight", "error/delta", "changed", "effect kept")
_OPTIONAL = {
    "activation_error": "error/delta on inputs",
    "activation_effect": "effect kept on inputs",
    "original_error": "error/delta to the original",
}


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What merging did, parameter by parameter and in total. Prints as a table."""

    adapters: tuple[str, ...]
    sites: tuple[SiteMerge, ...]

    @property
    def effect_kept(self) -> float:
        """The least effect kept at any site, on calibration inputs where they were given; 1.0 without sites."""
        return min(map(kept_at, self.sites), default=1.0)

    @property
    def error_relative(self) -> float:
        """The largest relative error at any site."""
        return max((s.error_relative for s in self.sites), default=0.0)

    @property
    def total_effect(self) -> float:
        """The effect kept of all changes taken together as one vector; 1.0 without any change.

        Modules trained whole are left out of totals, unless there is nothing else.
        """
        return self._total(lambda s: s.effect_kept * s.delta_norm**2, 1.0)

    @property
    def kept(self) -> float:
        """The effect kept in total, on calibration inputs where they were given; what `minimum_effect` is about."""
        return self._total(lambda s: kept_at(s) * s.delta_norm**2, 1.0)

    @property
    def total_error(self) -> float:
        """The error of all weights taken together, relative to all changes; 0.0 without any change."""
        return math.sqrt(self._total(lambda s: (s.error_relative * s.delta_norm) ** 2, 0.0))

    def _total(self, part: Any, empty: float) -> float:
        # A head that was trained whole changes by many times what adapters do, and would hide what becomes of them.
        counted = [s for s in self.sites if not s.copied] or list(self.sites)
        whole = sum(s.delta_norm**2 for s in counted)
        return sum(map(part, counted)) / whole if whole else empty

    def to_json(self) -> str:
        """The report as JSON, with the totals."""
        totals = {
            "least_effect_kept": self.effect_kept,
            "largest_error": self.error_relative,
            "total_effect_kept": self.total_effect,
            "total_error": self.total_error,
        }
        return json.dumps({**asdict(self), "totals": totals}, indent=2, sort_keys=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as JSON; into a folder under the name merge_report.json.

        Raises:
            CheckpointError: it cannot be written.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            part = file.with_name(f".{file.name}.new")
            part.write_text(self.to_json() + "\n")
            part.replace(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be written: {error.strerror}") from None
        return file

    @classmethod
    def from_json(cls, text: str) -> MergeReport:
        """The report that `to_json` wrote.

        Raises:
            CheckpointError: the text is no such report.
        """
        names = {f.name for f in dataclasses.fields(SiteMerge)}
        try:
            found: Mapping[str, Any] = json.loads(text)
            sites = tuple(SiteMerge(**{k: v for k, v in s.items() if k in names}) for s in found["sites"])
            return cls(adapters=tuple(found["adapters"]), sites=sites)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"this is no merge report: {error}") from None

    def __str__(self) -> str:
        extra = [k for k in _OPTIONAL if any(getattr(s, k) is not None for s in self.sites)]
        rows = [(*_COLUMNS, *(_OPTIONAL[k] for k in extra))]
        rows += [(*_row(s), *(_number(getattr(s, k), k.endswith("effect")) for k in extra)) for s in self.sites]
        lines = _aligned(rows)
        lines.append(
            f"merged {', '.join(self.adapters)} into {len(self.sites)} parameters: "
            f"least effect kept {self.effect_kept:.4f}, largest error {self.error_relative:.2e} of the delta; "
            f"in total {self.total_effect:.4f} and {self.total_error:.2e}"
        )
        return "\n".join(lines)


def kept_at(site: SiteMerge) -> float:
    """The effect kept at a site: on calibration inputs where there were any, else of the weight."""
    return site.effect_kept if site.activation_effect is None else site.activation_effect


def _row(site: SiteMerge) -> tuple[str, ...]:
    stored = f"{site.dtype} + rank {site.residual_rank}" if site.residual_rank else site.dtype
    return (
        site.name,
        stored,
        f"{site.delta_relative:.2e}",
        f"{site.error_relative:.2e}",
        f"{100 * site.changed:.1f} %",
        f"{site.effect_kept:.4f}",
    )


def _number(value: float | None, share: bool) -> str:
    return "-" if value is None else f"{value:.4f}" if share else f"{value:.2e}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return lines


@torch.no_grad()
def compared(before: Tensor, meant: Tensor, after: Tensor, changed: int) -> Stored:
    """What of a change is stored, where that takes another form than the weight before.

    Args:
        before: float32 or float64, any shape.
        meant: the same.
        after: what is stored, in the same dtype.
        changed: number of stored elements that changed.
    """
    from peftkit_kernels import Stored

    delta, found = meant - before, after - before

    def total(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum(dtype=torch.float64))

    def broken(value: Tensor) -> int:
        return int(value.numel() - torch.isfinite(value).sum())

    error = found - delta
    return Stored(
        weight_square=total(before, before),
        delta_square=total(delta, delta),
        error_square=total(error, error),
        product=total(found, delta),
        changed=changed,
        elements=before.numel(),
        not_finite_before=broken(before),
        not_finite_meant=broken(meant),
        not_finite_after=broken(after),
    )


@torch.no_grad()
def on_inputs(site: SiteMerge, before: Tensor, meant: Tensor, after: Tensor, gram: Tensor) -> SiteMerge:
    """The facts with those on calibration inputs X added.

    Args:
        before: (out, in), float32, as are `meant` and `after`.
        gram: (in, in), XᵀX.
    """
    delta, error = meant - before, after - meant
    through = delta @ gram
    size = float((through * delta).sum(dtype=torch.float64))
    wrong = float(((error @ gram) * error).sum(dtype=torch.float64))
    product = float((through * error).sum(dtype=torch.float64))
    return dataclasses.replace(
        site,
        activation_error=math.sqrt(max(wrong, 0.0) / size) if size > 0 else 0.0,
        activation_effect=1 + product / size if size > 0 else 1.0,
    )


@torch.no_grad()
def to_original(site: SiteMerge, before: Tensor, meant: Tensor, after: Tensor, original: Tensor) -> SiteMerge:
    """The facts with the error to the original weight and the change added.

    Args:
        original: (out, in), the weight before it was quantized.
    """
    wrong = (after - (original.to(after) + (meant - before))).norm()
    return dataclasses.replace(site, original_error=float(wrong) / site.delta_norm if site.delta_norm else 0.0)


def measured(path: str, name: str, dtype: str, found: Stored, *, copied: bool = False) -> SiteMerge:
    """The facts of one parameter that was stored.

    Args:
        dtype: how it is stored now.
        copied: whether it was trained whole.

    Raises:
        MergeError: the weight before, the merged value or what was stored of it is not finite.
    """
    for kind, count in (
        ("the weight before the merge", found.not_finite_before),
        ("the merged value", found.not_finite_meant),
    ):
        if count:
            raise MergeError(
                f"{path}.{name}: {kind} holds values that are not finite; the model is left as it was. "
                "Check the adapter for a diverged training run"
            )
    if found.not_finite_after:
        raise MergeError(
            f"{path}.{name}: the merged value overflows {dtype}; the model is left as it was. "
            "Load the base in bfloat16 or float32 to merge"
        )
    size, base = math.sqrt(found.delta_square), math.sqrt(found.weight_square)
    return SiteMerge(
        path=path,
        parameter=name,
        dtype=dtype,
        delta_relative=size / base if base else float(size > 0),
        error_relative=math.sqrt(found.error_square) / size if size else 0.0,
        changed=found.changed / found.elements if found.elements else 0.0,
        effect_kept=found.product / found.delta_square if size else 1.0,
        delta_norm=size,
        copied=copied,
    )
