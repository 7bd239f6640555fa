"""Networks with public weights of ImageNet; the modes are their names.

python -m jaxshape.weights load --config=configs/imagenet.py:resnet50 \
    --file=resnet50-0676ba61.pth --workdir=runs/resnet50
python eval.py --workdir=runs/resnet50 --output=runs/resnet50/eval \
    --config=configs/imagenet.py:resnet50 \
    --config.bench.stimuli=cue_conflict:<folder of cue_conflict, edges, ...>

The first makes a run of a file of tensors by their public names; what its
images need (size, crop, interpolation, mean, std) is in the run's config. The
second measures it; without --config, what the run was made with. More of it:
  ImageNet         --config.data.source=imagenet:<root>
                   --config.data.eval_splits="('val',)"
  ImageNet-A, -R   --config.data.eval_splits="('val','imagenet-r')"
                   --config.bench.restricted="('imagenet-r',)"
  ImageNet-C       --config.bench.corrupted=corrupted:<root>
  corruptions      --config.bench.corruption_split=val
                   --config.bench.corruptions="('fog','contrast')"

Weights of the same names may want other preprocessing: torchvision's second
ones are resized to 232.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxshape.backbones import efficientnet
from jaxshape.engine import bench, settings
from jaxshape.typing import Config

# Of torchvision: 224 out of 256, bilinear.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
VGGS = (
  "vgg11", "vgg11_bn", "vgg13", "vgg13_bn",
  "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
)  # fmt: skip
MODES = (*efficientnet.VARIANTS, *RESNETS, *VGGS, "tiny")


def get_config(mode: str = "efficientnet_lite0") -> Config:
  """The config of a mode, one of `MODES`."""
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
  config = settings.defaults()
  config.system = "texture_suppression"

  config.backbone = mode
  config.width = 0  # 0 for the backbone's own.
  config.stem = ""
  config.dtype = "float32"
  config.mean = (123.675, 116.28, 103.53)  # Of ImageNet, 0..255.
  config.std = (58.395, 57.12, 57.375)
  config.label_smoothing = 0.0
  config.pretrained = ""

  config.suppression = ConfigDict()  # As in configs/texture_suppression.py.
  config.suppression.policy = "original"
  config.suppression.probability = 0.5
  config.suppression.filter = "perona_malik"
  config.suppression.kappa = 20.0
  config.suppression.step_size = 0.1
  config.suppression.iterations = (20, 20)
  config.suppression.conduction = "exponential"
  config.suppression.sigma = (10.0, 20.0)
  config.suppression.diameter = 9
  config.suppression.sigma_color = (75.0, 75.0)
  config.suppression.sigma_space = 75.0
  config.suppression.size = 5
  config.suppression.preset = "classic"

  config.data = ConfigDict()
  config.data.source = "imagenet:"  # No pictures yet, only the classes.
  config.data.data_dir = ""
  config.data.image_size = 224
  config.data.train_split = "train"
  config.data.eval_splits = ()
  config.data.workers = 0
  config.data.options = ConfigDict()
  config.data.options.resize_to = 256
  config.data.options.interpolation = "bilinear"
  config.data.options.crop = "random"  # In training alone.
  config.data.options.skip_damaged = placeholder(bool)  # Of folders.

  config.augment = ConfigDict()
  config.augment.horizontal_flip = ConfigDict()

  config.bench = bench.defaults()
  config.bench.filtered = ""
  # All that is of stimuli is measured as soon as bench.stimuli is given.
  config.bench.categories = "imagenet"
  config.bench.cue_conflict = "cue_conflict"
  config.bench.stimuli_splits = ("edges", "silhouettes")
  config.bench.saliency = ("stimuli:cue_conflict",)
  config.bench.dimensionality = "stimuli:cue_conflict"
  config.bench.dimensionality_examples = 256

  # For fine-tuning.
  config.batch_size = 64
  config.steps = 50_000
  config.save_every = 2000
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.001
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 500
  # Schedules that have an end follow another --config.steps.
  config.optimizer.total_steps = config.get_ref("steps")

  if mode in efficientnet.PREPROCESSING:
    published = efficientnet.PREPROCESSING[mode]
    config.mean, config.std = published.mean, published.std
    config.data.image_size = published.image_size
    config.data.options.resize_to = published.resize_to
    config.data.options.interpolation = published.interpolation
  if mode == "tiny":
    _tiny(config)
  return config


def _tiny(config: Config) -> None:
  """Seconds on two cores, on generated pictures of their own classes."""
  config.backbone = "resnet8"
  config.width = 4
  config.stem = "imagenet"
  config.data.source = "textured_shapes"
  config.data.image_size = 32
  config.data.eval_splits = ("test",)
  config.data.options = ConfigDict({"num_examples": 40})
  config.bench.categories = ""
  config.bench.stimuli_splits = ()
  config.bench.saliency = ("test",)
  config.bench.dimensionality = ""
  config.batch_size = 16
  config.steps = 6
  config.log_every = 2
  config.save_every = 3
  config.optimizer.warmup_steps = 2
