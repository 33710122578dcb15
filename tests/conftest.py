"""What holds for every test."""

import torch

torch.set_num_threads(1)  # the tensors here are too small to share, and waiting threads take the processors from others
