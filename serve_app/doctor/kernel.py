"""Whether torch can really run a kernel: a process of its own, which may hang or crash.

`python -m serve_app.doctor.kernel [DEVICE ...]`, by default on each GPU that torch sees. Prints a
line for each.
"""

import sys

import torch


def multiply(device: str) -> str:
    """A product of matrices, in the precision that models run in; says on what it ran.

    Raises:
        RuntimeError: if it comes out wrong.
    """
    ones = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
    product = (ones @ ones).float().cpu()
    if not bool((product == 256).all()):
        raise RuntimeError(f"a product of matrices on {device} is wrong")
    if torch.device(device).type != "cuda":
        return device
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} (compute capability {major}.{minor})"


if __name__ == "__main__":
    devices = sys.argv[1:]
    if not devices:
        torch.cuda.init()  # says why, where device_count() only says 0
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        print(multiply(device))  # noqa: T201  # its answer to who started it
