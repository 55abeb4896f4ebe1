"""Runs a kernel with torch, in a process of its own, which may hang or crash.

`python -m serve_app.doctor.kernel [DEVICE ...]`, by default on each GPU that torch sees. It prints
one line for each.
"""

import sys

import torch


def multiply(device: str) -> str:
    """Multiply matrices in the precision of models; return the device's name.

    Raises:
        RuntimeError: if the product is wrong.
    """
    ones = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
    product = (ones @ ones).float().cpu()
    if not bool((product == 256).all()):
        raise RuntimeError(f"a matrix multiplication on {device} gives a wrong result")
    if torch.device(device).type != "cuda":
        return device
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} (compute capability {major}.{minor})"


if __name__ == "__main__":
    devices = sys.argv[1:]
    if not devices:
        torch.cuda.init()  # raises with the reason, where device_count() only returns 0
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        print(multiply(device))  # noqa: T201  # the parent reads it
