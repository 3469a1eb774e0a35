"""A tree of anyone's classes becomes convolutions; a tree without an equal is rejected, with the layer's name."""

import pytest
import torch
from helpers import KINDS, norms_of, parts_of, random_tree
from torch import nn

import reference as R
from wavenet_conv import WaveNetConvError, fold_batch_norm, from_tree, verify

Flatten = type("Flatten", (), {"__call__": lambda self, x: x.view(len(x), -1)})  # as in the lecture's third part


@pytest.fixture
def some(names):
    return names[::200]


@pytest.mark.parametrize("kernel_sizes", [(8,), (3, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_lists_missing_flattens_and_missing_biases_map(some, vocab, kernel_sizes, kind):
    tree = random_tree(kernel_sizes, n_embd=6, n_hidden=10, **kind)
    layers = [layer for layer in tree.layers if getattr(layer, "n", 0) != 1 or kind.get("gated")]  # 1 is the default
    layers = [Flatten() if isinstance(layer, R.FlattenConsecutive) and layer.n == 8 else layer for layer in layers]
    for part in parts_of(tree):
        if hasattr(part, "bias"):
            part.bias = None
    for norm in norms_of(tree):  # of the shape that training leaves
        norm.running_mean, norm.running_var = norm.running_mean[None], norm.running_var[None]
    conv = from_tree([layers[:2], tuple(layers[2:])])
    assert conv.config.kernel_sizes == kernel_sizes and not conv.training
    assert verify(layers, conv, some, vocab).equal


class FlattenConsecutive(nn.Module):
    forward = R.FlattenConsecutive.forward

    def __init__(self, n):
        super().__init__()
        self.n = n


class BatchNormOfLast(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1) if x.ndim == 3 else super().forward(x)


def torch_tree():
    fusions = [
        nn.Sequential(FlattenConsecutive(2), nn.Linear(2 * channels, 10), BatchNormOfLast(10), nn.Tanh())
        for channels in (6, 10, 10)
    ]
    return nn.Sequential(nn.Embedding(27, 6), *fusions, nn.Linear(10, 27))


def flat_torch_tree():
    layers = [nn.Embedding(27, 6), nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10, affine=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(10, 27, bias=False))


@pytest.mark.parametrize(("build", "kernel_sizes"), [(torch_tree, (2, 2, 2)), (flat_torch_tree, (8,))])
def test_torch_sequential_maps(some, vocab, build, kernel_sizes):
    torch.manual_seed(0)
    tree = build()
    tree(torch.randint(27, (64, 8)))  # new running statistics
    for parameter in tree.parameters():
        nn.init.normal_(parameter, std=0.5)
    conv = from_tree(tree.double().eval())
    assert conv.config.kernel_sizes == kernel_sizes
    assert verify(tree, conv, some, vocab).equal
    assert verify(tree, fold_batch_norm(conv), some, vocab).equal


def gated_parts(**replaced):
    """Two layers of 4 channels with gates of 5 and 3; `replaced` are attributes of the first block."""
    blocks = [R.GatedBlock(2, 4, 5), R.GatedBlock(3, 4, 3, last=True)]
    for name, value in replaced.items():
        setattr(blocks[0], name, value)
    return [R.Embedding(27, 4), *blocks, R.ReLU(), R.Linear(4, 4), R.ReLU(), R.Linear(4, 27)]


Residual = type("Residual", (), {"layers": [R.Tanh()]})  # runs its layers, and may do something more
Bare = type("Bare", (), {"eps": 0, "running_mean": torch.ones(5), "running_var": torch.ones(5)})
Doubled = type("Doubled", (nn.Sequential,), {"forward": lambda self, x: 2 * x})


def parts():
    layers = [R.Embedding(27, 4), R.FlattenConsecutive(2), R.Linear(8, 5), R.BatchNorm1d(5), R.Tanh()]
    return [*layers, R.Linear(5, 27)]


def replaced(index, *others, of=parts):
    layers = of()
    layers[index : index + 1] = others
    return layers


def norm_with(**members):
    norm = R.BatchNorm1d(5)
    vars(norm).update(members)
    return replaced(3, norm)


def gated_with(place, *others):
    return replaced(place, *others, of=gated_parts)


REJECTED = [
    (list, "starts with an Embedding, not with no layer; a tree is Embedding, per layer"),
    (lambda: replaced(0, nn.Embedding(27, 4, max_norm=1.0)), r"layer 0 \(Embedding\).*max_norm.*build it without"),
    (lambda: replaced(4, Residual()), r"layer 4 \(Residual\) does not belong after"),
    (lambda: nn.Sequential(nn.Embedding(27, 4), Doubled(nn.Tanh())), r"layer 1 \(Doubled\) does not belong"),
    (lambda: replaced(4), r"layer 4 \(Linear\) does not belong after BatchNorm1d; a tree is Embedding, per layer"),
    (lambda: replaced(1, R.FlattenConsecutive(3)), r"layer 2 \(Linear\) takes 8 inputs, but 3 \* 4 channels come in"),
    (lambda: replaced(2, type("Linear", (), {})()), r"layer 2 \(Linear\) has no weight tensor"),
    (lambda: replaced(5), "does not end with a head.*a tree is Embedding"),
    (lambda: replaced(5, R.Linear(5, 26)), r"layer 5 \(Linear\) has .* \(5, 26\); the head.* needs \(5, 27\)"),
    (
        lambda: replaced(5, R.Linear(5, 5), *parts()[4:]),
        r"layer 5 \(Linear\) has no batch norm; give it to every layer",
    ),
    (lambda: replaced(3, nn.BatchNorm1d(5, track_running_stats=False)), r"layer 3 \(BatchNorm1d\) has no running_mean"),
    (lambda: replaced(3, type("BatchNorm1d", (Bare,), {})()), r"layer 3 \(BatchNorm1d\) has no weight"),
    (
        lambda: norm_with(running_var=torch.ones(1, 4, 5)),
        r"^layer 3 .*\(1, 4, 5\).*cannot share .*\(1, 1, 5\), and train",
    ),
    (lambda: norm_with(gamma=torch.ones(4)), r"a gamma of shape \(4,\) for 5 channels"),
    (lambda: norm_with(gamma=torch.ones(5).double()), "gamma of torch.float64; convert the whole"),
    (lambda: gated_with(3), r"layer 2 \(GatedBlock\) stands where a gated tree has its ReLU; a gated tree is"),
    (lambda: gated_with(6, R.Linear(4, 26)), r"layer 6 \(Linear\) has .* \(4, 26\); the head"),
    (lambda: gated_with(4, R.Linear(4, 5)), r"layer 4 \(Linear\) has .* the layer before the head needs \(4, 4\)"),
    (lambda: gated_parts(n=None), r"layer 1 \(GatedBlock\) has no n that is an integer, its kernel size"),
    (lambda: gated_parts(linear=R.Linear(8, 9)), r"the linear of this GatedBlock needs \(8, 8\)"),
    (lambda: gated_parts(skip=R.Linear(4, 5)), r"layer 1 .*the skip of this GatedBlock needs \(5, 4\)"),
    (lambda: gated_parts(skip=nn.Linear(5, 4).double()), r"layer 1 \(Linear\) has a weight of torch.float64"),
    (lambda: gated_parts(residual=None), r"layer 1 \(GatedBlock\) has a residual that is wrong"),
    (lambda: gated_with(2, gated_parts()[1]), "the last block's residual, which nothing reads, is None"),
]


@pytest.mark.parametrize(("tree", "message"), REJECTED, ids=[message[:40] for _, message in REJECTED])
def test_tree_without_an_equal_is_rejected_by_name(tree, message):
    with pytest.raises(WaveNetConvError, match=message):
        from_tree(tree())


@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_there_and_back_gives_the_same_bits(kernel_sizes, kind):
    tree = random_tree(kernel_sizes, n_embd=6, n_hidden=10, **kind, dtype=torch.float32)
    for norm in norms_of(tree):
        norm.eps, norm.momentum = 1e-3, 0.0
    state = torch.random.get_rng_state()
    conv = from_tree(tree)
    assert all((layer.norm.eps, layer.norm.momentum) == (1e-3, 0.0) for layer in conv.layers if norms_of(tree))
    back = R.from_conv(conv)
    assert torch.equal(torch.random.get_rng_state(), state)  # neither way draws random numbers
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in tree.layers]
    assert R.context_of(back) == conv.context
    for original, copied in zip(parts_of(tree), parts_of(back), strict=True):
        for name, value in vars(original).items():
            other = getattr(copied, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(other, value) and other.data_ptr() != value.data_ptr(), name
            else:
                assert other == value, name
