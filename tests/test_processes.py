"""A scorer that has scored can be sent to other processes, and copied: every copy gives the same bits."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from conftest import ROOT, random_tree

from wavenet_conv import Scorer, Vocabulary, from_tree

ABC = Vocabulary("abcdefghijklmnopqrstuvwxyz")
WORKERS = 2
TASKS = 8  # several per worker, so that both score at the same time
ONE_THREAD = {"initializer": torch.set_num_threads, "initargs": (1,)}  # as in the tests: bits depend on the number


@pytest.fixture(
    scope="module", params=[(False, False), (False, True), (True, False)], ids=["tanh", "remember", "gated"]
)
def used_scorer(request, names):
    """A scorer that has scored once, and the scores."""
    gated, remember = request.param
    tree = random_tree(n_hidden=48, gated=gated, dtype=torch.float32)
    scorer = Scorer(from_tree(tree), ABC, remember=remember)
    return scorer, scorer.score(names)


def pool_map(context, function, parts):
    with context.Pool(WORKERS, **ONE_THREAD) as pool:
        return pool.map(function, parts, chunksize=1)


def executor_map(context, function, parts):
    with ProcessPoolExecutor(WORKERS, mp_context=context, **ONE_THREAD) as executor:
        return list(executor.map(function, parts))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.parametrize("run", [pool_map, executor_map], ids=["Pool", "ProcessPoolExecutor"])
def test_process_pools_give_the_same_bits(used_scorer, names, run, method):
    scorer, expected = used_scorer
    parts = [names[start::TASKS] for start in range(TASKS)]
    scores = run(multiprocessing.get_context(method), scorer.score, parts)
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
assert torch.get_num_threads() == 2
torch.set_num_threads(1)
scores = scorer.score(names)
print(torch.equal(even, scores[::2]) and torch.equal(odd, scores[1::2]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_after_two_threads_have_run_does_not_hang():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr


def test_threads_give_the_same_bits(used_scorer, names):
    scorer, expected = used_scorer
    parts = [names[start::TASKS] for start in range(TASKS)]
    with ThreadPoolExecutor(WORKERS, **ONE_THREAD) as executor:
        for start, part in enumerate(executor.map(scorer.score, parts)):
            assert torch.equal(part, expected[start::TASKS])


def pickled(scorer):
    return pickle.loads(pickle.dumps(scorer))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_copies_give_the_same_bits(used_scorer, names, duplicate):
    scorer, expected = used_scorer
    twin = duplicate(scorer)
    assert torch.equal(twin.score(names[::3]), expected[::3])
    assert torch.equal(scorer.score(names), expected)
    assert torch.equal(twin.score(names[1::3]), expected[1::3])


@pytest.mark.parametrize("pickler", [pickle, ForkingPickler], ids=["pickle", "multiprocessing"])
def test_a_pickle_holds_the_weights_and_no_buffers(names, pickler):
    """Handles of shared memory would be smaller, and would move the weights while another thread may read them."""
    conv = from_tree(random_tree())
    scorer = Scorer(conv, ABC, remember=True)
    size = len(pickler.dumps(scorer))
    assert size > 8 * sum(parameter.numel() for parameter in conv.parameters())  # bytes in float64
    scorer.score(names[:100])
    assert len(pickler.dumps(scorer)) == size
