"""`python -m peftkit.cli`: the same as `peftkit`."""

from peftkit.cli import main

main()
