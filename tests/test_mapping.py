"""A tree becomes convolutions as it stands, whoever wrote its classes; what has no equal is refused by name."""

import itertools

import pytest
import torch
from conftest import parts_of, random_tree
from torch import nn

import reference
from wavenet_conv import ConvWaveNet, WaveNetConfig, WaveNetConvError, fold_batch_norm, from_tree, verify


def notebook():
    """The classes as somebody would type them along with the lecture: nothing shared with `reference` but the names."""

    class Linear:
        def __init__(self, kernel_size, fan_out, bias=True):
            self.weight = torch.randn((kernel_size, fan_out)) / kernel_size**0.5
            self.bias = torch.randn(fan_out) if bias else None

        def __call__(self, x):
            self.out = x @ self.weight
            if self.bias is not None:
                self.out += self.bias
            return self.out

    class BatchNorm1d:
        def __init__(self, dim, eps=1e-5, momentum=0.1):
            self.eps, self.momentum, self.training = eps, momentum, True
            self.gamma, self.beta = torch.rand(dim) + 0.5, torch.randn(dim)
            self.running_mean, self.running_var = torch.zeros(dim), torch.ones(dim)

        def __call__(self, x):
            if self.training:
                dim = 0 if x.ndim == 2 else (0, 1)
                mean, var = x.mean(dim, keepdim=True), x.var(dim, keepdim=True)
                self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
                self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var
            else:
                mean, var = self.running_mean, self.running_var
            self.out = self.gamma * (x - mean) / torch.sqrt(var + self.eps) + self.beta
            return self.out

    class Tanh:
        def __call__(self, x):
            self.out = torch.tanh(x)
            return self.out

    class Embedding:
        def __init__(self, num_embeddings, embedding_dim):
            self.weight = torch.randn((num_embeddings, embedding_dim))

        def __call__(self, ids):
            self.out = self.weight[ids]
            return self.out

    class FlattenConsecutive:
        def __init__(self, n):
            self.n = n

        def __call__(self, x):
            b, t, c = x.shape
            x = x.view(b, t // self.n, c * self.n)
            self.out = x.squeeze(1) if x.shape[1] == 1 else x
            return self.out

    class Flatten:
        def __call__(self, x):
            self.out = x.view(x.shape[0], -1)
            return self.out

    class Sequential:
        def __init__(self, layers):
            self.layers = layers

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Classes:
        pass

    for cls in (Linear, BatchNorm1d, Tanh, Embedding, FlattenConsecutive, Flatten, Sequential):
        setattr(Classes, cls.__name__, cls)
    return Classes


def typed_along(kernel_sizes=(2, 2, 2), batch_norm=True, n_embd=6, n_hidden=10):
    c = notebook()
    layers, channels = [c.Embedding(27, n_embd)], n_embd
    for kernel_size in kernel_sizes:
        flatten = c.Flatten() if kernel_sizes == (8,) else c.FlattenConsecutive(kernel_size)
        layers += [flatten, c.Linear(channels * kernel_size, n_hidden, bias=not batch_norm)]
        layers += [c.BatchNorm1d(n_hidden)] if batch_norm else []
        layers += [c.Tanh()]
        channels = n_hidden
    tree = c.Sequential([*layers, c.Linear(channels, 27)])
    tokens = torch.randint(27, (64, 8 if kernel_sizes != (3,) else 3))
    tree(tokens)  # in training mode: the statistics take the shapes that they take in the lecture
    for layer in tree.layers:
        layer.training = False
    return tree


@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3,)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_notebooks_own_classes_map(names, vocab, kernel_sizes, batch_norm):
    torch.manual_seed(0)
    tree = typed_along(kernel_sizes, batch_norm)
    conv = from_tree(tree)
    assert conv.config.kernel_sizes == kernel_sizes and not conv.training
    assert verify(tree, conv, names[::50], vocab).equal
    assert verify(tree, from_tree(tree.layers), names[::50], vocab).equal  # a bare list of layers too


def test_a_deep_stack_without_flatten_has_fan_in_1(names, vocab):
    c = notebook()
    layers = [c.Embedding(27, 4), c.FlattenConsecutive(3), c.Linear(12, 5), c.Tanh(), c.Linear(5, 6), c.Tanh()]
    tree = c.Sequential([*layers, c.Linear(6, 27)])
    conv = from_tree(tree)
    assert conv.config.kernel_sizes == (3, 1) and conv.dilations == (1, 3) and conv.config.n_hidden == (5, 6)
    assert verify(tree, conv, names[::50], vocab).equal


