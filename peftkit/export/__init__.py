"""Exports adapters to what other tools read: peft folders, merged weights, GGUF for llama.cpp, folders for vLLM."""

from peftkit.export.result import Export, SiteExport
from peftkit.export.run import TARGETS, export

__all__ = ["TARGETS", "Export", "SiteExport", "export"]
