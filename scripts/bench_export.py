"""Measure an exported student in ONNX Runtime: float32, float16 and int8, at batch sizes 1 and 64, with one thread.

"dynamic" is int8 with ranges computed at run time, which `kd-lightning export` does not offer. The files alternate in
one process, and the median over the rounds is reported.

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
    """Print milliseconds per batch, ratios to float32 and file sizes."""
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
            inputs = np.random.default_rng(0).random((batch, 3, 32, 32), dtype=np.float32)
            calls = 1 + 100 // batch
            candidates = {name: repeat(partial(session, inputs), calls) for name, (session, _) in sessions.items()}
            rounds = time_rounds(candidates, options.rounds)
            seconds = {name: median(values) / calls for name, values in rounds.items()}
            for name, (_, size) in sessions.items():
                gain = seconds["float32"] / seconds[name]
                print(f"batch {batch:2} {name:8} {seconds[name] * 1e3:7.3f} ms  {gain:5.2f}x  {size / 1e6:.3f} MB")


if __name__ == "__main__":
    main()
