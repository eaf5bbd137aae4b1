"""``python -m fastft`` is the command ``fastft``."""

from fastft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
