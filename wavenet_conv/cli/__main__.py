"""`python -m wavenet_conv.cli` is the `wavenet-conv` command."""

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
