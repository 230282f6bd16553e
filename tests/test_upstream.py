"""The private names of Pyro and torch that compilation leans on are as they were."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.util import warn_if_nan
from support import quiet_trainer
from torch import _inductor
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import BatchSampler, DataLoader

from pyro_lightning._lightning import wrapped_batches
from pyro_lightning._upstream import (
    answer_to_check,
    came_from_data,
    class_made_by,
    compile_graph,
    copy_all,
    handlers_around,
    has_gradient_hooks,
    has_step_hooks,
    hook_tables,
    make_graph,
    mask_of_distribution,
    multiplied,
    open_records,
    traced_node,
    untraced,
    without_onednn,
)


class Asked(TorchFunctionMode):
    """Keeps the answers to what Python asks of tensors, as a trace would give them."""

    def __init__(self):
        super().__init__()
        self.answers, self.hooks = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__bool__:
            self.answers.append(answer_to_check())
        if func is torch.Tensor.register_hook:
            self.hooks.append(answer_to_check())
        return func(*args, **(kwargs or {}))


def test_distributions_ask_whether_their_arguments_are_valid():
    with Asked() as asked:
        dist.Normal(torch.tensor(0.0), torch.tensor(1.0), validate_args=True)
    assert asked.answers == [True, True]


def test_a_masked_distribution_keeps_its_mask():
    mask = torch.tensor([True, False])
    assert mask_of_distribution(dist.Normal(torch.zeros(2), 1.0).mask(mask)) is mask
    assert mask_of_distribution(dist.Normal(torch.zeros(2), 1.0).mask(False)) is False


def test_distributions_ask_whether_a_value_is_valid():
    normal = dist.Normal(torch.tensor(0.0), torch.tensor(1.0), validate_args=True)
    with Asked() as asked:
        normal.log_prob(torch.tensor(0.5))
    assert asked.answers
    assert set(asked.answers) == {True}


def test_pyro_asks_for_nan_and_hooks_the_gradient():
    value = torch.tensor(1.0, requires_grad=True)
    with Asked() as asked:
        warn_if_nan(value * 2, "a value")
    assert asked.hooks == [False]
    assert asked.answers == [] or set(asked.answers) == {False}


def test_pyro_warns_of_nan_where_nobody_answers():
    with pytest.warns(UserWarning, match="Encountered NaN: a value"):
        warn_if_nan(torch.tensor(float("nan")), "a value")


def test_sums_over_enumerated_sites_ask_whether_all_draws_count():
    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(z.float(), 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})

    with pyro.validation_enabled(False), Asked() as asked:
        TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide)
    assert True in asked.answers


def test_nobody_else_is_answered():
    with Asked() as asked:
        bool(torch.tensor(1.0) > 0)
        scale_and_mask(torch.tensor(1.0), scale=2.0)
    assert set(asked.answers) == {None}


def test_a_graph_holds_the_operations_of_a_function():
    graph = make_graph(lambda x, y: [x * 2 + y], [torch.ones(3), torch.zeros(3)])
    kinds = [node.op for node in graph.graph.nodes]
    assert kinds == ["placeholder", "placeholder", "call_function", "call_function", "output"]
    (found,) = graph(torch.full((3,), 2.0), torch.ones(3))
    assert found.tolist() == [5.0, 5.0, 5.0]


def test_a_node_is_known_for_what_depends_on_inputs_and_for_nothing_else():
    nodes = []

    def function(x):
        nodes.extend([traced_node(x), traced_node(x + 1), traced_node(torch.ones(2).add(1))])
        return [x]

    outside = torch.zeros(2)
    make_graph(lambda x: nodes.append(traced_node(outside)) or function(x), [torch.ones(2)])
    constant, given, sum_of_it, made = nodes
    assert constant is None
    assert given.op == "placeholder"
    assert given in sum_of_it.all_input_nodes
    assert made is None or given not in made.all_input_nodes


def test_there_is_no_node_outside_of_a_trace():
    assert traced_node(torch.ones(2)) is None


def test_handlers_that_stand_around_code_are_seen():
    assert not handlers_around()
    with poutine.scale(scale=2.0):
        assert handlers_around()
    assert not handlers_around()


@pytest.mark.parametrize(
    "register",
    [
        lambda net: net.register_forward_hook(print),
        lambda net: net.register_forward_pre_hook(print),
        lambda net: net.register_full_backward_hook(print),
        lambda net: net.register_full_backward_pre_hook(print),
    ],
)
def test_hooks_stand_in_the_tables(register):
    net = torch.nn.Linear(1, 1)
    assert sum(map(len, hook_tables(net))) == 0
    register(net)
    assert sum(map(len, hook_tables(net))) == 1


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_of_an_optimizers_steps_are_seen(when):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert not has_step_hooks(optimizer)
    getattr(optimizer, f"register_step_{when}_hook")(lambda *args: None)
    assert has_step_hooks(optimizer)


def test_tensors_are_multiplied_and_copied_in_one_call():
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    found = multiplied(tensors, torch.tensor(3.0))
    assert [each.tolist() for each in found] == [[3.0] * 2, [6.0] * 3]
    copy_all(tensors, found)
    assert [each.tolist() for each in tensors] == [[3.0] * 2, [6.0] * 3]


def test_onednn_is_off_and_on_again():
    before = torch.backends.mkldnn.enabled
    with without_onednn():
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled == before


def test_operations_can_be_left_out_of_a_graph():
    def function(x):
        with untraced():
            assert float(torch.tensor(2.0) * 3) == 6.0
        return [x + 1]

    graph = make_graph(function, [torch.ones(2)])
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)) == 0


def test_the_private_names_of_tracing_exist():
    for name in ("make_fx", "get_proxy_mode", "get_proxy_slot", "disable_proxy_modes_tracing"):
        assert callable(getattr(proxy_tensor, name))


def test_random_operations_are_tagged():
    graph = make_graph(lambda p: [torch.bernoulli(p), torch.randn(2) * p], [torch.ones(2) / 2])
    tagged = [
        node.target
        for node in graph.graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    assert torch.ops.aten.bernoulli.Tensor in tagged
    assert len(tagged) == 2


def test_operations_whose_size_depends_on_values_are_tagged():
    for operation in (torch.ops.aten.nonzero.default, torch.ops.aten.index.Tensor):
        assert torch.Tag.dynamic_output_shape in operation.tags


def test_inductor_knows_the_options():
    known = _inductor.list_options()
    assert {"fallback_random", "reorder_for_peak_memory"} <= set(known)


@pytest.mark.slow
def test_inductor_compiles_a_graph_directly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = make_graph(lambda x: [(x * 2).sum(), x + torch.randn(3)], [torch.ones(3)])
        compiled = compile_graph(graph, [torch.ones(3)], {})
    torch.manual_seed(0)
    found = compiled(torch.full((3,), 2.0))
    torch.manual_seed(0)
    expected = graph(torch.full((3,), 2.0))
    torch.testing.assert_close(list(found), list(expected))


def test_options_go_to_torch_compile():
    seen = []

    def backend(graph, inputs):
        seen.append([tuple(each.shape) for each in inputs])
        return graph.forward

    graph = make_graph(lambda x: [x * 2], [torch.ones(3)])
    compiled = compile_graph(graph, [torch.ones(3)], {"backend": backend})
    assert compiled(torch.ones(3))[0].tolist() == [2.0, 2.0, 2.0]
    assert seen == [[(3,)]]


@pytest.mark.parametrize("options", [{}, {"backend": "eager"}])
def test_compiling_leaves_the_validation_of_distributions_on(options):
    # In a process of its own: torch turns it off once.
    code = f"""
