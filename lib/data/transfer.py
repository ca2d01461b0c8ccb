"""Batches on their way to a GPU."""

import torch
from fastai.torch_core import apply, to_device


def copied_beside(batch, device, stream):
    """A pinned `batch` on a CUDA device, copied on `stream` while the device computes what it was asked for before."""
    with torch.cuda.stream(stream):
        batch = to_device(batch, device, non_blocking=True)
    computing = torch.cuda.current_stream(device)
    computing.wait_stream(stream)

    def used(x):
        if isinstance(x, torch.Tensor):
            x.record_stream(computing)  # its memory is not taken anew before it has been used
        return x

    return apply(used, batch)
