"""A column of scores for tables in batches: Ray Data, and whatever else calls a function on Arrow tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError
from .scoring import Scorer

if TYPE_CHECKING:
    import pyarrow as pa

    Batch = TypeVar("Batch", pa.Table, pa.RecordBatch)

MEASURES = ("score", "bits_per_character", "percentile")


class ScoreColumn:
    """Adds a column of scores to Arrow tables; a callable class for `ray.data.Dataset.map_batches`.

        names = ray.data.read_parquet("names")
        workers = ray.data.ActorPoolStrategy(size=8)
        scored = names.map_batches(
            ScoreColumn, fn_constructor_args=["name"], compute=workers, batch_format="pyarrow", batch_size=100_000
        )

    Each worker makes the object once, and with it loads the model. Scores do not depend on the batches or the workers.
    PyTorch uses as many threads as `map_batches(..., num_cpus=N)` gives a worker, since Ray sets OMP_NUM_THREADS there;
    that is one by default. Needs pyarrow, and Ray only where Ray calls it: the extra `ray`.

    Args:
        column: The column of strings to score.
        model: A checkpoint, as `Scorer.load` takes it: a path that every worker can read, or "default".
        measure: The method of `Scorer` that computes the column: "score", "bits_per_character" or "percentile".
        output: The new column. Default: as `measure`.
        unknown: What a string with a character outside the vocabulary does: "nan" gives NaN, "error" raises.
        **options: Of `Scorer`, such as `device`.

    Raises:
        CheckpointError, ConfigError: The model cannot be read; `measure` is another word.
    """

    def __init__(
        self,
        column: str,
        model: str | Path = "default",
        *,
        measure: str = "score",
        output: str | None = None,
        unknown: str = "nan",
        **options: Any,
    ):
        if measure not in MEASURES:
            raise ConfigError(f"measure is {measure!r}; it must be one of {', '.join(map(repr, MEASURES))}")
        self.column, self.output, self.unknown = column, output or measure, unknown
        self.measure = getattr(Scorer.load(model, **options), measure)

    def __call__(self, batch: Batch) -> Batch:
        """The same `pyarrow.Table` or `RecordBatch` with one more column, in the scorer's dtype.

        Raises:
            ConfigError: The batch lacks the column to score, or already has the new one.
            NamesError: A string has a character outside the vocabulary, with `unknown="error"`.
        """
        import pyarrow as pa

        columns = batch.schema.names
        if self.column not in columns or self.output in columns:
            fault = f"already has a column {self.output!r}; choose another output"
            if self.column not in columns:
                fault = f"has no column {self.column!r}; its columns are {', '.join(map(repr, columns))}"
            raise ConfigError(f"the table {fault}")
        scores = self.measure(batch[self.column], unknown=self.unknown)
        return batch.append_column(self.output, pa.array(scores.numpy()))
