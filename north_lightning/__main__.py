"""``python -m north_lightning``."""

import sys

from north_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
