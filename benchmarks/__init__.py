"""One module per question; each prints tables and can write JSON. They run from the checkout."""

import os

# Unless this is high before torch is imported, PyTorch's profiler writes a line to stderr at every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