class FlattenConsecutive(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        batch, time, channels = x.shape
        x = x.reshape(batch, time // self.n, channels * self.n)
        return x.squeeze(1) if x.shape[1] == 1 else x


class BatchNormOfLast(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1) if x.ndim == 3 else super().forward(x)


def torch_tree(bias=False):
    layers = []
    for c_in in (6, 10, 10):
        layers.append(
            nn.Sequential(FlattenConsecutive(2), nn.Linear(2 * c_in, 10, bias=bias), BatchNormOfLast(10), nn.Tanh())
        )
    return nn.Sequential(nn.Embedding(27, 6), *layers, nn.Linear(10, 27))


@pytest.mark.parametrize("bias", [False, True])
def test_a_torch_sequential_maps(names, vocab, bias):
    torch.manual_seed(0)
    tree = torch_tree(bias)
    tree(torch.randint(27, (64, 8)))
    for norm in (m for m in tree.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    conv = from_tree(tree.double().eval())
    assert conv.config.bias == bias
    assert verify(tree, conv, names[::50], vocab).equal
    assert verify(tree, fold_batch_norm(conv), names[::50], vocab).equal


def test_a_flat_torch_sequential_maps(names, vocab):
    layers = [nn.Embedding(27, 6), nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10, affine=False), nn.Tanh()]
    tree = nn.Sequential(*layers, nn.Linear(10, 27, bias=False))
    tree(torch.randint(27, (64, 8)))
    conv = from_tree(tree.eval())
    assert conv.config.kernel_sizes == (8,)
    assert verify(tree, conv, names[::50], vocab).equal


@pytest.mark.parametrize("shape", [(10,), (1, 10), (1, 1, 10)])
def test_running_statistics_of_every_shared_shape_are_read(names, vocab, shape):
    tree = random_tree(n_embd=6, n_hidden=10)
    for layer in (tree.layers[3], tree.layers[7]):  # the layers with three axes
        layer.running_mean, layer.running_var = layer.running_mean.view(shape), layer.running_var.view(shape)
    conv = from_tree(tree)
    assert conv.layers[0].norm.running_mean.shape == (10,)
    assert verify(tree, conv, names[::50], vocab).equal


def test_statistics_per_position_are_refused():
    tree = reference.build(n_embd=6, n_hidden=10, per_position=True)
    tree(torch.randint(27, (32, 8)))
    with pytest.raises(WaveNetConvError) as refused:
        from_tree(tree.eval())
    message = str(refused.value)
    assert message.startswith("layer 3 (BatchNorm1d)")  # which
    assert "(1, 4, 10)" in message and "two parents cannot share it" in message  # why
    assert "(0, 1)" in message and "(1, 1, 10)" in message and "train again" in message  # what to do


class ReLU:
    pass


class Residual:
    """Runs its layers, and does something more."""

    def __init__(self, layers):
        self.layers = layers


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def batch_norm_with(**members):
    norm = notebook().BatchNorm1d(5)
    for name, value in members.items():
        if value is None:
            delattr(norm, name)
        else:
            setattr(norm, name, value)
    return norm


def parts():
    c = notebook()
    return [c.Embedding(27, 4), c.FlattenConsecutive(2), c.Linear(8, 5), c.BatchNorm1d(5), c.Tanh(), c.Linear(5, 27)]


def replaced(index, *others):
    layers = parts()
    layers[index : index + 1] = others
    return layers


def torch_batch_norm_over_positions():
    """4 nodes of 4 channels: torch's batch norm runs, over the wrong axis."""
    layers = [FlattenConsecutive(2), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Tanh(), FlattenConsecutive(4)]
    return nn.Sequential(nn.Embedding(27, 4), *layers, nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 27))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda: replaced(4, ReLU()), r"layer 4 \(ReLU\) is not a layer that the mapping knows"),
        (lambda: replaced(4), r"layer 4 \(Linear\) does not belong after BatchNorm1d"),
        (lambda: replaced(1, notebook().FlattenConsecutive(3)), r"layer 2 \(Linear\) takes 8 inputs, but 3 nodes of 4"),
        (lambda: replaced(1), r"layer 1 \(Linear\) takes 8 inputs, but 1 nodes of 4"),
        (lambda: replaced(5), "not a head"),
        (lambda: replaced(5, notebook().FlattenConsecutive(2), notebook().Linear(10, 27)), "not a head"),
        (lambda: [*parts(), notebook().BatchNorm1d(27)], "not a head"),
        (lambda: replaced(5, notebook().Linear(5, 26)), r"gives 26 logits but the embedding has 27 tokens"),
        (lambda: parts()[1:], "starts with an Embedding; it starts with FlattenConsecutive"),
        (lambda: [], "has no layers"),
        (lambda: parts()[:1] + parts()[-1:], "layer 1.*takes 5 inputs"),
        (lambda: replaced(3, nn.BatchNorm1d(5, track_running_stats=False)), r"layer 3 \(BatchNorm1d\) has no running_"),
        (lambda: replaced(0, nn.Embedding(27, 4, max_norm=1.0)), r"layer 0 \(Embedding\).*max_norm"),
        (lambda: replaced(1, nn.Flatten(2)), r"layer 1 \(Flatten\) flattens other axes"),
        (lambda: replaced(4, Residual([notebook().Tanh()])), r"layer 4 \(Residual\) is not a layer that"),
        (lambda: nn.Sequential(nn.Embedding(27, 4), Doubled(nn.Tanh())), r"layer 1 \(Doubled\) is not a layer that"),
        (lambda: replaced(4, nn.Tanh), "layer 4 is the class Tanh, not an instance; write Tanh"),
        (lambda: replaced(3, batch_norm_with(gamma=None)), r"layer 3 \(BatchNorm1d\) has neither gamma nor weight"),
        (lambda: replaced(3, batch_norm_with(eps=None)), r"layer 3 \(BatchNorm1d\) has no eps"),
        (lambda: replaced(3, batch_norm_with(gamma=torch.ones(4))), r"a gamma of shape \(4,\) for 5 channels"),
        (lambda: replaced(3, batch_norm_with(running_var=torch.ones(1, 4))), r"running_var of shape \(1, 4\) for 5 ch"),
        (
            lambda: replaced(3, batch_norm_with(gamma=torch.ones(5).double())),
            "gamma of torch.float64 and the embedding",
        ),
        (lambda: torch_batch_norm_over_positions(), r"layer 3 \(BatchNorm1d\) normalises axis 1"),
        (
            lambda: parts()[:5] + [notebook().FlattenConsecutive(2), notebook().Linear(10, 5)] + parts()[4:],
            r"layer 6 \(Linear\) has no batch norm but other layers do",
        ),
    ],
)
def test_what_has_no_equal_is_refused_by_name(layers, message):
    with pytest.raises(WaveNetConvError, match=message):
        from_tree(layers())


