"""Records -> report.md, index.html and plots. Reads records only, on any machine."""

from peftkit_bench.report.page import write

__all__ = ["write"]
