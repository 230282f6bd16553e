"""Fits on two processes, of which one fails in its fourth step.

Run as a script with the rank that fails, and what does: its model or its loader; or it
is killed.
"""

import os
import signal
import sys

import torch
from support import normal_mean, quiet_trainer
from torch.utils.data import DataLoader, Dataset

from pyro_lightning import PyroSVIModule

N, B = 80, 4
NODES = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1
RANK = int(os.environ["RANK"] if NODES == 2 else os.environ.get("LOCAL_RANK", "0"))


class Failing:
    """Raises at a use after the first few."""

    def __init__(self, fails, by_signal=False):
        self.left = 10**9 if not fails else None
        self.by_signal = by_signal

    def arm(self):
        if self.left is None:
            self.left = 3

    def use(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0 and self.by_signal:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.left < 0:
                raise LookupError("the fourth step")


class Rows(Dataset):
    def __init__(self, failing):
        self.failing = failing

    def __len__(self):
        return N

    def __getitems__(self, rows):
        self.failing.use()
        return [torch.tensor(float(row)) for row in rows]

    def __getitem__(self, row):
        return torch.tensor(float(row))


class Module(PyroSVIModule):
    def __init__(self, *failing):
        super().__init__()
        self.failing = failing

    def model(self, x):
        self.failing[0].use()
        normal_mean(x)

    def on_train_start(self):
        for each in self.failing:
            each.arm()


def main(rank: int, where: str) -> None:
    model, loader = (
        Failing(rank == RANK and where in names, by_signal=where == "killed")
        for names in (("model", "killed"), ("loader",))
    )
    trainer = quiet_trainer(
        num_nodes=NODES, devices=2 // NODES, strategy="ddp", max_epochs=3, logger=False
    )
    trainer.fit(Module(model, loader), DataLoader(Rows(loader), batch_size=B))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
