"""`ScoreColumn` on Arrow tables, and in pandas, polars and DuckDB: the scores of `Scorer`, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wavenet_conv import Scorer
from wavenet_conv.errors import ConfigError, NamesError
from wavenet_conv.ray import ScoreColumn

pa = pytest.importorskip("pyarrow")
NAMES = ["emma", "zoë", "", "olivia"] * 1500


@pytest.fixture(scope="module")
def table():
    return pa.table({"id": range(len(NAMES)), "name": NAMES})


@pytest.fixture(scope="module")
def expected():
    return Scorer.load().score(NAMES, unknown="nan").numpy()


@pytest.fixture(scope="module")
def add_scores():
    return ScoreColumn("name")


def assert_scored(scored, table, expected):
    """The table and one more column, with the same bits."""
    assert scored.drop_columns(["score"]) == table and scored["score"].type == pa.float32()
    np.testing.assert_array_equal(scored["score"].to_numpy(), expected)


@pytest.mark.parametrize("size", [1, 7, 2048])
def test_bits_do_not_depend_on_the_batches(table, expected, add_scores, size):
    rows = min(60 * size, len(NAMES))
    batches = [add_scores(batch) for batch in table[:rows].to_batches(max_chunksize=size)]
    assert_scored(pa.Table.from_batches(batches), table[:rows], expected[:rows])


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_a_table_of_several_chunks_keeps_its_columns_and_its_type(table, expected, add_scores, kind):
    names = table["name"].cast(getattr(pa, kind)())
    chunked = pa.concat_tables([table.set_column(1, "name", names)[:1000], table.set_column(1, "name", names)[1000:]])
    assert_scored(add_scores(chunked), chunked, expected)
    assert add_scores(chunked[:0]).schema == add_scores(chunked).schema


@pytest.mark.parametrize("measure", ["bits_per_character", "percentile"])
def test_other_measures(table, measure):
    scored = ScoreColumn("name", measure=measure, output="new", unknown="nan", dtype=torch.float64)(table[:3])
    found = getattr(Scorer.load(dtype=torch.float64), measure)(NAMES[:3], unknown="nan")
    assert torch.equal(
        torch.tensor(scored["new"].to_pylist(), dtype=torch.float64).nan_to_num(-1), found.nan_to_num(-1)
    )
    assert scored["new"].null_count == 0


def test_wrong_columns_and_measures_are_rejected(table, add_scores):
    with pytest.raises(ConfigError, match="the table has no column 'nam'; its columns are 'id', 'name'"):
        ScoreColumn("nam")(table)
    with pytest.raises(ConfigError, match="already has a column 'score'; choose another output"):
        add_scores(add_scores(table))
    with pytest.raises(ConfigError, match="measure is 'logits'; it must be one of 'score', 'bits_per"):
        ScoreColumn("name", measure="logits")
    with pytest.raises(NamesError, match="character 'ë'"):
        ScoreColumn("name", unknown="error")(table)


def test_pandas(table, expected, add_scores):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"name": NAMES}, index=range(7, 7 + len(NAMES)))
    scored = add_scores(pa.Table.from_pandas(frame)).to_pandas()
    assert scored[["name"]].equals(frame)
    np.testing.assert_array_equal(scored["score"], expected)


def test_polars(table, expected, add_scores):
    polars = pytest.importorskip("polars")
    lazy = polars.from_arrow(table).lazy()
    schema = {**lazy.collect_schema(), "score": polars.Float32}
    scored = lazy.map_batches(lambda frame: polars.from_arrow(add_scores(frame.to_arrow())), schema=schema).collect()
    assert scored["id"].to_list() == table["id"].to_pylist()
    np.testing.assert_array_equal(scored["score"], expected)


def test_duckdb(table, expected, add_scores):
    duckdb = pytest.importorskip("duckdb")
    score = lambda names: add_scores(pa.table({"name": names}))["score"]
    with duckdb.connect() as connection:
        connection.create_function("score", score, ["VARCHAR"], "FLOAT", type="arrow")
        connection.register("names", table)
        scored = connection.sql("select score(name) as score from names order by id").fetchnumpy()
    np.testing.assert_array_equal(scored["score"], expected)