import torch
from pyro_lightning._upstream import compile_graph, make_graph
x = torch.ones(2)
with torch.no_grad():
    compile_graph(make_graph(lambda x: [x + 1], [x]), [x], {options})(x)
assert torch.distributions.Distribution._validate_args
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_parameter_are_seen_until_they_are_removed(register):
    parameter = torch.nn.Parameter(torch.ones(()))
    assert not has_gradient_hooks(parameter)
    handle = getattr(parameter, register)(lambda grad: None)
    assert has_gradient_hooks(parameter)
    handle.remove()
    assert not has_gradient_hooks(parameter)


def test_torch_opens_the_files_that_it_saves_and_refuses_others(tmp_path):
    path = tmp_path / "saved.pt"
    torch.save({"x": torch.zeros(3)}, path)
    open_records(str(path))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        open_records(str(path))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_data_set_are_told_from_the_end_of_its_loader(workers):
    class Ends(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise StopIteration

    def end_of(data):
        batches = iter(torch.utils.data.DataLoader(data, num_workers=workers))
        with pytest.raises(StopIteration) as caught:
            while True:
                next(batches)
        return caught.value

    assert came_from_data(end_of(Ends()))
    assert not came_from_data(end_of(range(2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # older releases have this name alone
def test_a_class_path_with_arguments_left_is_a_partial_that_names_the_class():
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--guide", type=Callable[[Any], AutoGuide])
    found = parser.parse_args(["--guide=AutoNormal", "--guide.init_scale=0.5"])
    factory = parser.instantiate_classes(found).guide
    assert class_made_by(factory) is AutoNormal
    assert factory(lambda: None)._init_scale == 0.5


def test_other_partials_are_of_their_function():
    assert class_made_by(partial(AutoNormal, init_scale=0.5)) is AutoNormal
    assert class_made_by(partial(print, AutoNormal)) is print
    assert class_made_by(AutoNormal) is AutoNormal


def test_lightning_wraps_what_makes_the_batches_that_are_predicted():
    seen = []

    class Wrapped(Callback):
        def on_predict_start(self, trainer, pl_module):
            seen.append(wrapped_batches(trainer.predict_loop._combined_loader.flattened[0]))

    class Nothing(LightningModule):
        def predict_step(self, batch):
            return batch

    loader = DataLoader(torch.arange(4), batch_size=3)
    quiet_trainer(callbacks=[Wrapped()]).predict(Nothing(), loader)
    assert type(seen[0]) is BatchSampler and seen[0].batch_size == 3
    assert wrapped_batches(loader) is None
