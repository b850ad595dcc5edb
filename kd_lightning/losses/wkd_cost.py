"""Distances between classes, which a Wasserstein distance between predictions takes as the cost of a confusion."""

import torch
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.losses._labels import class_indices
from kd_lightning.losses._normalize import normalize
from kd_lightning.losses._precision import in_full_precision


@in_full_precision
def wkd_cost_fc(weight_teacher: Tensor, *, sharpen: float = 1.0) -> Tensor:
    r"""Compute the cost of confusing two classes from the teacher's classifier.

    .. math:: 1 - e^{-k (1 - \cos(w_c, w_d))}

    Args:
        weight_teacher: One row of weights w for each class, ``(C, n)``.
        sharpen: k >= 0; with 0 the distances :math:`1 - \cos` themselves.

    Returns:
        ``(C, C)``, symmetric, about 0 on the diagonal.

    Example:
        >>> wkd_cost_fc(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([[0.0000, 0.6321],
                [0.6321, 0.0000]])
    """
    rows = normalize(weight_teacher)
    return _sharpened(1 - rows @ rows.T, sharpen)


@in_full_precision
def wkd_cost_cka(features_teacher: Tensor, *, sharpen: float = 1.0) -> Tensor:
    r"""Compute the cost of confusing two classes from the centered kernel alignment (CKA) of the teacher's features.

    .. math:: 1 - e^{-k (1 - \mathrm{CKA}_{cd})} \quad \text{with} \quad
              \mathrm{CKA}_{cd} = \frac{\|X_d' X_c\|_F^2}{\|X_c' X_c\|_F \, \|X_d' X_d\|_F}

    and :math:`X_c` the features of class c, each column minus its mean. Sample n of a class is paired with sample n of
    each other class, so the cost depends on the order of the samples.

    Args:
        features_teacher: The same number of samples of each class, ``(C, samples, n)``; see :func:`group_by_class`.
        sharpen: k >= 0; with 0 the distances 1 - CKA themselves.

    Returns:
        ``(C, C)``, symmetric, about 0 on the diagonal.

    Example:
        >>> wkd_cost_cka(torch.tensor([[[0.0], [1.0], [2.0]], [[3.0], [1.0], [3.0]]]))
        tensor([[0.0000, 0.6321],
                [0.6321, 0.0000]])
    """
    centered = features_teacher - features_teacher.mean(1, keepdim=True)
    rows = []
    for one in centered:  # one class against all, so that memory does not grow with the square of the classes
        rows.append((centered.transpose(1, 2) @ one).square().sum((1, 2)))
    products = torch.stack(rows)
    lengths = products.diagonal().sqrt()
    scale = lengths[:, None] * lengths
    alignment = torch.where(scale > 0, products / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)
    return _sharpened(1 - alignment, sharpen)


def _sharpened(distances: Tensor, sharpen: float) -> Tensor:
    return 1 - (-sharpen * distances).exp() if sharpen else distances


def group_by_class(features: Tensor, labels: Tensor) -> Tensor:
    """Return features class by class, as :func:`wkd_cost_cka` takes them, as many of each as the rarest class has.

    Args:
        features: ``(N, ...)``, for example the ``avgpool`` of training images, which ``kd-lightning predict
            --features.layers '[avgpool]' --features.split train`` writes.
        labels: Class indices ``(N,)``; rows of -1 are left out.

    Returns:
        ``(C, samples, n)``; of each class the first samples.

    Raises:
        ValueError: If a class has no sample.

    Example:
        >>> group_by_class(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), torch.tensor([0, 1, 0, 1, 1])).squeeze(2)
        tensor([[1., 3.],
                [2., 4.]])
    """
    labels, features = class_indices(labels), features.flatten(1)
    groups = [features[labels == c] for c in range(int(labels.max()) + 1)]
    count = min(map(len, groups), default=0)
    if not count:
        raise UserError("Each class needs at least one sample to compare classes, but one has none; add samples of it.")
    return torch.stack([group[:count] for group in groups])


# under the names of the published reference values, which call every function a loss
wkd_cost_fc_loss, wkd_cost_cka_loss = wkd_cost_fc, wkd_cost_cka
