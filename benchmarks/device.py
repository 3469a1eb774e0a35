"""Scoring on a GPU, step by step: in the device alone, from an Arrow column, and from a list of strings."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from benchmarks.counting import outputs
from benchmarks.harness import Call, Results, Session, spread, time_calls
from benchmarks.methods import Models
from benchmarks.tables import Row, Table
from wavenet_conv import Scorer
from wavenet_conv.engine.shared import SharedNodes
from wavenet_conv.engine.tabulated import TabulatedNodes
from wavenet_conv.engine.weights import fold
from wavenet_conv.packing import CHUNK_NAMES, packed

try:
    import pyarrow
except ImportError:
    pyarrow = None

COPIED = 2**28  # bytes that are copied in the device's memory: more than its cache holds
CALLS = (5, 30)  # without and with --full


def device_part(models: Models, names: list[str], session: Session) -> Results:
    """What the tables take, how fast a chunk is scored and from what, and the limits of the device."""
    torch.cuda.synchronize()
    begin = perf_counter()
    nodes = TabulatedNodes(SharedNodes(fold(models.conv, session.device)))
    torch.cuda.synchronize()
    table = nodes.table[0]
    facts: Results = {"tables_seconds": perf_counter() - begin, "tables_bytes": table.numel() * table.itemsize}
    facts |= {"tabulated_layers": nodes.tabulated, "triton_kernel": nodes.why_not or "runs"}
    chunk = names[:CHUNK_NAMES]
    codes = next(packed(chunk, models.vocab, models.context, len(chunk), "error", as_codes=True))
    numbers = torch.as_tensor(models.vocab.latin1)
    moved = [part.to(session.device) for part in (*codes[:2], numbers)]
    calls, copied = session.pick(*CALLS), torch.randint(256, (COPIED,), dtype=torch.uint8, device=session.device)
    events: dict[Any, Call] = {"in the device": lambda: nodes.log_probs_of_codes(*moved), "copy": copied.clone}
    time_calls(events, 2, session.device, block=1)
    timed = time_calls(events, calls, session.device, block=5)
    facts["bytes_per_second"] = 2 * len(copied) / spread("us", timed["copy"])["us"] * 1e6
    rows = [rate_row("in the device", timed["in the device"], chunk)]
    rows[0]["bytes_per_position"] = nodes.kernel_sizes[-1] * nodes.nodes.taps[-1].shape[2] * table.itemsize
    scorer = Scorer(models.conv, models.vocab, device=session.device, dtype=torch.float32)
    ways: dict[Any, Call] = {"from a list of strings": lambda: scorer.score(names)}
    if pyarrow is not None:
        column = pyarrow.array(names)
        ways["from an Arrow column"] = lambda: scorer.score(column)
    time_calls(ways, 1, torch.device("cpu"), block=1)
    by_host = time_calls(ways, calls, torch.device("cpu"), block=1)  # they end with scores on the host
    rows += [rate_row(way, samples, names) for way, samples in by_host.items()]
    session.to_profile.append((rows[0], "launches", events["in the device"], False))
    return facts | {"rows": rows}


def rate_row(way: str, us: Sequence[float], names: Sequence[str]) -> Row:
    """Positions per second of calls that took these microseconds."""
    row: Row = {"method": way, "names": len(names), "calls": len(us), **spread("us", us)}
    return row | spread("positions_per_second", [outputs(names) / each * 1e6 for each in us])


def device_table(facts: Results) -> Table:
    """What is printed."""
    rows = [dict(row) for row in facts["rows"]]
    rows[0]["share"] = rows[0]["positions_per_second"] * rows[0]["bytes_per_position"] / facts["bytes_per_second"]
    return Table(
        "Scoring on the device with the default model",
        "method; names=names ,; launches per chunk=launches ,; positions/s=positions_per_second ,.0f; "
        "quartiles=~positions_per_second ,.0f; bytes per position=bytes_per_position ,; share of copy rate=share .0%",
        rows,
        f"Tables: {facts['tables_bytes'] / 1e6:,.0f} MB in {facts['tables_seconds']:.3f} s. Triton kernel: "
        f"{facts['triton_kernel']}. A copy in the device's memory reads and writes "
        f"{facts['bytes_per_second'] / 1e9:,.0f} GB/s. Bytes: what a position reads of the tables.",
    )
