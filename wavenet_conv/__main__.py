"""`python -m wavenet_conv` is the `wavenet-conv` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
