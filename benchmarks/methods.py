"""The methods that benchmarks compare, by name: on tokens, on a list of names, and one character at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from benchmarks.counting import CountingNodes, multiply_adds, outputs, shared_multiply_adds
from benchmarks.harness import Session, spread, time_at_best
from benchmarks.tables import Row
from wavenet_conv import Scorer, Stream, Vocabulary, WaveNetConfig, fold_batch_norm, from_tree
from wavenet_conv.engine import shared

try:
    from pytorch_tcn import TCN
except ImportError:
    TCN = None

PEER = "pytorch-tcn"
MISSING = {"method": PEER, "installed": False, "message": f"not installed: pip install {PEER}"}
WINDOW_BATCHES = {"cpu": (512, 1024, 256, 2048, 4096, 8192), "cuda": (16384, 65536, 4096, 8192, 32768, 131072)}
NAME_BATCHES = {"cpu": (256, 512, 64, 128, 1024, 2048), "cuda": (2048, 8192, 512, 1024, 4096, 16384)}  # of one length

Model = Callable[[Tensor], Tensor]  # `(batch, time)` to logits; windows to `(batch, vocab)`, names to one per output
Step = Callable[[Tensor], Tensor]  # reads tokens `(batch,)`, returns the logits of what follows, `(batch, vocab)`


class Models:
    """The same weights four times: the tree and the convolutions, each as they are and with batch norm folded."""

    def __init__(self, tree: reference.Sequential, vocab: Vocabulary):
        self.tree, self.folded_tree = tree, reference.fold_batch_norm(tree)
        self.conv, self.vocab = from_tree(tree), vocab
        self.folded = fold_batch_norm(self.conv)
        self.device, self.context = self.conv.embedding.weight.device, self.conv.context

    @cached_property
    def peer(self) -> Peer:
        """The installed peer: the same sizes, and random weights."""
        torch.manual_seed(42)
        return Peer(self.conv.config).eval().to(self.device)


class Method(NamedTuple):
    """A way to compute logits.

    `reads` says what one call takes: any "windows", "names" of one length, or "one name"; "strings" is `Scorer`'s way,
    from a list of names to their log-likelihoods. `model` makes what is called. `stepper` makes a step of one character
    in each of a batch of names; by default the model runs on windows.
    """

    reads: str
    model: Callable[[Models], Any]
    stepper: Callable[[Models, int], Step] | None = None

    def on_names(self, models: Models) -> Model:
        """The model on names of one length."""
        model = self.model(models)
        return partial(reference.window_logits, model) if self.reads == "windows" else model

    def step(self, models: Models, batch: int) -> Step:
        """A step of one character in each of `batch` names."""
        return self.stepper(models, batch) if self.stepper else window_step(self.model(models), models, batch)


def window_step(model: Model, models: Models, batch: int) -> Step:
    """Reads tokens into windows and runs a model on them."""
    window = torch.zeros(batch, models.context, dtype=torch.int64, device=models.device)

    def step(tokens: Tensor) -> Tensor:
        nonlocal window
        window = torch.cat([window[:, 1:], tokens[:, None]], 1)
        return model(window).flatten(0, -2)

    return step


def peer_step(peer: Peer) -> Step:
    """The peer's streaming mode, which keeps what its convolutions have read; it takes one row."""
    return lambda tokens: peer.tcn.inference(peer.embedding(tokens[:, None]).transpose(1, 2))[..., 0]


METHODS = {
    "loop": Method("one name", lambda models: partial(reference.loop_logits, models.tree)),
    "windows": Method("windows", lambda models: models.tree),
    "windows_folded": Method("windows", lambda models: models.folded_tree),
    "slid_conv1d": Method("names", lambda models: models.conv),
    "slid": Method("names", lambda models: models.folded),
    "shared": Method("strings", lambda models: Scorer(models.conv, models.vocab, dtype=torch.float32)),
    "stream": Method("characters", lambda models: None, lambda models, batch: Stream(models.conv, batch).step),
    PEER: Method("names", lambda models: models.peer, lambda models, batch: peer_step(models.peer)),
}


