"""Memory for results that are dropped soon, while others of their size stay until the backward pass."""

import torch

SLACK = 128  # bytes
SMALL = 1 << 16  # bytes; a smaller tensor is not worth it


def passing(shape: torch.Size | tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Return an unset tensor of this shape, in like's dtype and on its device, with a little memory to spare behind it.

    For a tensor, aligned to 64 bytes, glibc's malloc (2.36) looks for a free block 96 bytes larger than what it takes
    then. So a tensor never lies where one of its size was dropped, and holes stay between the tensors that are kept: a
    tenth of the memory of a LoRA step in fp32. Where the dropped one was a little longer, the next fits.
    """
    count = torch.Size(shape).numel()
    if like.device.type != "cpu" or count * like.itemsize < SMALL:
        return like.new_empty(shape)
    return like.new_empty(count + SLACK // like.itemsize)[:count].view(shape)
