"""`python -m bros_ref` is `bros-ref`."""

from __future__ import annotations

from bros_ref.cli.interrupts import end_at_once


def main() -> None:
    """The console script."""
    end_at_once()  # until a command begins its work: see `make_console`
    from bros_ref.cli.live import main as run

    run()


if __name__ == "__main__":
    main()
