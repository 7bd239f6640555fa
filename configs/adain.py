"""AdaIN style transfer (Huang and Belongie, 2017); the modes are data sets.

python train.py --config=configs/adain.py:small --workdir=runs/style

The published run wants three things in place: contents in `data/coco/train` and
`data/coco/val`, paintings below `data/wikiart`, and `vgg_normalised.pth`, whose
path is --config.encoder_weights.

Your own pictures: --config=...:folder --config.data.source=folder:<contents>
  --config.style.source=folder:<styles>
The public decoder, to go on from or to evaluate:
  python -m jaxshape.weights load --config=configs/adain.py:coco \
      --file=vgg_normalised.pth,decoder.pth --workdir=runs/public
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxshape.engine import settings
from jaxshape.typing import Config

MODES = ("coco", "folder", "small", "tiny")


def get_config(mode: str = "coco") -> Config:
  """The config of a mode, one of `MODES`."""
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
  config = settings.defaults()
  config.system = "adain"

  config.width = 64  # Channels of the first layer; 64 in VGG-19.
  config.dtype = "float32"  # bfloat16 on accelerators.
  # vgg_normalised.pth or torchvision's VGG-19; empty: drawn at random, which
  # still transfers colours and coarse texture.
  config.encoder_weights = ""
  config.weights = ConfigDict()
  config.weights.content = 1.0  # Eq. 11.
  config.weights.style = 10.0  # lambda in Eq. 11, value of the public code.
  config.crop = 256  # Sec. 6.2: drawn from pictures of 512; 0 for none.
  config.alpha = 1.0  # Eq. 14, of predictions.

  config.data = ConfigDict()  # Contents.
  config.data.source = "folder:data/coco"
  config.data.data_dir = ""
  config.data.image_size = 512
  config.data.train_split = "train"
  config.data.eval_splits = ("val",)
  config.data.workers = 8
  config.data.options = ConfigDict({"resize_to": 512})

  config.style = ConfigDict()
  config.style.source = "folder:data/wikiart"
  config.style.data_dir = ""
  config.style.split = "train"
  config.style.options = ConfigDict({"resize_to": 512})

  config.batch_size = 8  # Sec. 6.2.
  config.steps = 160_000  # Public code.
  config.save_every = 2000
  config.eval_every = 10_000
  config.best_metric = "val/loss"
  config.best_mode = "min"
  config.optimizer.name = "adam"  # Sec. 6.2.
  config.optimizer.learning_rate = 1e-4  # Public code.
  config.rate_decay = 5e-5  # Public code: the rate over 1 + so much per step.
  # Schedules that have an end follow another --config.steps.
  config.optimizer.total_steps = config.get_ref("steps")

  if mode == "folder":
    config.data.source = ""
    config.data.eval_splits = ()
    config.data.options.skip_damaged = True
    config.style.source = ""
    config.eval_every = 0
    config.best_metric = ""
  if mode in ("small", "tiny"):
    _generated(config)
  if mode == "tiny":
    config.width = 2
    config.crop = 24
    config.data.image_size = 32
    config.data.options.num_examples = 20
    config.style.options.count = 6
    config.batch_size = 8
    config.steps = 6
    config.log_every = 2
    config.save_every = 3
    config.optimizer.warmup_steps = 2
  return config


def _generated(config: Config) -> None:
  """Minutes on two cores: a narrow network on generated pictures."""
  config.width = 16
  config.crop = 0
  config.data.source = "textured_shapes"
  config.data.image_size = 64
  config.data.eval_splits = ("test",)
  config.data.workers = 0
  config.data.options = ConfigDict()
  config.data.options.num_examples = placeholder(int)  # Of each split.
  config.data.options.seed = 0
  config.style.source = "generated"
  config.style.options = ConfigDict()
  config.style.options.count = placeholder(int)
  config.style.options.seed = placeholder(int)
  config.batch_size = 8
  config.steps = 1000
  config.save_every = 250
  config.eval_every = 0
  config.best_metric = ""
  config.rate_decay = 0.0
  config.optimizer.learning_rate = 0.002
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