def test_any_other_object_is_refused_by_name():
    with pytest.raises(WaveNetConvError, match="starts with an Embedding; it starts with GRU"):
        from_tree(nn.GRU(3, 4))


@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("kind", [{"batch_norm": True}, {"batch_norm": False}, {"gated": True}], ids=str)
def test_both_ways_round_give_the_same_bits(kernel_sizes, kind):
    tree = random_tree(kernel_sizes, n_embd=6, n_hidden=10, **kind, dtype=torch.float32)
    conv = from_tree(tree)
    back = reference.from_conv(conv)
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in tree.layers]
    assert reference.context_of(back) == reference.context_of(tree) == conv.context
    for original, copied in itertools.zip_longest(parts_of(tree), parts_of(back)):
        assert type(original) is type(copied)
        for name, value in vars(original).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(copied, name), value), name
                assert getattr(copied, name).data_ptr() != value.data_ptr()
            else:
                assert getattr(copied, name) == value, name
    again = from_tree(back)
    assert again.config == conv.config
    assert all(torch.equal(p, q) for p, q in zip(again.state_dict().values(), conv.state_dict().values()))
    tokens = torch.randint(27, (3, 20))
    with torch.no_grad():
        assert torch.equal(again(tokens), conv(tokens))
        assert torch.equal(reference.window_logits(back, tokens), reference.window_logits(tree, tokens))


