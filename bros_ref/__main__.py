"""`python -m bros_ref` is `bros-ref`."""

from bros_ref.cli.live import main

main()
