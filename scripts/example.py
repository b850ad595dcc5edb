"""Ten minutes with kd_lightning in Python, in cells: run it whole, or cell by cell in an editor or a notebook.

python scripts/example.py
"""

# %% A teacher on scikit-learn's digits: an ordinary Lightning module and Trainer.
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from kd_lightning import DigitsDataModule, Run, TeacherModule, distill
from kd_lightning.networks import ResNet

seed_everything(0)
data = DigitsDataModule(batch_size=32)
teacher = TeacherModule(ResNet([2, 2, 2], [16, 32, 64], in_channels=1))
options: dict[str, Any] = {"max_epochs": 12, "accelerator": "cpu", "log_every_n_steps": 10}
Trainer(**options, logger=False, enable_checkpointing=False).fit(teacher, data)

# %% A student of 1,500 parameters: trained, tested, and kept in lightning_logs/small.
student = ResNet([1, 1, 1], [2, 4, 8], in_channels=1)
run = distill(student, teacher.network, data, name="small", temperature=4.0, **options)

# %% What it has reached, and what it cost.
assert run.test is not None
assert run.fit is not None
print(f"val {run.fit['val']['accuracy']:.1%}, test {run.test['accuracy']:.1%}, {run.test['parameters']:,} parameters")
print(f"agreement with the teacher {run.test['agreement']:.1%}, trained in {run.fit['cost']['seconds']:.0f} s")

# %% Tomorrow, in another process: the newest run of that name, and its network, ready to predict.
network = Run.find("small").best.network(into=ResNet([1, 1, 1], [2, 4, 8], in_channels=1))
batch = next(iter(data.test_dataloader()))
images = data.augment(batch).images
print(f"predicted {network(images[:10]).argmax(1).tolist()}, labels {batch.labels[:10].tolist()}")

# %% A run is a teacher too: the student's own successor, half as wide.
smaller = ResNet([1, 1, 1], [2, 2, 4], in_channels=1)
next_run = distill(smaller, network, data, name="smaller", teacher_check="warn", **options)
print(f"{next_run.folder}: test {next_run.test['accuracy']:.1%}" if next_run.test else "not tested")
