"""Who trains a workload: plain Pyro, Pyro's Lightning example, NumPyro, and this package."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        key: What the command line calls it.
        title: What tables call it.
        module: The file here that holds it; imported in its own process alone.
        function: The function there that takes a job and a clock.
        options: What that function is given besides.
        needs: A package that may not be installed.
        device: Where alone it runs; anywhere by default.
    """

    key: str
    title: str
    module: str
    function: str = "run"
    options: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    device: str | None = None

    def load(self) -> Callable[..., None]:
        module = importlib.import_module(f"benchmarks.speed.methods.{self.module}")
        return getattr(module, self.function)

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.device is not None and device != self.device:
            return f"it needs --device {self.device}"
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed: pip install '.[benchmarks]'"
        if self.module == "ours":
            from pyro_lightning import PyroSVIModule

            unknown = set(self.options) - set(inspect.signature(PyroSVIModule).parameters)
            if unknown:
                return f"this version of pyro_lightning has no {', '.join(sorted(unknown))}"
        return None


def _ours(title: str, key: str, device: str | None = None, **options: Any) -> Method:
    return Method(key, f"ours{title}", "ours", options=options, device=device)


ALL = (
    Method("raw", "Pyro: SVI.step, plate in the model", "raw_pyro"),
    Method("example", "Pyro's Lightning example", "lightning_example"),
    _ours("", "ours"),
    _ours(", compile=True", "ours-compile", compile=True),
    *(_ours(f", steps_per_batch={k}", f"ours-k{k}", steps_per_batch=k) for k in (8, 32)),
    *(
        _ours(
            f", compile=True, steps_per_batch={k}",
            f"ours-compile-k{k}",
            compile=True,
            steps_per_batch=k,
        )
        for k in (8, 32, 128)
    ),
    *(
        _ours(
            f", CUDA graphs{title}",
            f"ours-graphs{key}",
            "cuda",
            compile={"mode": "reduce-overhead"},
            **steps,
        )
        for title, key, steps in (
            ("", "", {}),
            (", steps_per_batch=32", "-k32", {"steps_per_batch": 32}),
        )
    ),
    Method("numpyro", "NumPyro: jit(svi.update)", "numpyro_svi", "update", needs="numpyro"),
    Method(
        "numpyro-scan",
        "NumPyro: scan over an epoch, order by JAX",
        "numpyro_svi",
        "scan",
        needs="numpyro",
    ),
    Method(
        "numpyro-scan-host",
        "NumPyro: scan over an epoch, order by NumPy",
        "numpyro_svi",
        "scan",
        {"host_order": True},
        needs="numpyro",
    ),
)
METHODS = {method.key: method for method in ALL}
