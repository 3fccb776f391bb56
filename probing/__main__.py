"""`python -m probing` is the command `probing`."""

from probing.cli import main

main()
