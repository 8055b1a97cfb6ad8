"""`python -m lightning_semgen` is the `lightning` command."""

from lightning_semgen.cli import main

main()
