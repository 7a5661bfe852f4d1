"""What rounding costs, in nats: the second-order change of the loss, from gradients at the float model.

With gradients of tokens drawn from the model (see gradients.py), KL(model || changed model), which is also what the
mean loss grows by, is to second order `1/2 E[(sum of gradient * error)^2]` per window. Errors of rounding are as good
as independent with mean 0 wherever they do not share a scale: between the rows of a weight, between tokens and channels
of an input. There the products between them vanish in the mean, and they are left out, because in a sample of a few
windows they are noise. Inside a row all products count. Everything here is a sum over one window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afq_export.quantize.checkpoint import dequantize
from afq_export.quantize.grid import weight_codes, weight_scales
from afq_export.spec.quant import QuantSpec


def rounding_error(weight_OI: Tensor, spec: QuantSpec) -> Tensor:
    """What rounding to nearest, without clipping, adds to a weight: float32 [O, I]."""
    scales = weight_scales(weight_OI, torch.ones(1), spec)
    return dequantize(weight_codes(weight_OI, scales, spec), scales, spec.group).sub_(weight_OI)


def weight_damage(gradient_OI: Tensor, error_OI: Tensor) -> float:
    """Of a weight's error, all inputs and tokens of a row together. `gradient`: of the window's loss by the weight."""
    return 0.5 * float(torch.linalg.vecdot(gradient_OI, error_OI).double().square().sum())


def input_damage(gradient_TI: Tensor, error_TI: Tensor) -> float:
    """Of an input's error, every value alone."""
    return 0.5 * float((gradient_TI * error_TI).double().square().sum())


def row_damage(ids_T: Tensor, gradient_TD: Tensor, error_VD: Tensor) -> float:
    """Of the token rows' error: a row counts with all its places in the window together."""
    tokens, place_T = ids_T.unique(return_inverse=True)
    gradient_UD = torch.zeros(len(tokens), gradient_TD.shape[1]).index_add_(0, place_T, gradient_TD)
    return weight_damage(gradient_UD, error_VD[tokens])


def logit_damage(probabilities_TV: Tensor, error_TV: Tensor) -> float:
    """Of an error of the logits, exactly: half its variance under the predictions."""
    mean_T1 = (probabilities_TV * error_TV).sum(-1, keepdim=True)
    return 0.5 * float((probabilities_TV * (error_TV - mean_T1).square()).double().sum())
