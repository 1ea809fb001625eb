"""The papers' update rules as ordinary optimizers.

Each rule acts on the trailing dimensions of a parameter and treats leading ones as a batch, so that one optimizer
serves a single network and an ``Ensemble``; a setting that differs between the S runs is a tensor of shape ``(S,)``.
"""

from lib.optimizers.bsum import BSUM
from lib.optimizers.dsgd import DSGD, NormSGD
from lib.optimizers.intrinsic import IntrinsicSGD
from lib.optimizers.projected import ProjectedSGD
from lib.optimizers.sgd import SGD
from lib.optimizers.wngrad import WNGrad

__all__ = ["BSUM", "DSGD", "IntrinsicSGD", "NormSGD", "ProjectedSGD", "SGD", "WNGrad"]
