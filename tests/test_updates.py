"""Updates as functions of tensors equal the steps of torch's own optimizers, and of ours by row."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from pyro_lightning import RowAdam, RowAdamW
from pyro_lightning.updates import is_served, kind_of, numbers_of, state_names, update

STEPS = 5


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


OPTIMIZERS = {
    "Adam": partial(Adam, lr=0.1),
    "Adam, betas and eps": partial(Adam, lr=0.1, betas=(0.8, 0.95), eps=1e-3),
    "Adam, amsgrad": partial(Adam, lr=0.1, amsgrad=True),
    "Adam, decay": partial(Adam, lr=0.1, weight_decay=0.1),
    "Adam, maximize": partial(Adam, lr=0.1, maximize=True),
    "Adam, foreach": partial(Adam, lr=0.1, foreach=True, amsgrad=True, weight_decay=0.1),
    "Adam, fused": partial(Adam, lr=0.1, fused=True, weight_decay=0.1),
    "Adam, a tensor's rate": lambda p: Adam(p, lr=torch.tensor(0.1)),
    "AdamW": partial(AdamW, lr=0.1),
    "AdamW, amsgrad, maximize": partial(AdamW, lr=0.1, amsgrad=True, maximize=True),
    "AdamW, decay": partial(AdamW, lr=0.1, weight_decay=0.5),
    "RowAdam": partial(RowAdam, lr=0.1, weight_decay=0.1),
    "RowAdamW": partial(RowAdamW, lr=0.1, weight_decay=0.5, amsgrad=True),
    "SGD": partial(SGD, lr=0.1),
    "SGD, decay": partial(SGD, lr=0.1, weight_decay=0.3, maximize=True),
    "SGD, momentum": partial(SGD, lr=0.1, momentum=0.9),
    "SGD, dampening": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "SGD, nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_a_step_of_the_optimizer(name):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(7))
    optimizer = OPTIMIZERS[name]([parameter])
    assert is_served(optimizer)
    for step in range(STEPS):
        parameter.grad = torch.randn(7)
        group, held = optimizer.param_groups[0], optimizer.state[parameter]
        names = state_names(optimizer, group)
        if step:  # the first makes the state
            value, state = update(
                optimizer,
                group,
                parameter.detach().clone(),
                parameter.grad.clone(),
                {each: held[each].clone() for each in names},
                [torch.tensor(float(number)) for number in numbers_of(optimizer, group)],
            )
        optimizer.step()
        if step:
            torch.testing.assert_close(value, parameter.detach(), rtol=1e-12, atol=1e-14)
            assert set(state) == set(names)
            for each in names:
                torch.testing.assert_close(
                    state[each], held[each], rtol=1e-12, atol=1e-14, check_dtype=False
                )
    assert {key for key, each in held.items() if each is not None} == set(names)


def test_rows_have_a_count_each():
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(6, 2))
    optimizer = RowAdam([table], lr=0.1)
    for step in range(STEPS):
        rows = torch.tensor([0, 1, 2, 3, 4, 5] if not step else [step - 1, 5])
        grad = torch.randn(len(rows), 2)
        table.grad = torch.sparse_coo_tensor(rows[None], grad, table.shape, check_invariants=True)
        group, held = optimizer.param_groups[0], optimizer.state[table]
        if step:
            names = state_names(optimizer, group)
            value, state = update(
                optimizer,
                group,
                table.detach()[rows],
                grad,
                {name: held[name][rows] for name in names},
                numbers_of(optimizer, group),
            )
        optimizer.step()
        if step:
            torch.testing.assert_close(value, table.detach()[rows], rtol=1e-12, atol=0)
            for name in names:
                torch.testing.assert_close(state[name], held[name][rows], rtol=1e-12, atol=1e-15)


class Other(Adam):
    """Another optimizer, whatever it does."""


@pytest.mark.parametrize(
    "make",
    [
        partial(Adam, differentiable=True),
        Other,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
    ],
)
def test_other_optimizers_are_not_served(make):
    assert not is_served(make([torch.nn.Parameter(torch.zeros(2))], lr=0.1))


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_an_optimizer_with_hooks_is_not_served(register):
    optimizer = Adam([torch.nn.Parameter(torch.zeros(2))])
    getattr(optimizer, register)(lambda *arguments: None)
    assert not is_served(optimizer)


@pytest.mark.parametrize("name", ["Adam", "SGD, momentum"])
def test_what_a_scheduler_changes_is_a_number_and_needs_no_other_graph(name):
    optimizer = OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(2))])
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    group = optimizer.param_groups[0]
    kind, numbers = kind_of(optimizer, group), numbers_of(optimizer, group)
    optimizer.step()
    scheduler.step()
    assert kind_of(optimizer, group) == kind
    changed = [
        one != other for one, other in zip(numbers, numbers_of(optimizer, group), strict=True)
    ]
    assert sum(changed) == 2  # the learning rate, and momentum or the first beta
