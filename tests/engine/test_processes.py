"""A scorer that has scored can be sent to other processes, and copied: every copy gives the same bits."""

import copy
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from engine.cases import ABC, random_conv
from helpers import run_python
from torch.utils.data import DataLoader, Dataset

from wavenet_conv import Scorer

TASKS = 8  # several for each of two workers, so that both score at the same time
ONE_THREAD = {"initializer": torch.set_num_threads, "initargs": (1,)}  # as in the tests: bits depend on the number
METHODS = multiprocessing.get_all_start_methods()
FAST = ["threads", "fork Pool" if "fork" in METHODS else "spawn Pool"]
SLOW = [f"{method} {pool}" for method in METHODS for pool in ("Pool", "ProcessPoolExecutor", "DataLoader")]


class Scores(Dataset):
    """Item i is the scores of list i."""

    def __init__(self, scorer, lists):
        self.scorer, self.lists = scorer, lists

    def __len__(self):
        return len(self.lists)

    def __getitem__(self, index):
        return self.scorer.score(self.lists[index])


@pytest.fixture(scope="module", params=["tanh", "remember", "gated"])
def used_scorer(request, names):
    """A scorer that has scored once, the names and the scores."""
    conv = random_conv(n_embd=24, n_hidden=48, gated=request.param == "gated", dtype=torch.float32)
    scorer = Scorer(conv, ABC, remember=request.param == "remember")
    return scorer, names[::8], scorer.score(names[::8])


@pytest.mark.parametrize("workers", FAST + [pytest.param(workers, marks=pytest.mark.slow) for workers in SLOW])
def test_workers_give_the_same_bits(used_scorer, workers):
    scorer, names, expected = used_scorer
    method, _, kind = workers.partition(" ")
    lists = [names[start::TASKS] for start in range(TASKS)]
    if kind == "DataLoader":  # it sets one thread in its workers
        loader = DataLoader(Scores(scorer, lists), batch_size=None, num_workers=2, multiprocessing_context=method)
        scores = list(loader)
    else:
        if kind == "Pool":
            pool = multiprocessing.get_context(method).Pool(2, **ONE_THREAD)
        elif kind:
            pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method), **ONE_THREAD)
        else:
            pool = ThreadPoolExecutor(2, **ONE_THREAD)
        with pool:
            scores = list(pool.map(scorer.score, lists, chunksize=1))
    for start, part in enumerate(scores):
        assert torch.equal(part, expected[start::TASKS])
    assert torch.equal(scorer.score(names), expected)  # the workers have changed nothing here


FORKED = """
import multiprocessing, torch
from wavenet_conv import Scorer
torch.set_num_threads(2)
names = ["emma", "olivia", "ava", "isabella"] * 20_000  # enough for PyTorch to use both threads
scorer = Scorer.load("default")
scorer.score(names)
with multiprocessing.get_context("fork").Pool(2) as pool:
    even, odd = pool.map_async(scorer.score, [names[::2], names[1::2]]).get(timeout=60)
torch.set_num_threads(1)
scores = scorer.score(names)
print(torch.equal(even, scores[::2]) and torch.equal(odd, scores[1::2]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_after_two_threads_have_run_does_not_hang():
    assert run_python(FORKED).stdout == "True\n"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_give_the_same_bits(used_scorer, duplicate):
    scorer, names, expected = used_scorer
    twin = duplicate(scorer)
    assert torch.equal(twin.score(names[::3]), expected[::3])
    assert torch.equal(scorer.score(names), expected)
    assert torch.equal(twin.score(names[1::3]), expected[1::3])


@pytest.mark.parametrize("pickler", [pickle, ForkingPickler], ids=["pickle", "multiprocessing"])
def test_a_pickle_holds_the_weights_and_no_buffers(names, pickler):
    """Handles of shared memory would be smaller, and would move the weights while another thread may read them."""
    conv = random_conv(n_embd=24, n_hidden=128)
    scorer = Scorer(conv, ABC, remember=True)
    size = len(pickler.dumps(scorer))
    assert size > 8 * sum(parameter.numel() for parameter in conv.parameters())  # bytes in float64
    scorer.score(names[:100])
    assert len(pickler.dumps(scorer)) == size
