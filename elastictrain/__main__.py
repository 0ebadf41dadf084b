"""`python -m elastictrain`: the command line, where the console script is not on PATH."""

from __future__ import annotations

from elastictrain.cli.app import main

if __name__ == "__main__":
    main()
