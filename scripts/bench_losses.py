"""Measure training steps per second of each distillation method, and their ratio to KD.

ResNet-56 teaches ResNet-20 on random 32x32 images, in bfloat16 autocast with one thread. The methods alternate in one
process, and the median over the rounds is reported.

    python scripts/bench_losses.py [--batch-size 128] [--rounds 7]
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from timing import time_rounds
from torch import nn

from kd_lightning import losses
from kd_lightning.features import FeatureTap
from kd_lightning.networks import resnet20, resnet56, reuse_teacher_classifier

METHODS: dict[str, Callable[[], losses.DistillationLoss]] = {
    "KD": losses.SoftTargetLoss,
    "KD, standardized": lambda: losses.SoftTargetLoss(2.0, weight=9.0, standardize=True),
    "DKD": losses.DecoupledLoss,
    "DIST": losses.DistLoss,
    "NKD": losses.NKDLoss,
    "TTM": losses.TTMLoss,
    "WTTM": losses.WTTMLoss,
    "WKD-L": losses.WKDLogitLoss,
    "SDD-KD": losses.SDDKDLoss,
    "SDD-DKD": losses.SDDDKDLoss,
    "RLD": losses.RLDLoss,
    "MLLD, one view": losses.MLLDLoss,
    "DIST+": losses.DistPlusLoss,
    "CTKD": losses.CTKDLoss,
    "SKD": losses.SKDLoss,
    "USKD": losses.USKDLoss,
    "Queue KL": losses.QueueKLLoss,
    "FitNets": losses.HintLoss,
    "AT": losses.AttentionLoss,
    "NST": losses.NeuronSelectivityLoss,
    "SP": losses.SimilarityLoss,
    "PKT": losses.ProbabilisticLoss,
    "RKD": losses.RelationalLoss,
    "CC": losses.CorrelationLoss,
    "VID": losses.VariationalLoss,
    "ReviewKD": losses.ReviewLoss,
    "CRD": losses.ContrastiveLoss,
    "WKD-F": losses.WKDFeatureLoss,
    "CAT-KD": losses.CATKDLoss,
    "RSD": losses.RSDLoss,
    "OFA": losses.OFALoss,
    "VkD": losses.VkDLoss,
    "ViTKD": lambda: losses.ViTKDLoss(student_layers=["layer1", "layer2", "layer3"]),
    "SRD": losses.SRDLoss,
    "SimKD": lambda: losses.HintLoss(
        weight=1.0, student_layers=["avgpool.projector"], teacher_layers=["layer3"], regressor=False
    ),
}


class Step:
    """A training step of a method."""

    def __init__(self, name: str, batch_size: int) -> None:
        torch.manual_seed(0)
        teacher = resnet56().eval().requires_grad_(False)
        student = reuse_teacher_classifier(resnet20(), teacher) if name == "SimKD" else resnet20()
        self.loss, self.hard = METHODS[name](), losses.HardTargetLoss()
        self.student = FeatureTap(student.to(memory_format=torch.channels_last), self.loss.student_layers)
        self.teacher = FeatureTap(teacher.to(memory_format=torch.channels_last), self.loss.teacher_layers)
        self.images = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch_size,))
        outputs = self.student(self.images[:2]), self.teacher(self.images[:2])
        self.loss.build(*outputs, student_network=student, teacher_network=teacher)
        trained = nn.ModuleList([student, self.loss]).parameters()
        self.optimizer = torch.optim.SGD([weight for weight in trained if weight.requires_grad], lr=1e-3)

    def __call__(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            student = self.student(self.images)
            with torch.no_grad():
                teacher = self.teacher(self.images)
            total = self.hard(student, teacher, self.labels)
            total = total + self.loss.weight * self.loss(student, teacher, self.labels)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = time_rounds({name: Step(name, options.batch_size) for name in METHODS}, options.rounds)
    kd = median(seconds["KD"])
    for name, values in seconds.items():
        spread = f"{min(values):.3f} to {max(values):.3f} s"
        print(f"{name:<18}{1 / median(values):7.2f} steps/s   {kd / median(values):5.2f} of KD   ({spread})")


if __name__ == "__main__":
    main()
