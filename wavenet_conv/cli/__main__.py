"""`python -m wavenet_conv.cli` is the `wavenet-conv` command."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
