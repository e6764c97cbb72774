"""``python -m north_lightning``."""

import os
import sys

if sys.path[0] == os.getcwd():  # `-m` puts it first; a folder that someone else has filled is not to shadow a package
    sys.path.append(sys.path.pop(0))

from north_lightning.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # before what takes seconds to import
    from north_lightning.cli import main

    sys.exit(main())
