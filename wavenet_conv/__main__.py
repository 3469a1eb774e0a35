"""`python -m wavenet_conv` is the `wavenet-conv` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