def test_eps_and_momentum_come_along():
    tree = random_tree(n_embd=6, n_hidden=10)
    tree.layers[3].eps, tree.layers[3].momentum = 1e-3, 0.01
    conv = from_tree(tree)
    assert (conv.layers[0].norm.eps, conv.layers[0].norm.momentum) == (1e-3, 0.01)
    back = reference.from_conv(conv)
    assert (back.layers[3].eps, back.layers[3].momentum) == (1e-3, 0.01)


def test_a_fresh_slid_model_goes_to_a_tree(names, vocab):
    torch.manual_seed(0)
    conv = ConvWaveNet(WaveNetConfig(kernel_sizes=(2, 3), n_embd=4, n_hidden=(5, 6), bias=True)).eval()
    assert verify(reference.from_conv(conv), conv, names[::50], vocab).equal
    assert reference.from_conv(conv.train()).layers[3].training
    conv = ConvWaveNet(WaveNetConfig(kernel_sizes=(2, 3), n_embd=4, n_hidden=(5, 6), gated=True)).eval()
    assert verify(reference.from_conv(conv), conv, names[::50], vocab).equal


def gated_classes():
    """A block and a ReLU as somebody would write them from the paper: nothing shared with `reference` but the names."""
    Linear = notebook().Linear

    class GatedBlock:
        def __init__(self, n, channels, gate, last=False, bias=True):
            self.n = n
            self.linear, self.skip = Linear(n * channels, 2 * gate, bias), Linear(gate, channels, bias)
            self.residual = None if last else Linear(gate, channels, bias)

        def __call__(self, x):
            h, s = x if isinstance(x, tuple) else (x, 0 * x)
            groups = h.unflatten(1, (-1, self.n))  # (batch, parents, children, channels)
            wide = self.linear(groups.flatten(2))
            gate = wide.shape[-1] // 2
            z = wide[..., :gate].tanh() / (1 + (-wide[..., gate:]).exp())
            s = self.skip(z) + s[:, self.n - 1 :: self.n]
            return s[:, 0] if self.residual is None else (groups[:, :, -1] + self.residual(z), s)

    class ReLU:
        def __call__(self, x):
            return x * (x > 0)

    return GatedBlock, ReLU


def gated_parts(bias=True, **kinds):
    """Two layers: 4 channels, gates of 5 and 3; `kinds` replaces attributes of the first block."""
    c, (GatedBlock, ReLU) = notebook(), gated_classes()
    blocks = [GatedBlock(2, 4, 5, bias=bias), GatedBlock(3, 4, 3, last=True, bias=bias)]
    for name, value in kinds.items():
        setattr(blocks[0], name, value)
    return [c.Embedding(27, 4), *blocks, ReLU(), c.Linear(4, 4, bias), ReLU(), c.Linear(4, 27, bias)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_notebooks_own_gated_blocks_map(names, vocab, bias):
    torch.manual_seed(0)
    layers = gated_parts(bias)
    conv = from_tree(notebook().Sequential(layers))
    assert conv.config == WaveNetConfig(27, 4, (5, 3), (2, 3), gated=True)
    assert verify(layers, conv, names[::50], vocab).equal


class GatedBlock(nn.Module):
    def __init__(self, n, channels, gate, last=False):
        super().__init__()
        self.n, self.linear, self.skip = n, nn.Linear(n * channels, 2 * gate), nn.Linear(gate, channels)
        self.residual = None if last else nn.Linear(gate, channels)

    forward = reference.GatedBlock.forward


def test_a_torch_gated_sequential_maps(names, vocab):
    torch.manual_seed(0)
    blocks = nn.Sequential(GatedBlock(3, 6, 4), GatedBlock(1, 6, 5), GatedBlock(2, 6, 7, last=True))
    tree = nn.Sequential(nn.Embedding(27, 6), blocks, nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 27)).double()
    conv = from_tree(tree.eval())
    assert conv.config.n_hidden == (4, 5, 7) and conv.layers[2].residual is None
    assert verify(tree, conv, names[::50], vocab).equal


