"""One thread: the models are tiny, and threads that wait for each other cost most of their time."""

import torch

torch.set_num_threads(1)
