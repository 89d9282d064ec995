"""Start the command line with ``python -m kfade``."""

import sys

from kfade.cli import main

if __name__ == "__main__":
    sys.exit(main())