def gated_without(place):
    layers = gated_parts()
    del layers[place]
    return layers


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda: gated_without(3), r"layer 2 \(GatedBlock\) stands where a gated tree has its ReLU; a gated tree is"),
        (lambda: gated_without(0), "starts with an Embedding; it starts with GatedBlock"),
        (lambda: gated_parts()[:3], r"layer 1 \(GatedBlock\) stands where a gated tree has its"),
        (lambda: [*parts()[:5], *gated_parts()[1:]], r"layer 1 \(FlattenConsecutive\) stands where .* its GatedBlock"),
        (lambda: [*gated_parts()[:6], notebook().Linear(4, 26)], r"layer 6 \(Linear\) gives 26 logits"),
        (lambda: [*gated_parts()[:6], notebook().Linear(5, 27)], r"layer 6 \(Linear\) takes 5 inputs, but 4 channels"),
        (
            lambda: [*gated_parts()[:4], notebook().Linear(4, 5), *gated_parts()[5:]],
            r"layer 4 \(Linear\) gives 5 channels; it keeps 4",
        ),
        (lambda: gated_parts(residual=None), r"layer 1 \(GatedBlock\) has no residual that is a linear layer"),
        (lambda: gated_parts(skip=None), r"layer 1 \(GatedBlock\) has no skip that is a linear layer"),
        (lambda: gated_parts(n=None), r"layer 1 \(GatedBlock\) has no n that is a whole number, its kernel size"),
        (lambda: gated_parts(n=3), r"layer 1 .* a linear of 8 inputs and 10 outputs; 3 nodes of 4 channels come in"),
        (lambda: gated_parts(linear=notebook().Linear(8, 9)), "8 inputs and 9 outputs; .* as many filters as gates"),
        (
            lambda: gated_parts(skip=notebook().Linear(4, 5)),
            r"layer 1 .* has a skip of 4 inputs and 5 outputs, where the gate has 5 and a node 4 channels",
        ),
        (
            lambda: [*gated_parts()[:2], gated_parts()[1], *gated_parts()[3:]],
            r"layer 2 \(GatedBlock\) is the last block and has a residual, which nobody reads; set it to None",
        ),
        (
            lambda: gated_parts(skip=nn.Linear(5, 4).double()),
            r"layer 1 \(Linear\) has a weight of torch.float64 and the embedding one of torch.float32",
        ),
        (lambda: [notebook().Embedding(27, 4), gated_classes()[0]], "layer 1 is the class GatedBlock, not an instance"),
    ],
)
def test_gated_trees_that_have_no_equal_are_refused_by_name(layers, message):
    with pytest.raises(WaveNetConvError, match=message):
        from_tree(layers())


def test_a_gated_model_folds_to_an_equal_copy():
    conv = from_tree(random_tree(n_embd=6, n_hidden=10, gated=True))
    folded = fold_batch_norm(conv)
    assert folded.config == conv.config and folded is not conv
    for (name, copied), original in zip(folded.state_dict().items(), conv.state_dict().values()):
        assert torch.equal(copied, original) and copied.data_ptr() != original.data_ptr(), name


def test_folding_leaves_the_original_and_takes_away_the_norm():
    conv = from_tree(random_tree(n_embd=6, n_hidden=10))
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    folded = fold_batch_norm(conv)
    assert all(layer.norm is None and layer.conv.bias is not None for layer in folded.layers)
    assert all(torch.equal(conv.state_dict()[name], value) for name, value in before.items())
    twice = fold_batch_norm(folded)
    assert all(torch.equal(p, q) for p, q in zip(twice.parameters(), folded.parameters()))


def test_the_wrong_way_round_is_named():
    tree = random_tree(n_embd=6, n_hidden=10)
    with pytest.raises(WaveNetConvError, match="takes a ConvWaveNet, not a Sequential; map a tree with from_tree"):
        fold_batch_norm(tree)
    with pytest.raises(ValueError, match="takes a ConvWaveNet, not a Sequential; from_tree goes the other way"):
        reference.from_conv(tree)


def test_a_momentum_of_zero_stays_zero():
    tree = random_tree(n_embd=6, n_hidden=10)
    tree.layers[3].momentum = 0.0
    assert from_tree(tree).layers[0].norm.momentum == 0.0


def test_mapping_draws_no_random_numbers():
    tree = random_tree(n_embd=6, n_hidden=10)
    gated = random_tree(n_embd=6, n_hidden=10, gated=True)
    state = torch.random.get_rng_state()
    reference.from_conv(fold_batch_norm(from_tree(tree)))
    reference.from_conv(fold_batch_norm(from_tree(gated)))
    assert torch.equal(torch.random.get_rng_state(), state)
