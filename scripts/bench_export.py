"""An exported student in ONNX Runtime: float32, float16 and int8, at batch 1 and 64, one thread, interleaved.

"dynamic" is int8 with ranges found at run time, which `kd-lightning export` does not offer.

    python scripts/bench_export.py [--network resnet20] [--rounds 9]

Weights and calibration images are random: speed depends on neither.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from platform import processor
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from timing import repeat, time_rounds

from kd_lightning import networks
from kd_lightning.export import OnnxClassifier, export_network
from kd_lightning.networks import DataConfig


def main() -> None:
    """Print milliseconds a batch, file sizes and ratios to float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = getattr(networks, options.network)().eval()
    network.data_config = DataConfig.of([0.5] * 3, [0.25] * 3)
    images = torch.rand(64, 3, 32, 32)
    print(f"ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}, {processor() or 'CPU'}, one thread")
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        files: dict[str, dict[str, Any]] = {"float32": {}, "float16": {"fp16": True}, "int8": {"calibration": images}}
        for name, more in files.items():
            file = Path(folder, f"{name}.onnx")
            export_network(network, file, images, **more)
            sessions[name] = OnnxClassifier(file, threads=1), file.stat().st_size
        dynamic = Path(folder, "dynamic.onnx")
        quantize_dynamic(Path(folder, "float32.onnx"), dynamic, weight_type=QuantType.QUInt8)
        sessions["dynamic"] = OnnxClassifier(dynamic, threads=1), dynamic.stat().st_size
        for batch in (1, 64):
            shown = np.random.default_rng(0).random((batch, 3, 32, 32), dtype=np.float32)
            calls = 1 + 100 // batch
            sides = {name: repeat(partial(session, shown), calls) for name, (session, _) in sessions.items()}
            seconds = {name: median(found) / calls for name, found in time_rounds(sides, options.rounds).items()}
            whole = seconds["float32"]
            for name, (_, size) in sessions.items():
                own = seconds[name]
                print(f"batch {batch:2} {name:8} {own * 1e3:7.3f} ms  {whole / own:5.2f}x  {size / 1e6:.3f} MB")


if __name__ == "__main__":
    main()
