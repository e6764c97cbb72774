"""``python -m north_lightning``."""

import sys

from north_lightning.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # before what takes seconds to import
    from north_lightning.cli import main

    sys.exit(main())
