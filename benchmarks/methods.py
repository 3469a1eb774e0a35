"""The methods that benchmarks compare, by name: on tokens, on a list of names, and one character at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from benchmarks.counting import outputs
from benchmarks.harness import Session, Sized, rows_at_best
from benchmarks.tables import Row
from wavenet_conv import Scorer, Stream, Vocabulary, WaveNetConfig, fold_batch_norm, from_tree

try:
    from pytorch_tcn import TCN
except ImportError:
    TCN = None

PEER = "pytorch-tcn"
MISSING = {"method": f"{PEER} is not installed: pip install {PEER}"}
ARCHITECTURE: dict[str, Any] = {"kernel_sizes": [2, 2, 2], "n_embd": 24, "n_hidden": 128}  # the lecture's last network
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

    `reads` says what one call takes: any "windows", "names" of one length, or "one name"; "distinct windows" finds the
    windows that differ first; "strings" is `Scorer`'s way, from a list of names to their log-likelihoods. `model` makes
    what is called. `stepper` makes a step of one character in each of a batch of names; by default the model runs on
    windows.
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


def peer_step(models: Models, batch: int) -> Step:
    """The peer's streaming mode, which keeps what its convolutions have read; it takes one row."""
    peer = models.peer
    peer.tcn.reset_buffers()
    return lambda tokens: peer.tcn.inference(peer.embedding(tokens[:, None]).transpose(1, 2))[..., 0]


METHODS = {
    "loop": Method("one name", lambda models: partial(reference.loop_logits, models.tree)),
    "windows": Method("windows", lambda models: models.tree),
    "windows_folded": Method("windows", lambda models: models.folded_tree),
    "windows_distinct": Method("distinct windows", lambda models: models.folded_tree),
    "slid_conv1d": Method("names", lambda models: models.conv),
    "slid": Method("names", lambda models: models.folded),
    "shared": Method("strings", lambda models: Scorer(models.conv, models.vocab, dtype=torch.float32)),
    "stream": Method("characters", lambda models: None, lambda models, batch: Stream(models.conv, batch).step),
    "stream_graph": Method(
        "characters", lambda models: None, lambda models, batch: Stream(models.conv, batch, graph=True).step
    ),
    PEER: Method("names", lambda models: models.peer, peer_step),
}
GRAPHS = ("slid_graph", "stream_graph")  # on CUDA; captured and timed after all else, and never profiled
PEERS = (PEER,) if TCN is not None else ()


