"""A module that owns a model and a guide, and runs them with parameters of its own."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from pyro.nn import PyroModule, pyro_method
from torch import nn

from pyro_lightning.detached_copies import DetachedCopies
from pyro_lightning.devices import DeviceMessenger
from pyro_lightning.guides import BackReferences, make_guide, move_prototypes_
from pyro_lightning.networks import Networks
from pyro_lightning.params import (
    LocalParamMessenger,
    ParamStoreModule,
    RowsOfBatch,
    local_parameters,
)


class ModelOwner(PyroModule):
    """Owns model and guide, which are passed, or methods of a subclass.

    Their parameters are parameters of this module, and Pyro's global store is not used.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Pyro runs `forward` in a context where PyroSample attributes are sites; these two methods
        # need the same, wherever they are called from.
        super().__init_subclass__(**kwargs)
        for name in ("model", "guide"):
            if inspect.isfunction(method := cls.__dict__.get(name)):
                setattr(cls, name, pyro_method(method))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # PyroModule.__call__ would open one context around a whole step, and with it one cache of
        # PyroSample values for guide, model and every particle.
        return nn.Module.__call__(self, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets this around every hook; as a PyroModule's attribute it would take longer
        # than many a hook does.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def model(self) -> Callable[..., Any]:
        """The model that was passed or defined."""
        return self._part("model")

    @property
    def guide(self) -> Callable[..., Any]:
        """The guide that was passed or defined; for an autoguide class, its instance."""
        if self._back_references is not None:
            self._back_references.restore()
        return self._part("guide")

    _back_references: BackReferences | None = None
    _current_rows: RowsOfBatch | None = None

    def _own(self, model: Any, guide: Any, default_guide: Any) -> None:
        self._pyro_param_store = ParamStoreModule()
        self._networks = Networks()
        if not self._defines("model"):
            self._register("model", model)
        elif model is not None:
            raise ValueError(f"{type(self).__name__} defines model: do not pass another")
        if not self._defines("guide"):
            self._register("guide", make_guide(guide, self.model))
        elif guide is not default_guide:
            raise ValueError(f"{type(self).__name__} defines guide: do not pass another")
        self._back_references = BackReferences(self)
        self._find_networks()

    def _find_networks(self) -> None:
        """Register the networks that model and guide use and this module does not own."""
        self._networks.find([self.model, self.guide], self)

    def _defines(self, name: str) -> bool:
        passed = inspect.getattr_static(ModelOwner, name)
        return inspect.getattr_static(type(self), name) is not passed

    def _register(self, name: str, part: Any) -> None:
        if not callable(part) or isinstance(part, type):
            got = part.__name__ if isinstance(part, type) else type(part).__name__
            raise TypeError(
                f"{name} must be an nn.Module or a function of a batch's elements, or a method of "
                f"your subclass of PyroSVIModule; got {got}"
            )
        # By hand: add_module refuses the name of a property, and PyroModule would rename the sites
        # of a PyroModule after the attribute.
        if isinstance(part, nn.Module):
            self._modules[name] = part
            return
        self.__dict__[f"_{name}"] = part
        owner = getattr(part, "__self__", None)
        if isinstance(owner, nn.Module):
            self._modules[f"{name}_owner"] = owner

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Register a part; one that is there already stays as it is.

        ``SyncBatchNorm.convert_sync_batchnorm`` puts each part back in its place, and PyroModule
        would take that for another owner of the guide.
        """
        if module is None or self._modules.get(name) is not module:
            super().add_module(name, module)

    def _part(self, name: str) -> Callable[..., Any]:
        part: Any = self._modules[name] if name in self._modules else self.__dict__[f"_{name}"]
        return part  # type: ignore[no-any-return]

    def _parameter_device(self) -> torch.device | None:
        # Not the `device` of Lightning, which names the accelerator before anything is moved there.
        return next((parameter.device for parameter in self.parameters()), None)

    @contextmanager
    def _isolated(self) -> Iterator[Callable[[Any], Callable[..., Any]]]:
        """Keep parameters local and priors on the device; yields what wraps model and guide."""
        device = self._parameter_device() or torch.device("cpu")
        elsewhere = device.type != "cpu"

        trained: set[int] = set()

        def trains(parameter: torch.Tensor) -> bool:
            if not trained:
                trained.update(id(mine) for mine in self.parameters())
            return id(parameter) in trained

        def handled(fn: Any) -> Callable[..., Any]:
            local = LocalParamMessenger(self._pyro_param_store, trains, lambda: self._current_rows)
            inner = local(DeviceMessenger(device)(fn) if elsewhere else fn)

            def run(*args: Any, **kwargs: Any) -> Any:
                roots = self.model, self.guide
                with self._networks.lent(roots), self._pyro_param_store.as_global_store():
                    return inner(*args, **kwargs)

            return run

        # Inside the device's context a prior of plain numbers is made there.
        with local_parameters(), device if elsewhere else nullcontext():
            if elsewhere:
                move_prototypes_(self, device)
            yield handled

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state: Any = self.__getstate__()
        with DetachedCopies():
            copied.__dict__.update(deepcopy({**state, "_back_references": None}, memo))
        if self._back_references is not None:
            self._back_references.restore()
            self._back_references.rebind(memo)
            copied._back_references = BackReferences(copied)
        return copied
