"""What an export wrote: where, from which method, at which rank and error. Prints as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peftkit.certificate import MergeReport
from peftkit.export.factors import Factors, relative


@dataclass(frozen=True, kw_only=True)
class SiteExport:
    """What one weight got."""

    path: str
    rank: int
    """Of the two factors, before zeros fill them up to a common rank."""
    exact: bool
    """Whether the factors are the adapter's own; False: the nearest of their rank."""
    size: float
    """‖ΔW‖ of the adapter's update."""
    error: float
    """‖what the file holds - ΔW‖."""

    @property
    def error_relative(self) -> float:
        """The error relative to the update; 0 where the adapter changes nothing."""
        return self.error / self.size if self.size else 0.0

    @classmethod
    def of(cls, factors: Factors) -> SiteExport:
        """The facts of factors, without their tensors."""
        return cls(
            path=factors.site.path, rank=factors.rank, exact=factors.exact, size=factors.size, error=factors.error
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    path: Path
    """Folder or file."""
    target: str
    """For whom: "peft", "merged", "gguf" or "vllm"."""
    method: str
    """By which the adapter was trained."""
    dtype: str
    """Of the factors, or of the merged weights."""
    sites: tuple[SiteExport, ...] = ()
    """Weights that got factors; empty for merged weights."""
    extras: tuple[str, ...] = ()
    """Modules that were trained whole, and are in the export."""
    notes: tuple[str, ...] = ()
    """What the reader has to be told."""
    report: MergeReport | None = field(default=None)
    """The certificate of the merge, for merged weights."""

    @property
    def rank(self) -> int:
        """The largest rank at any site."""
        return max((s.rank for s in self.sites), default=0)

    @property
    def exact(self) -> bool:
        """Whether every site got the adapter's own factors."""
        return all(s.exact for s in self.sites)

    @property
    def error_relative(self) -> float:
        """The error of all updates taken together, relative to them."""
        return relative([(s.size, s.error) for s in self.sites])

    @property
    def largest_error(self) -> float:
        """The largest relative error at any site."""
        return max((s.error_relative for s in self.sites), default=0.0)

    @property
    def summary(self) -> str:
        """One sentence on how near the export is to the adapter."""
        if self.report is not None:
            return f"least effect kept {self.report.effect_kept:.4f}, in total {self.report.total_effect:.4f}"
        how = "exactly" if self.exact else "as the nearest product of two factors at each weight"
        return (
            f"{self.method} as LoRA of rank {self.rank} on {len(self.sites)} weights in {self.dtype}, {how}: "
            f"error {self.error_relative:.2e} of the update, {self.largest_error:.2e} at the worst weight"
        )

    def to_json(self) -> str:
        """The export as JSON, with the totals."""
        facts = {k: v for k, v in asdict(self).items() if k != "report"}
        totals = {
            "rank": self.rank,
            "exact": self.exact,
            "error_relative": self.error_relative,
            "largest_error": self.largest_error,
        }
        return json.dumps({**facts, "path": str(self.path), "totals": totals}, indent=2, sort_keys=True)

    def __str__(self) -> str:
        if self.report is not None:
            return f"{self.report}\nwritten for {self.target}: {self.path}"
        rows = [("weight", "rank", "exact", "error/update")]
        rows += [(s.path, str(s.rank), "yes" if s.exact else "no", f"{s.error_relative:.2e}") for s in self.sites]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(self.summary)
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"written for {self.target}: {self.path}")
        return "\n".join(lines)
