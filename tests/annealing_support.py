"""What tests of annealing share: the weights of a linear rise, and what steps did."""

import torch
from lightning.pytorch import Callback


def linear(step, length, start=0.0):
    """The weight of a step, counted from 0."""
    return min(1.0, start + (1 - start) * step / length)


class Seen(Callback):
    """Keeps of each step its batch, the parameters before and after it, loss and weight."""

    def __init__(self):
        self.batches, self.before, self.after, self.losses, self.weights = [], [], [], [], []

    def __iter__(self):
        return iter(zip(self.batches, self.before, self.after, self.losses, strict=True))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)
        self.before.append([p.detach().clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append([p.detach().clone() for p in pl_module.parameters()])
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append(torch.as_tensor(loss).detach())
        self.weights.append(pl_module.kl_weight)
