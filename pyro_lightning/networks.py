"""Networks that functions use without owning them: registered, and lent to the functions."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyro_lightning.closures import reached_networks
from pyro_lightning.params import trainable_leaves


class Networks(nn.Module):
    """Holds the networks that model and guide use without owning them, by their names there.

    In the module that was built from the functions they are the functions' own. A copy of that
    module holds copies, of which the functions know nothing: whenever the functions run, the
    copies stand in for the functions' own.

    Raises:
        RuntimeError: When the functions of a copy do not reach a network of its name any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._copied = False
        self._homes: dict[str, nn.Module] | None = None
        self._owned: dict[str, nn.Module] = {}
        self._lifted: set[str] = set()
        self._released: set[str] = set()

    def find(self, roots: Iterable[Any], owner: nn.Module) -> None:
        """Register what the functions reach and the owner does not own otherwise."""
        self._homes = reached_networks(roots)
        if self._copied:  # it has its own
            return
        self._modules.clear()
        mine = {id(module) for module in owner.modules()}
        used = {name: m for name, m in self._homes.items() if not _owns_networks(m)}
        self._owned = {name: m for name, m in used.items() if id(m) in mine}
        others = {name: m for name, m in used.items() if id(m) not in mine}
        inner = {id(part) for m in others.values() for part in list(m.modules())[1:]}
        self._modules.update((name, m) for name, m in others.items() if id(m) not in inner)

    @contextmanager
    def lent(self, roots: Iterable[Any]) -> Iterator[None]:
        """Let the functions use these networks, and undo what ``poutine.lift`` does to them.

        Lifted parameters are draws of one run. Left in a network they would pass for its
        parameters in the next, or, drawn without gradient, for constants.
        """
        if self._homes is None:
            self._homes = reached_networks(roots)
        used = {**self._owned, **self._held()}
        faces = [pair for name, own in used.items() for pair in self._faces(name, own)]
        hidden = [(face, vars(face)) for face, _ in faces]
        watched = [
            (name, part._parameters, dict(part._parameters))
            for name, network in {**self._let_go(), **self._held()}.items()
            for part in network.modules()
        ]
        try:
            for face, part in faces:
                # All of it, since some layers hold their parameters in more places than one.
                object.__setattr__(face, "__dict__", vars(part))
            yield
        finally:
            for face, state in reversed(hidden):
                object.__setattr__(face, "__dict__", state)
            for name, parameters, before in watched:
                for key, parameter in before.items():
                    now = parameters.get(key)
                    if isinstance(parameter, nn.Parameter) and not isinstance(now, nn.Parameter):
                        self._lifted.add(name)
                        parameters[key] = parameter

    def _held(self) -> dict[str, nn.Module]:
        return {name: network for name, network in self._modules.items() if network is not None}

    def _let_go(self) -> dict[str, nn.Module]:
        homes = self._homes or {}
        return {name: homes[name] for name in sorted(self._released) if name in homes}

    def _faces(self, name: str, own: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        assert self._homes is not None
        home = self._homes.get(name)
        if home is None:
            raise RuntimeError(
                f"this module is a copy with a network '{name}' of its own, but its model and "
                "guide do not reach a network of that name any more: build it from them anew"
            )
        if home is own:
            return []
        parts = dict(home.named_modules())
        return [(parts[path], part) for path, part in own.named_modules() if path in parts]

    def settled(self, sites: Iterable[Any], run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return a first loss, having let go of the networks whose parameters are lifted.

        Args:
            sites: Messages of the sample statements that ran in the model.
            run: Computes the loss.
        """
        self.release(self._lifted)
        loss = run()
        leaves = {id(leaf) for leaf in trainable_leaves(loss)}
        draws: dict[str, set[str]] = {}
        for site in sites:
            module, lifted, parameter = site["name"].partition("$$$")
            if lifted:
                draws.setdefault(module, set()).add(parameter)
        for name, network in self._held().items():
            named = {n: p for n, p in network.named_parameters() if p.requires_grad}
            # What pyro.random_module makes at each run are copies of a network that never runs.
            if not any(id(p) in leaves for p in named.values()) and any(
                names <= named.keys() for names in draws.values()
            ):
                self.release([name])
        return loss

    @property
    def released(self) -> frozenset[str]:
        """Names of the networks that were let go of."""
        return frozenset(self._released)

    def release(self, names: Iterable[str]) -> None:
        """Let go of networks whose parameters are drawn."""
        for name in names:
            if self._modules.pop(name, None) is not None:
                self._released.add(name)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "Networks":
        # Copies of them must be on the device, too.
        for network in self._let_go().values():
            network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Of copies and pickles: the functions are not copied with the module.
        return {**self.__dict__, "_copied": True, "_homes": None}


def _owns_networks(module: nn.Module) -> bool:
    # Only a module of this kind does, this one or another, and it looks after itself.
    return any(isinstance(part, Networks) for part in module.modules())
