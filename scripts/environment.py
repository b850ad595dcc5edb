"""Print the versions and the processor that figures belong to.

python scripts/environment.py [--device cuda]
"""

import argparse
import os
import platform

import lightning
import torch
import torchvision


def processor_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of torch's threads on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def main() -> None:
    """Print a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    memory = f" of {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB" if device.type == "cuda" else ""
    print(
        f"{processor_name(device)}{memory}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, lightning {lightning.__version__}"
    )


if __name__ == "__main__":
    main()