class Peer(nn.Module):
    """A `TCN` of `pytorch-tcn` of the same widths, dilations and kernel size, with an embedding and a head.

    Another function: it pads activations with zeros, and each block holds two convolutions and a residual. Its
    normalisation is left out, as ours is folded.
    """

    def __init__(self, config: WaveNetConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.context = 1 + sum(2 * (config.kernel_sizes[0] - 1) * dilation for dilation in config.dilations)
        self.tcn = TCN(
            num_inputs=config.n_embd,
            num_channels=list(config.widths),
            kernel_size=config.kernel_sizes[0],
            dilations=list(config.dilations),
            dropout=0.0,
            causal=True,
            use_norm=None,
            activation="tanh",
            output_projection=config.vocab_size,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, time, vocab)` of tokens `(batch, time)`."""
        return self.tcn(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)


def random_models(names: Sequence[str], session: Session, **sizes: Any) -> Models:
    """Random weights, and the batch statistics of the names' own windows; sizes as `reference.build` takes them."""
    torch.manual_seed(session.args.seed)
    tree = reference.build(vocab_size=len(session.vocab), **sizes)
    for _ in range(20):
        sample = [names[i] for i in torch.randint(len(names), (64,))]
        reference.window_logits(tree, session.vocab.encode(sample, context=reference.context_of(tree))[0])
    return Models(tree.eval().to(session.device), session.vocab)


def parameters(model: Any) -> int:
    """How many numbers a model has learned."""
    return sum(p.numel() for p in model.parameters())


class OnList:
    """A method on a list of names.

    What it reads lies on the device before the clock starts: windows cut, lengths sorted, targets beside them. Only
    `shared` starts at the strings, so this favours the others. The loop takes a sample of `few` names.
    """

    def __init__(self, name: str, models: Models, names: Sequence[str], few: int):
        self.method, self.config = METHODS[name], models.conv.config
        self.names = list(names[:: max(1, len(names) // few)] if name == "loop" else names)
        self.positions, self.model = outputs(self.names), self.method.model(models)
        if self.method.reads == "strings":
            self.sizes: Sequence[int] = (len(self.names),)
            return
        # The peer pads by itself, with zeros inside the network: one `.` before a name is all that it is given.
        context = 1 if name == PEER else models.context
        self.parts = [part.to(models.device) for part in tokens_by_length(self.names, models.vocab, context)]
        self.targets = [F.pad(part[:, context:], (0, 1)) for part in self.parts]
        self.rows = rows_by_length(self.names).to(models.device).split([len(part) for part in self.parts])
        self.sizes = (1,) if self.method.reads == "one name" else NAME_BATCHES[models.device.type]
        if self.method.reads == "windows":
            windows = [reference.windows(part, context) for part in self.parts]
            self.rows = (torch.cat([row.repeat_interleave(part.shape[1]) for row, part in zip(self.rows, windows)]),)
            self.parts = [torch.cat([part.flatten(0, 1) for part in windows])]
            self.targets = [torch.cat([target.flatten() for target in self.targets])]
            self.sizes = WINDOW_BATCHES[models.device.type]

    def logits(self, size: int) -> None:
        """Computes all logits in batches of this size and keeps none."""
        for part in self.parts:
            for batch in part.split(size):
                self.model(batch)

    def scores(self, size: int) -> Tensor:
        """The log-likelihood of each name: float32 `(names,)` on the CPU."""
        if self.method.reads == "strings":
            return self.model.score(self.names)
        scores = torch.zeros(len(self.names), dtype=torch.float64, device=self.rows[0].device)
        for parts in zip(self.parts, self.targets, self.rows):
            for tokens, target, row in zip(*(part.split(size) for part in parts)):
                log_probs = self.model(tokens).log_softmax(-1).gather(-1, target[..., None])[..., 0].double()
                scores.index_add_(0, row, log_probs if row.shape == log_probs.shape else log_probs.sum(1))
        return scores.float().cpu()

    def counted(self, call: Callable[[int], Any]) -> tuple[Any, list[int]]:
        """The result of one call, and the nodes per layer that it evaluates; layers that `shared` tabulates count 0."""
        if self.method.reads == "strings":
            with evaluated_nodes(self.config) as nodes:
                return call(self.sizes[0]), nodes
        with CountingNodes(self.config.widths) as counted:
            return call(self.sizes[0]), counted.nodes


def list_rows(
    lists: dict[str, OnList], call: str, nodes: dict[str, list[int]], models: Models, session: Session
) -> list[Row]:
    """Positions per second and multiply-adds of every method at its best batch size; call: "logits" or "scores"."""
    calls = {name: getattr(method, call) for name, method in lists.items()}
    sizes = {name: method.sizes for name, method in lists.items()}
    best, samples = time_at_best(calls, sizes, session, session.pick(3, 9))
    rows = []
    for name, method in lists.items():
        row: Row = {"method": name, "batch": best[name], "names": len(method.names), "positions": method.positions}
        row |= {"calls": len(samples[name]), **spread("us", samples[name])}
        row |= spread("positions_per_second", [method.positions / us * 1e6 for us in samples[name]])
        if name in nodes:
            work = multiply_adds(models.conv, nodes[name], method.positions)
            if name == "shared":
                work = shared_multiply_adds(method.config, nodes[name])
            row |= {"nodes": nodes[name], "multiply_adds_per_position": work / method.positions}
            row["multiply_adds_per_second"] = work / row["us"] * 1e6
        rows.append(row)
    return rows


@contextmanager
def evaluated_nodes(config: WaveNetConfig) -> Iterator[list[int]]:
    """Inside the `with`, counts per layer the nodes that scorers evaluate, as they find their ids."""
    nodes, find_ids = [0] * len(config.kernel_sizes), shared.ids_of_names

    def counting(*args: Any, **options: Any) -> Any:
        layers, *rest = find_ids(*args, **options)
        for layer, children in enumerate(layers, start=options["tabulated"]):
            nodes[layer] += len(children)
        return (layers, *rest)

    with patch.object(shared, "ids_of_names", counting):
        yield nodes


def tokens_by_length(names: Iterable[str], vocab: Vocabulary, context: int) -> list[Tensor]:
    """Tokens `(names, context + length)` per length that there is, so that nothing is padded behind a name."""
    same_length = groupby(sorted(names, key=len), key=len)
    return [vocab.encode(list(part), context=context)[0] for _, part in same_length]


def rows_by_length(names: Iterable[str]) -> Tensor:
    """Which name each row of `tokens_by_length` is."""
    return torch.tensor(list(map(len, names))).argsort(stable=True)


def exact_scores(tree: reference.Sequential, names: Sequence[str], vocab: Vocabulary) -> Tensor:
    """The log-likelihood of each name by the tree's windows in float64: `(names,)` on the CPU."""
    tree, context, scores = copy.deepcopy(tree).to(dtype=torch.float64), reference.context_of(tree), []
    device = tree.parameters()[0].device
    for tokens in tokens_by_length(names, vocab, context):
        for batch in tokens.to(device).split(512):
            log_probs = reference.window_logits(tree, batch).log_softmax(-1)
            scores.append(log_probs.gather(-1, F.pad(batch[:, context:], (0, 1))[..., None]).sum((1, 2)).cpu())
    return torch.cat(scores)[rows_by_length(names).argsort()]
