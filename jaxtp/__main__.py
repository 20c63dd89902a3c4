"""`python -m jaxtp` is the `jaxtp` command."""

from jaxtp.cli import main

main()
