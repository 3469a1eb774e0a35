"""Ways to score and to draw, on every device: what they give, where it lies, and which clock times it."""

from argparse import Namespace

import torch
from helpers import ROOT
from rich.progress import Progress

import reference
from benchmarks import methods, sample, sizes
from benchmarks.harness import Session
from benchmarks.methods import Models
from wavenet_conv import Scorer, Stream, load_checkpoint, sampling
from wavenet_conv.names import read_names

NAMES = read_names(ROOT / "names.txt")[::2500]


def default_models(device):
    trained = load_checkpoint("default")
    return Models(reference.from_conv(trained.model).to(device=device), trained.vocab)


@torch.no_grad()
def test_every_way_to_score_a_list_gives_the_same_scores_on_the_host(device, monkeypatch):
    models, some = default_models(device), [*NAMES, "a"]
    monkeypatch.setitem(sizes.WINDOWS, device.type, 50)
    monkeypatch.setitem(sizes.NAMES, device.type, 8)
    expected = Scorer(models.conv, models.vocab, dtype=torch.float64).score(some).float()
    for way in (sizes.by_loop, sizes.by_windows, sizes.by_pass):
        assert torch.allclose(way(models, some), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_lists_of_any_size_are_timed_by_the_hosts_clock(device, monkeypatch):
    clocks = []
    monkeypatch.setattr(sizes, "time_calls", lambda turns, *_, **options: clocks.append(options) or {"one": [8.0]})
    session = Session(Namespace(full=False), device, [], None, Progress(disable=True))
    *_, rows = sizes.size_rows({"one": len}, ["a"] * 16, session)
    assert [row["one"]["us"] for row in rows] == [8.0, 2.0, 0.5] and all(clock["by_host"] for clock in clocks[1::2])


@torch.no_grad()
def test_a_graph_reads_the_tokens_of_each_call(cuda):
    models = default_models(cuda)
    tokens, _ = (part.to(cuda) for part in models.vocab.encode(["emma", "anna"], context=models.context))
    graph = methods.Replayed(models.folded, tokens[:1])
    other = tokens[1:].clone()
    del tokens
    for read in (other, other.flip(1)):
        assert torch.allclose(graph(read), models.folded(read), rtol=0, atol=1e-5)


@torch.no_grad()
def test_graphs_are_captured_on_their_own_device_and_let_other_threads_go_on(cuda, monkeypatch):
    captures, graph, models = [], torch.cuda.graph, default_models(cuda)
    monkeypatch.setattr(
        torch.cuda, "graph", lambda *parts, **options: captures.append(options) or graph(*parts, **options)
    )
    stream, token = Stream(models.conv, graph=True), torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        stream.step(token)
    methods.Replayed(models.folded, torch.zeros(1, 9, dtype=torch.int64, device=cuda))
    for options in captures:  # PyTorch's own stream is on the first device that has captured
        assert options["stream"].device.type == "cuda" and options["capture_error_mode"] == "thread_local"
    assert len(captures) == 2


def test_no_batch_is_larger_than_what_is_drawn_together():
    largest = sampling.CHARACTERS // (sample.LONGEST + 1)
    assert max(size for sizes in sample.OUR_BATCHES.values() for size in sizes) <= largest


@torch.no_grad()
def test_names_of_windows_are_tokens_on_the_host_and_no_lists(device):
    models = default_models(device)
    session = Session(Namespace(seed=1), device, [], None, Progress(disable=True))
    tokens = sample.sample_windows(models.folded_tree, models, 5, session)
    assert tokens.shape == (5, sample.LONGEST) and tokens.device.type == "cpu"
    ends = (tokens == 0).long().argmax(1)
    assert ends.min() > 0 and all(not name[end:].any() for name, end in zip(tokens, ends))
