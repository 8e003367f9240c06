"""Parameter-efficient fine-tuning: wrap, export, report."""

from peftkit.budget import fit_budget
from peftkit.checkpoint import load, save
from peftkit.merge import MergeReport, merge, merge_and_unload, unmerge
from peftkit.methods import METHODS
from peftkit.methods.bitfit import BitFit
from peftkit.methods.full import FullFineTuning
from peftkit.methods.head import HeadOnly
from peftkit.methods.layernorm import LayerNormTuning
from peftkit.methods.lora import LoRA
from peftkit.plan import Plan, plan
from peftkit.wrap import activate, disabled, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "MergeReport",
    "BitFit",
    "FullFineTuning",
    "HeadOnly",
    "LayerNormTuning",
    "LoRA",
    "Plan",
    "activate",
    "disabled",
    "fit_budget",
    "load",
    "merge",
    "merge_and_unload",
    "plan",
    "save",
    "unmerge",
    "unwrap",
    "wrap",
]
