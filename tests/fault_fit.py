"""Kills a fit at random moments, again and again; what it comes to as JSON.

Run as a script, since it forks.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lives import Life, killed_often
from support import quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning.checkpoint_files import verify_checkpoint_file

N, B, EPOCHS = 190, 8, 10  # 24 batches an epoch, the last of 6 rows
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(1))
Y = X @ torch.tensor([1.0, -1.0]) + torch.randn(N, generator=torch.Generator().manual_seed(2))


def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x @ w + z, 0.5), obs=y)


class Count(Callback):
    """Tells the parent of steps; keeps a count of its own in checkpoints."""

    def __init__(self, life):
        self.life, self.steps = life, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.life.count(trainer.global_step)

    def on_train_batch_end(self, *_):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def fit(folder, life, world=1, **saves):
    seed_everything(3, verbose=False)
    svi = PyroSVIModule(model, optimizer=partial(torch.optim.Adam, lr=0.02))
    # Not "link": two files are written, and a process can die between them.
    saving = ModelCheckpoint(folder, **{"every_n_train_steps": 3, "save_last": True, **saves})
    count = Count(life)
    flags = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    trainer = quiet_trainer(
        max_epochs=EPOCHS,
        callbacks=[count, saving],
        enable_checkpointing=True,
        val_check_interval=10 // world,
        **flags,
    )
    torch.manual_seed(3 + trainer.global_rank)  # the noise of a process is its own
    data = ArrayDataModule((X, Y), batch_size=B, val=(X[:20], Y[:20]))
    trainer.fit(svi, datamodule=data, ckpt_path="last")
    if trainer.is_global_zero:
        state = {
            "parameters": svi.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "counted": count.steps,
        }
        torch.save(state, Path(folder) / "end.pt")


def compare(path, kills, world=1):
    with tempfile.TemporaryDirectory() as name:
        whole, torn = Path(name, "whole"), Path(name, "torn")
        codes = Life(lambda life: fit(whole, life, world), world).end()
        lives = killed_often(lambda life: fit(torn, life, world), kills, seed=5, world=world)
        codes += Life(lambda life: fit(torn, life, world), world).end()
        ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, torn)]
        for file in torn.glob("*.ckpt"):
            verify_checkpoint_file(file)
        found = {
            "exit_codes": codes,
            "killed": len(lives),
            "steps": lives,
            "counted": [end["counted"] for end in ends],
            "different": different(*ends),
            "temporary": len(list(torn.glob(".*"))),
        }
    Path(path).write_text(json.dumps(found))


def different(one, other, name=""):
    """List the tensors and numbers of nested states that are not equal bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [found for key in one for found in different(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, list | tuple):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, pair in pairs for found in different(*pair, f"{name}/{i}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [name]


if __name__ == "__main__":
    compare(sys.argv[1], kills=30)
