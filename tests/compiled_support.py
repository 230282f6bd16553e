"""What tests of compilation share: losses and gradients, and their comparison with eager."""

import torch

# torch.compile with this backend runs the traced graph as it is, which costs no compiler's time.
AS_TRACED = {"backend": "eager"}


def loss_and_gradients(svi, batch, seed):
    """The loss of a batch at the noise of a seed, and every gradient, by name and dense."""
    svi.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = svi.loss(batch)
    loss.backward()
    found = {n: p.grad.to_dense() for n, p in svi.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_equal_steps(svi, eager, batches, loss_to, gradients_to, first_seed=0):
    """Compare losses and gradients of two modules, batch by batch, at equal noise."""
    for seed, batch in enumerate(batches, first_seed):
        loss, gradients = loss_and_gradients(svi, batch, seed)
        expected, wanted = loss_and_gradients(eager, batch, seed)
        torch.testing.assert_close(loss, expected, rtol=loss_to, atol=0)
        assert gradients.keys() == wanted.keys()
        assert wanted
        rounding = 16 * torch.finfo(expected.dtype).eps
        floor = rounding * max(float(gradient.abs().max()) for gradient in wanted.values())
        for name, gradient in wanted.items():
            # Relative to the largest entry: a small one may be what is left of large terms.
            bound = gradients_to * float(gradient.abs().max()) + floor
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=bound)


def is_compiled(svi):
    """Whether compiled code of a module is in use, and nothing fell back."""
    return svi._compiled.compilations > 0 and any(e.compiled for e in svi._compiled._entries)
