"""What people and well-known networks are reported to reach.

To stand beside a network's own numbers; fractions, not per cent. Comparable is
what was measured on the same pictures: shape bias on the public cue-conflict
stimuli, whose answers are among 16 categories, and mCE on the stored JPEGs of
ImageNet-C.

Reference:
  Geirhos et al., "ImageNet-trained CNNs are biased towards texture; increasing
  shape bias improves accuracy and robustness", ICLR 2019, Sec. 3.
  Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
  Corruptions and Perturbations", ICLR 2019, Table 1.
"""

from typing import NamedTuple

PEOPLE = "people"


class Value(NamedTuple):
  """A published number.

  Attributes:
    name: Whose it is.
    value: A fraction.
    source: Where it stands, in short.
  """

  name: str
  value: float
  source: str


_CONFLICT = "Geirhos et al. 2019, Sec. 3.1"
_STYLIZED = "Geirhos et al. 2019, Sec. 3.2"
_CORRUPTED = "Hendrycks and Dietterich 2019"
_RESNETS = "hendrycks/robustness"

# The share of the shape's class among the answers that were for either.
SHAPE_BIAS = (
  Value(PEOPLE, 0.959, _CONFLICT),
  Value("ResNet-50 on Stylized-ImageNet", 0.814, _STYLIZED),
  Value("AlexNet", 0.429, _CONFLICT),
  Value("GoogLeNet", 0.312, _CONFLICT),
  Value("ResNet-50", 0.221, _CONFLICT),
  Value("VGG-16", 0.172, _CONFLICT),
)

# mCE: errors on ImageNet-C as a fraction of AlexNet's.
CORRUPTION_ERRORS = (
  Value("SqueezeNet", 1.044, _CORRUPTED),
  Value("AlexNet", 1.0, _CORRUPTED),
  Value("VGG-11", 0.935, _CORRUPTED),
  Value("VGG-19", 0.889, _CORRUPTED),
  Value("ResNet-18", 0.847, _CORRUPTED),
  Value("VGG-19 with batch normalization", 0.816, _CORRUPTED),
  Value("ResNet-50", 0.767, _CORRUPTED),
  Value("ResNet-50, ImageNet and its stylized form", 0.693, _RESNETS),
  Value("ResNet-50, AugMix", 0.653, _RESNETS),
)
