"""Optimizers of rows: each row is stepped as by an optimizer of its own, and only with its batch.

The oracle is one ``torch.optim.Adam`` for each row, which steps where the row is in the batch.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from pyro_lightning import RowAdam, RowAdamW
from pyro_lightning.gather import gather_rows
from pyro_lightning.row_optim import rowwise

N = 6
BATCHES = [[0, 1, 2], [2, 3], [2, 0], [4], [0, 2, 4], [1, 3], [2, 1, 0]]
KINDS = {"Adam": (RowAdam, torch.optim.Adam), "AdamW": (RowAdamW, torch.optim.AdamW)}
OPTIONS = {
    "plain": {},
    "betas and eps": {"betas": (0.5, 0.7), "eps": 0.1},
    "amsgrad": {"amsgrad": True, "betas": (0.1, 0.2)},
    "maximize": {"maximize": True},
    "weight_decay": {"weight_decay": 0.3},
    "all": {"amsgrad": True, "maximize": True, "weight_decay": 0.3, "betas": (0.1, 0.2)},
}
SHAPES = {"scalars": (N,), "vectors": (N, 3), "rows further right": (2, N), "both": (2, N, 3)}


def normal(*shape, seed=100):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def target_of(step, shape):
    """What the rows of a step are pulled to; some steps far, some near."""
    return normal(*shape, seed=step) * 3 ** (step % 3)


def row_loss(taken, rows, step, shape, dim):
    return ((taken - target_of(step, shape).index_select(dim, torch.tensor(rows))) ** 2).sum()


def fit_table(table, optimizer, batches=BATCHES, dim=0, start=0, scheduler=None):
    for step, rows in enumerate(batches, start):
        optimizer.zero_grad()
        taken = gather_rows(table, torch.tensor(rows), dim)
        row_loss(taken, rows, step, table.shape, dim).backward()
        assert table.grad.is_sparse
        optimizer.step()
        if scheduler:
            scheduler.step()


def fit_rows_apart(table, make, batches=BATCHES, dim=0, rate=lambda step: 0.1):
    """The oracle: parameters and an optimizer for each row by itself."""
    apart = [nn.Parameter(row.clone()) for row in table.detach().unbind(dim)]
    optimizers = [make([row]) for row in apart]
    for step, rows in enumerate(batches):
        for row in set(rows):
            optimizer = optimizers[row]
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.zero_grad()
            taken = torch.stack([apart[row]] * rows.count(row), dim)
            row_loss(taken, [row] * rows.count(row), step, table.shape, dim).backward()
            optimizer.step()
    return torch.stack([row.detach() for row in apart], dim)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_stepped_by_an_optimizer_of_its_own(kind, shape, options):
    dim = SHAPES[shape].index(N)
    table = nn.Parameter(normal(*SHAPES[shape]))
    ours, theirs = (partial(make, lr=0.1, **OPTIONS[options]) for make in KINDS[kind])
    expected = fit_rows_apart(table, theirs, dim=dim)
    fit_table(table, ours([table]), dim=dim)
    # Row 5 is in no batch; row 4 is in two.
    assert torch.equal(table.detach().select(dim, 5), expected.select(dim, 5))
    torch.testing.assert_close(table.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_in_every_batch_step_as_in_torch(kind, options):
    batches = [torch.randperm(N).tolist() for _ in range(20)]
    table, dense = (nn.Parameter(normal(N, 3)) for _ in range(2))
    ours, theirs = (partial(make, lr=0.1, **OPTIONS[options]) for make in KINDS[kind])
    fit_table(table, ours([table]), batches)
    optimizer = theirs([dense])
    for step, rows in enumerate(batches):
        optimizer.zero_grad()
        row_loss(dense[rows], rows, step, dense.shape, 0).backward()
        optimizer.step()
    torch.testing.assert_close(table, dense, rtol=1e-12, atol=1e-12)


def test_decoupled_weight_decay_of_adam():
    if "decoupled_weight_decay" not in torch.optim.Adam([nn.Parameter(normal(1))]).defaults:
        pytest.skip("this release of torch has no such option")
    table = nn.Parameter(normal(N))
    make = partial(torch.optim.Adam, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True)
    expected = fit_rows_apart(table, make)
    fit_table(table, rowwise(make([table]), [table]))
    torch.testing.assert_close(table.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_half_precision_move_as_those_of_torch(kind):
    table = nn.Parameter(torch.full((N,), 0.5, dtype=torch.bfloat16))
    alone = nn.Parameter(table.detach().clone())
    ours, theirs = (
        make([of], lr=0.1) for make, of in zip(KINDS[kind], (table, alone), strict=True)
    )
    weights = torch.arange(float(N), dtype=torch.bfloat16)  # the first has a gradient of 0
    for _ in range(5):
        for optimizer, loss in (
            (ours, (gather_rows(table, torch.arange(N)) * weights).sum()),
            (theirs, (alone * weights).sum()),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not torch.equal(alone[1:], torch.full_like(alone[1:], 0.5))
    # A step of 0.1 is rounded to 2**-8 of itself, in either order of operations.
    torch.testing.assert_close(table, alone, rtol=0, atol=5 * 0.1 * 2**-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_twice_in_a_batch_has_the_sum_of_its_gradients(kind):
    ours, theirs = (partial(make, lr=0.1) for make in KINDS[kind])
    table, batches = nn.Parameter(normal(N)), [[1, 4, 1, 1], [4, 1], [4, 4]]
    expected = fit_rows_apart(table, theirs, batches)
    fit_table(table, ours([table]), batches)
    torch.testing.assert_close(table.detach(), expected, rtol=1e-12, atol=1e-12)


def test_momentum_does_not_move_rows_outside_the_batch():
    # Dense Adam moves them: by 0.067 of lr = 0.1 in the step after a row was last met.
    table, dense = nn.Parameter(normal(N)), nn.Parameter(normal(N))
    optimizer, adam = RowAdam([table], lr=0.1), torch.optim.Adam([dense], lr=0.1)
    fit_table(table, optimizer, [[0, 1, 2]])
    before, state = table.detach().clone(), copy.deepcopy(optimizer.state[table])
    fit_table(table, optimizer, [[3, 4]])
    assert torch.equal(table[:3], before[:3])
    assert torch.equal(table[5:], before[5:])
    for name, value in optimizer.state[table].items():
        assert torch.equal(value[:3], state[name][:3])
    for step, rows in enumerate(([0, 1, 2], [3, 4])):
        dense_before = dense.detach().clone()
        adam.zero_grad()
        row_loss(dense[rows], rows, step, dense.shape, 0).backward()
        adam.step()
    assert ((dense.detach() - dense_before).abs()[:3] > 0.06).all()


def test_dense_parameters_beside_a_table_step_as_in_torch():
    table, weight = nn.Parameter(normal(N)), nn.Parameter(normal(3))
    alone = nn.Parameter(weight.detach().clone())
    ours, theirs = RowAdam([table, weight], lr=0.1), torch.optim.Adam([alone], lr=0.1)
    for step, rows in enumerate(BATCHES):
        ours.zero_grad()
        theirs.zero_grad()
        loss = row_loss(gather_rows(table, torch.tensor(rows)), rows, step, table.shape, 0)
        (loss + (weight**3).sum()).backward()
        (alone**3).sum().backward()
        ours.step()
        theirs.step()
        assert torch.equal(weight, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_of_a_scheduler(kind):
    ours, theirs = KINDS[kind]
    table = nn.Parameter(normal(N))
    expected = fit_rows_apart(table, partial(theirs, lr=0.1), rate=lambda step: 0.1 * 0.5**step)
    optimizer = ours([table], lr=0.1)
    fit_table(table, optimizer, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    torch.testing.assert_close(table.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_goes_on_where_it_was_saved(kind):
    make = partial(KINDS[kind][0], lr=0.1, amsgrad=True)
    whole, first = nn.Parameter(normal(N)), nn.Parameter(normal(N))
    fit_table(whole, make([whole]))
    optimizer = make([first])
    fit_table(first, optimizer, BATCHES[:4])
    second = nn.Parameter(first.detach().clone())
    resumed = make([second])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit_table(second, resumed, BATCHES[4:], start=4)
    assert torch.equal(second, whole)
    fit_table(first, copy.deepcopy(optimizer), BATCHES[4:], start=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_state_loaded_on_a_gpu():
    table = nn.Parameter(torch.zeros(N, device="cuda"))
    optimizer = RowAdam([table], lr=0.1)
    gather_rows(table, torch.tensor([1, 2], device="cuda")).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    # A checkpoint is read on the CPU, and torch leaves the count of steps there.
    state["state"][0] = {name: value.cpu() for name, value in state["state"][0].items()}
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state[table]["step"].tolist() == [0, 2, 2, 0, 0, 0]


def test_closure_and_hooks():
    table, other, calls = nn.Parameter(normal(N)), nn.Parameter(normal(N)), []
    optimizer, plain = RowAdam([table], lr=0.1), RowAdam([other], lr=0.1)
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = row_loss(gather_rows(table, torch.tensor([1, 2])), [1, 2], 0, table.shape, 0)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == ["before", "after"]
    assert loss.requires_grad
    assert table.grad.is_sparse
    fit_table(other, plain, [[1, 2]])
    assert torch.equal(table, other)


def test_a_step_touches_only_the_rows_of_the_batch():
    size = 10**7
    table = nn.Parameter(torch.full((size,), 0.5))
    optimizer, rows = RowAdam([table], lr=0.1), torch.tensor([3, 5_000_000, size - 1])
    for _ in range(2):
        optimizer.zero_grad()
        (gather_rows(table, rows) ** 2).sum().backward()
        assert table.grad.is_sparse
        assert table.grad._nnz() == 3
        optimizer.step()
    moved = (table.detach() != 0.5).nonzero().flatten()
    assert torch.equal(moved, rows)
    assert torch.equal(optimizer.state[table]["step"].nonzero().flatten(), rows)


# -- which optimizers serve ------------------------------------------------------------------------


# Torch says so of its own Adagrad and SparseAdam.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize(
    ("given", "made"),
    [
        (torch.optim.Adam, RowAdam),
        (torch.optim.AdamW, RowAdamW),
        (RowAdam, RowAdam),
        (torch.optim.SGD, torch.optim.SGD),
        (torch.optim.Adagrad, torch.optim.Adagrad),
        (torch.optim.SparseAdam, torch.optim.SparseAdam),
    ],
)
def test_optimizers_that_serve(given, made):
    table, other = nn.Parameter(normal(N)), nn.Parameter(normal(N))
    groups = [{"params": [table], "lr": 0.2}, {"params": [other]}]
    optimizer = rowwise(given(groups, lr=0.1), [table])
    assert type(optimizer) is made
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    before = table.detach().clone()
    fit_table(table, optimizer, [[0, 1, 2], [1, 2]])
    assert torch.equal(table[3:], before[3:])
    assert (table != before)[:3].all()


@pytest.mark.parametrize(
    "given",
    [
        partial(torch.optim.SGD, momentum=0.9),
        partial(torch.optim.SGD, weight_decay=0.1),
        partial(torch.optim.Adagrad, weight_decay=0.1),
        partial(torch.optim.Adam, differentiable=True),
        torch.optim.RMSprop,
        torch.optim.NAdam,
        torch.optim.LBFGS,
    ],
    ids=lambda given: getattr(given, "func", given).__name__,
)
def test_optimizers_that_move_all_rows_are_refused_by_name(given):
    table = nn.Parameter(normal(N))
    name = getattr(given, "func", given).__name__
    with pytest.raises(TypeError, match=rf"parameters for each row, which {name}.*Use Adam, AdamW"):
        rowwise(given([table], lr=0.1), [table])


def test_without_tables_any_optimizer_stays_as_it_is():
    optimizer = torch.optim.RMSprop([nn.Parameter(normal(N))])
    assert rowwise(optimizer, []) is optimizer
