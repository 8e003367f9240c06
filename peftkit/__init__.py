"""Parameter-efficient fine-tuning: wrap, export, report."""

from peftkit import training
from peftkit.budget import fit_budget
from peftkit.certificate import MergeReport
from peftkit.checkpoint import load, save
from peftkit.merge import merge, merge_and_unload, unmerge
from peftkit.methods import METHODS
from peftkit.methods.adalora import AdaLoRA
from peftkit.methods.bitfit import BitFit
from peftkit.methods.bottleneck import BottleneckAdapter
from peftkit.methods.compacter import Compacter
from peftkit.methods.full import FullFineTuning
from peftkit.methods.head import HeadOnly
from peftkit.methods.ia3 import IA3
from peftkit.methods.layernorm import LayerNormTuning
from peftkit.methods.loha import LoHa
from peftkit.methods.lokr import LoKr
from peftkit.methods.lora import LoRA
from peftkit.methods.loreft import LoReFT
from peftkit.methods.oft import OFT
from peftkit.methods.prefix import PrefixTuning
from peftkit.methods.prompt import PromptTuning
from peftkit.methods.ptuning import PTuning
from peftkit.methods.vera import VeRA
from peftkit.plan import Plan, plan
from peftkit.quantize import load_quantized, quantize
from peftkit.route import route
from peftkit.shards import merge_shards
from peftkit.wrap import activate, disabled, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "BitFit",
    "BottleneckAdapter",
    "Compacter",
    "FullFineTuning",
    "HeadOnly",
    "LayerNormTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "MergeReport",
    "PTuning",
    "Plan",
    "PrefixTuning",
    "PromptTuning",
    "VeRA",
    "activate",
    "disabled",
    "fit_budget",
    "load",
    "load_quantized",
    "merge",
    "merge_and_unload",
    "merge_shards",
    "plan",
    "quantize",
    "route",
    "save",
    "training",
    "unmerge",
    "unwrap",
    "wrap",
]