class Peer(nn.Module):
    """A `TCN` of `pytorch-tcn` of the same widths, dilations and kernel size, with an embedding and a head.

    Another function: it pads activations with zeros, and each block holds two convolutions and a residual. Its
    normalisation is left out, as ours is folded.
    """

    def __init__(self, config: WaveNetConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        shape = {"num_inputs": config.n_embd, "num_channels": list(config.widths), "dilations": list(config.dilations)}
        shape |= {"kernel_size": config.kernel_sizes[0], "output_projection": config.vocab_size}
        self.tcn = TCN(**shape, dropout=0.0, causal=True, use_norm=None, activation="tanh")

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, time, vocab)` of tokens `(batch, time)`."""
        return self.tcn(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)


def random_models(names: Sequence[str], session: Session) -> tuple[Models, Row]:
    """Random weights with the batch statistics of the names' own windows, and what the JSON says of them."""
    torch.manual_seed(session.args.seed)
    tree = reference.build(vocab_size=len(session.vocab), **ARCHITECTURE)
    for _ in range(20):
        sample = [names[i] for i in torch.randint(len(names), (64,))]
        reference.window_logits(tree, session.vocab.encode(sample, context=reference.context_of(tree))[0])
    models = Models(tree.eval().to(session.device), session.vocab)
    sizes = {"context": models.context, "vocab_size": len(session.vocab), "parameters": parameters(tree)}
    return models, {**ARCHITECTURE, **sizes, "seed": session.args.seed}


class Replayed:
    """A model on tokens of one shape, captured once as a CUDA graph; a call copies tokens into it and replays it.

    Every call writes its logits into the same tensor. The graph reads weights and tokens that this object keeps.
    """

    def __init__(self, model: Model, tokens: Tensor):
        self.model, self.tokens = model, tokens.clone()
        self.graph, device = torch.cuda.CUDAGraph(), tokens.device
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # libraries allocate their workspaces in the first calls
            for _ in range(3):
                model(self.tokens)
        current.wait_stream(stream)
        # PyTorch's own stream for captures is on the first device that has captured.
        with torch.cuda.device(device), torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = model(self.tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of tokens `(batch, time)` of that shape, as the model's, until the next call."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


def parameters(model: Any) -> int:
    """How many numbers a model has learned."""
    return sum(p.numel() for p in model.parameters())


class OnList:
    """A method on a list of names.

    What it reads lies on the device before the clock starts: windows cut, lengths sorted, targets beside them. Only
    `shared` starts at the strings, so this favours the others. The loop takes a sample of `few` names.
    """

    def __init__(self, name: str, models: Models, names: Sequence[str], few: int = 0):
        self.method = METHODS[name]
        self.names = list(names[:: max(1, len(names) // few)] if name == "loop" else names)
        self.positions, self.model = outputs(self.names), self.method.model(models)
        self.vocab_size, cut = len(models.vocab), "windows" in self.method.reads
        batches: dict[str, Sequence[int]] = {"one name": (1,), "strings": (len(self.names),)}
        batches |= {"names": NAME_BATCHES[models.device.type]}
        self.sizes = WINDOW_BATCHES[models.device.type] if cut else batches[self.method.reads]
        if self.method.reads == "strings":
            return
        # The peer pads by itself, with zeros inside the network: one `.` before a name is all that it is given.
        context, parts = 1 if name == PEER else models.context, []
        length = lambda numbered: len(numbered[1])
        for _, same_length in groupby(sorted(enumerate(self.names), key=length), key=length):  # no padding behind
            rows, part = zip(*same_length)
            tokens = models.vocab.encode(part, context=context)[0].to(models.device)
            targets = F.pad(tokens[:, context:], (0, 1))
            places = torch.tensor(rows).to(tokens)[:, None].expand_as(targets)
            if cut:
                tokens = reference.windows(tokens, context).flatten(0, 1)
                targets, places = targets.flatten(), places.flatten()
            parts.append((tokens, targets, places))
        self.parts = [tuple(map(torch.cat, zip(*parts)))] if cut else parts

    def batches(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Tokens, the tokens that follow, and the names' numbers, so many windows or names at once."""
        for part in self.parts:
            yield from zip(*(tensor.split(size) for tensor in part))

    def logits(self, size: int) -> None:
        """Computes all logits in batches of this size and keeps none."""
        for tokens, _, _ in self.batches(size):
            self.model(tokens)

    def scores(self, size: int) -> Tensor:
        """The log-likelihood of each name: float64 `(names,)` on the CPU."""
        if self.method.reads == "strings":
            return self.model.score(self.names).double()
        scores = torch.zeros(len(self.names), dtype=torch.float64, device=self.parts[0][0].device)
        if self.method.reads == "distinct windows":
            ((windows, targets, places),) = self.parts
            distinct, rows = distinct_windows(windows, self.vocab_size)
            all_log_probs = torch.cat([self.model(part).log_softmax(-1) for part in distinct.split(size)])
            return scores.index_add_(0, places, all_log_probs[rows, targets].double()).cpu()
        for tokens, targets, places in self.batches(size):
            log_probs = self.model(tokens).log_softmax(-1).gather(-1, targets[..., None])
            scores.index_add_(0, places.flatten(), log_probs.flatten().double())
        return scores.cpu()


def distinct_windows(windows: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The windows that differ, int64 `(distinct, context)`, and each window's row of them; `(n, context)` before.

    A window is one int64, its tokens as digits, since `unique` is much faster on single numbers than on rows.
    """
    powers = vocab_size ** torch.arange(windows.shape[1], device=windows.device)
    keys, rows = (windows * powers).sum(1).unique(return_inverse=True)
    return keys[:, None] // powers % vocab_size, rows


def exact_scores(models: Models, names: Sequence[str]) -> Tensor:
    """The log-likelihood of each name by the tree's windows in float64: `(names,)` on the CPU."""
    exact = Models(copy.deepcopy(models.tree).to(dtype=torch.float64), models.vocab)
    return OnList("windows", exact, names).scores(4096)


def list_rows(lists: dict[Any, OnList], call: str, models: Models, session: Session) -> list[Row]:
    """A row for each method at its best batch size, per position.

    call: "logits", which stay on the device, or "scores", which end on the host and are timed until they are there.
    """

    def positions(name: Any, size: int) -> int:
        getattr(lists[name], call)(size)
        return lists[name].positions

    methods: dict[Any, Sized] = {name: Sized(partial(positions, name), lists[name].sizes) for name in lists}
    rounds, to_host = session.pick(3, 9), call == "scores"
    rows = rows_at_best(methods, "position", models.conv.config, rounds, "whole list", session, by_host=to_host)
    return [row | {"names": len(lists[row["method"]].names)} for row in rows]
