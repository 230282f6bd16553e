"""A loss and its gradients as one graph: what goes in, and what has none."""

import pytest
import torch

from pyro_lightning.inputs import flatten
from pyro_lightning.tracing import Untraceable, trace_loss


def run(traced, params, others):
    return traced.graph(*params, *others, *traced.constants)


def test_the_graph_gives_loss_and_gradients_on_other_inputs():
    def loss(params, others):
        return (params[0] ** 2 * others[0]).sum()

    traced = trace_loss(loss, [torch.ones(2)], [torch.ones(2)])
    x, y = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
    value, gradient = run(traced, [x], [y])
    assert float(value) == 4 * 5 + 9 * 7
    assert gradient.tolist() == [2 * 2 * 5, 2 * 3 * 7]


def test_it_tells_which_parameters_the_loss_depends_on():
    traced = trace_loss(lambda p, o: p[1].sum(), [torch.ones(2), torch.ones(3)], [])
    assert traced.used == [False, True]
    assert len(run(traced, [torch.ones(2), torch.ones(3)], [])) == 2


def test_tensors_that_are_no_inputs_are_read_each_time():
    outside = torch.tensor(2.0)
    traced = trace_loss(lambda p, o: p[0] * outside, [torch.tensor(3.0)], [])
    assert any(each is outside for each in traced.constants)
    outside.fill_(5.0)
    value, gradient = run(traced, [torch.tensor(3.0)], [])
    assert (float(value), float(gradient)) == (15.0, 5.0)


def test_random_numbers_are_drawn_anew():
    traced = trace_loss(lambda p, o: p[0] * torch.randn(()), [torch.tensor(1.0)], [])
    values = {float(run(traced, [torch.tensor(1.0)], [])[0]) for _ in range(5)}
    assert len(values) == 5


def test_an_item_is_the_tensor_without_gradient():
    traced = trace_loss(lambda p, o: p[0] * p[0].item(), [torch.tensor(2.0)], [])
    value, gradient = run(traced, [torch.tensor(3.0)], [])
    assert (float(value), float(gradient)) == (9.0, 3.0)


def test_values_of_constants_may_be_asked_for():
    table = torch.tensor([1.0, 2.0])

    def loss(params, others):
        assert table.tolist() == [1.0, 2.0]
        assert bool((table > 0).all())
        return params[0] * float(table[1])

    value, _ = run(trace_loss(loss, [torch.tensor(3.0)], []), [torch.tensor(4.0)], [])
    assert float(value) == 8.0


@pytest.mark.parametrize(
    "ask",
    [
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        bool,
        int,
        float,
        lambda x: range(3)[x.long()],
        lambda x: float(x + torch.randn(())),
    ],
)
def test_values_of_inputs_may_not(ask):
    def loss(params, others):
        ask(others[0])
        return params[0] * 2

    with pytest.raises(Untraceable, match=r"of a tensor that depends on parameters, batch or"):
        trace_loss(loss, [torch.tensor(3.0)], [torch.tensor(1.0)])


def test_values_of_random_numbers_may_not():
    with pytest.raises(Untraceable, match="depends on parameters, batch or random"):
        trace_loss(lambda p, o: p[0] * float(torch.randn(())), [torch.tensor(3.0)], [])


def test_a_loss_without_gradient_has_no_graph():
    with pytest.raises(Untraceable, match="the loss has no gradient"):
        trace_loss(lambda p, o: o[0] * 2, [torch.tensor(3.0)], [torch.tensor(1.0)])


@pytest.mark.parametrize(
    "take", [lambda x: x[x > 0], torch.nonzero, lambda x: torch.masked_select(x, x > 0)]
)
def test_sizes_that_depend_on_values_have_no_graph(take):
    def loss(params, others):
        return (params[0] * take(others[0])).sum()

    with pytest.raises(Untraceable, match="makes a tensor whose size depends on values"):
        trace_loss(loss, [torch.tensor(3.0)], [torch.tensor([1.0, -1.0])])


def test_one_hot_of_known_classes_is_traced():
    def loss(params, others):
        return (params[0] * torch.nn.functional.one_hot(others[0], 3)).sum()

    traced = trace_loss(loss, [torch.ones(3)], [torch.tensor([0, 1])])
    _, gradient = run(traced, [torch.ones(3)], [torch.tensor([2, 2])])
    assert gradient.tolist() == [0.0, 0.0, 2.0]
    with pytest.raises(Untraceable, match="one_hot without num_classes"):
        trace_loss(
            lambda p, o: (p[0] * torch.nn.functional.one_hot(o[0])).sum(),
            [torch.ones(2)],
            [torch.tensor([0, 1])],
        )


def test_a_trace_leaves_gradients_alone():
    parameter = torch.nn.Parameter(torch.ones(2))
    trace_loss(lambda p, o: p[0].sum(), [parameter], [])
    assert parameter.grad is None


# -- arguments -------------------------------------------------------------------------------------


def test_arguments_are_taken_apart_and_put_together():
    value = ([torch.zeros(2), {"a": torch.ones(3), "k": 3}], "name", None)
    flat = flatten(value)
    assert [tuple(each.shape) for each in flat.tensors] == [(2,), (3,)]
    first, name, nothing = flat.rebuilt(iter([torch.ones(2), torch.zeros(3)]))
    assert first[0].tolist() == [1.0, 1.0]
    assert first[1]["a"].tolist() == [0.0, 0.0, 0.0]
    assert (first[1]["k"], name, nothing) == (3, "name", None)


BASE = {"x": torch.zeros(2, 3), "k": 1}


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(3, 3), "k": 1},
        {"x": torch.zeros(3, 2).T, "k": 1},
        {"x": torch.zeros(2, 3).double(), "k": 1},
        {"x": torch.zeros(2, 3), "k": 2},
        {"x": torch.zeros(2, 3), "k": 1.0},
        {"x": torch.zeros(2, 3), "k": True},
        {"y": torch.zeros(2, 3), "k": 1},
        [torch.zeros(2, 3), 1],
    ],
    ids=["shape", "strides", "type", "number", "kind of number", "bool", "key", "container"],
)
def test_another_structure_is_told_apart(other):
    assert flatten(other).structure != flatten(BASE).structure
    assert flatten(BASE).structure == flatten({"x": torch.ones(2, 3), "k": 1}).structure


@pytest.mark.parametrize("value", [object(), torch.zeros(2, requires_grad=True), {1, 2}])
def test_other_arguments_have_no_graph(value):
    with pytest.raises(Untraceable, match=r"the batch\[0\] holds"):
        flatten((value,))
