"""One module a question; each prints tables, and can write JSON. Runs from the checkout."""

import os

# PyTorch's profiler writes a line to stderr at every start and stop unless this is high before torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
