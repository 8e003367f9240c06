"""The command line: `peftkit methods | plan | merge | export | doctor | bench`. The one place that prints.

A command is a module here. Only what it needs is imported, when it runs. A PeftkitError ends a command with its message
and exit code 2.
"""

from peftkit.cli import bench, doctor, export, merge, methods, plan
from peftkit.cli.app import app, main

__all__ = ["app", "bench", "doctor", "export", "main", "merge", "methods", "plan"]
