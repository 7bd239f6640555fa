"""Maximizing mutual shape information (Islam et al., 2022); modes are data.

python train.py --config=configs/mmsi.py:small --workdir=runs/x

Every scheme of the paper is a choice of `config.weights`:
  SIN+IN, Eq. 4           the default: original 1, mutual 0.8, stylized 0.1
  SIN                     --config=...:imagenet_sin, which is original 0,
                          mutual 0.8, stylized 0.5 (small_sin: mutual 0.3)
  IN                      --config.weights.mutual=0 --config.weights.stylized=0
  "MMSI", fine-tuned      --config=...:small_finetune --config.init_from=runs/x
  the baseline "ShapeNet" the same commands with --config.weights.mutual=0
Table 7's stages S5 ... S2 are --config.mutual.stages=4, 3,4, or 1,2,3,4.

By default styles are generated, and laid on without a network. As published:
  --config.style.source=folder:<paintings> --config.style.method=adain
  --config.style.encoder_weights=vgg_normalised.pth
  --config.style.decoder_weights=decoder.pth
Photographs, judged by other domains, `<root>/<domain>/<class>/`, as in PACS:
  --config=...:domains --config.data.data_dir=<folder of pacs>
Your own pictures, in folders `<root>/train/<class>/` and `<root>/val/<class>/`:
  --config=...:folder --config.data.source=folder:<root>
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxshape.engine import bench, settings
from jaxshape.typing import Config

MODES = (
  "imagenet",
  "imagenet_sin",
  "imagenet_finetune",
  "cifar",
  "small",
  "small_sin",
  "small_finetune",
  "tiny",
  "folder",
  "domains",
)


def get_config(mode: str = "imagenet") -> Config:
  """The config of a mode, one of `MODES`."""
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
  config = settings.defaults()
  config.system = "mmsi"

  config.backbone = "resnet50"  # Table 1; also resnet18, resnet34.
  config.width = 0  # 0 for the backbone's own.
  config.stem = ""
  config.dtype = "float32"  # bfloat16 on accelerators.
  config.mean = (123.675, 116.28, 103.53)  # Of ImageNet, 0..255.
  config.std = (58.395, 57.12, 57.375)
  config.label_smoothing = 0.0
  # What the backbone begins with: a run's workdir, or a file of public weights
  # (.pth, .pt, .safetensors), whose mean and std are to be given.
  config.pretrained = ""
  config.separate_views = False  # Whether x, s, s' are normalized apart.

  config.weights = ConfigDict()  # Eq. 4.
  config.weights.original = 1.0
  config.weights.mutual = 0.8  # lambda_m, Sec. 4.
  config.weights.stylized = 0.1  # lambda_s, Sec. 4; of each.

  config.mutual = ConfigDict()
  config.mutual.axis = "channel"  # Eq. 1, per sample; or batch, per neuron.
  config.mutual.stages = (-1,)  # S5, Table 7; 1..4, or from the end.
  config.mutual.epsilon = 1e-6
  # The step from which on the term counts; not in the paper.
  config.mutual.start = 0

  config.style = ConfigDict()
  config.style.source = "generated"
  config.style.data_dir = ""
  config.style.split = "train"
  config.style.image_size = 0  # 0 for that of the data.
  # What the source takes besides; what is not given has its own default.
  config.style.options = ConfigDict()
  config.style.options.count = placeholder(int)  # Of generated styles.
  config.style.options.seed = placeholder(int)
  config.style.options.crop = placeholder(str)  # Of a folder's.
  config.style.options.cache = placeholder(int)
  config.style.method = "statistics"  # adain needs the two files.
  config.style.alpha = 1.0  # How much is restyled.
  config.style.scale = 0  # Of method=statistics, its patches; 0 for its own.
  config.style.encoder_weights = ""
  config.style.decoder_weights = ""

  config.data = ConfigDict()
  config.data.source = "tfds:imagenet2012"
  config.data.data_dir = ""
  config.data.image_size = 224
  config.data.train_split = "train"
  config.data.eval_splits = ("validation",)
  config.data.workers = 8
  # What the source takes besides. Training crops at random from the whole
  # photograph, on the host.
  config.data.options = ConfigDict({"crop": "random"})

  config.augment = ConfigDict()  # On the device, before the styles.
  config.augment.horizontal_flip = ConfigDict()

  config.bench = bench.defaults()
  config.bench.corruption_split = "validation"
  config.bench.saliency = ("validation",)

  config.batch_size = 256
  config.steps = 300_000  # 60 epochs of 1.28 M images.
  config.save_every = 2000
  config.eval_every = 10_000
  config.best_metric = "validation/top1"
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.1
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  config.optimizer.schedule = "steps"
  config.optimizer.boundaries = (100_000, 200_000)
  config.optimizer.factor = 0.1
  # Schedules that have an end follow another --config.steps.
  config.optimizer.total_steps = config.get_ref("steps")

  if mode == "cifar":
    config.backbone = "resnet18"
    config.stem = "small"
    config.mean = (125.3, 123.0, 113.9)
    config.std = (63.0, 62.1, 66.7)
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
    config.steps = 39_000  # 200 epochs.
    config.eval_every = 6000
    config.best_metric = "test/top1"
    config.optimizer.schedule = "cosine"
  if mode in ("small", "small_sin", "small_finetune", "tiny", "domains"):
    _generated(config)
  if mode == "domains":
    _domains(config)
  if mode.endswith("_sin"):
    config.weights.original = 0.0
    config.weights.stylized = 0.5
  if mode.endswith("_finetune"):
    config.weights.mutual = 0.0
    config.weights.stylized = 0.0
    config.optimizer.learning_rate = 0.001
    config.steps = 200 if mode.startswith("small") else 50_000
    config.optimizer.boundaries = (25_000,)  # Of the schedule with steps.
  if mode == "tiny":
    config.width = 4
    config.mutual.start = 0
    config.steps = 6
    config.batch_size = 16
    config.log_every = 2
    config.save_every = 3
    config.data.image_size = 32
    config.data.options.num_examples = 40
    config.bench.corruptions = ("gaussian_noise", "contrast")
    config.bench.severities = (3,)
    config.bench.dimensionality = ""
    config.optimizer.warmup_steps = 2
    config.optimizer.learning_rate = 0.001
  if mode == "folder":
    config.backbone = "resnet18"
    config.data.source = ""
    config.data.eval_splits = ("val",)
    config.data.options.skip_damaged = False
    config.data.options.classes = ()  # Their order; () for all there are.
    config.bench.saliency = ()
    config.batch_size = 64
    config.steps = 10_000
    config.eval_every = 1000
    config.save_every = 1000
    config.best_metric = ""
    config.optimizer.learning_rate = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 500
  return config


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
  """Minutes on one core: a small network on `textured_shapes`."""
  config.backbone = "resnet8"
  config.width = 16
  config.stem = "imagenet"
  config.mean = (127.5, 127.5, 127.5)
  config.std = (64.0, 64.0, 64.0)
  # With the paper's weights and one rho per image, so small a network makes all
  # images alike before it can tell them apart (benchmarks/claims/mmsi.py). The
  # term does more, at little cost, once it can (mmsi_late.py beside it).
  config.weights.mutual = 0.3
  config.mutual.axis = "batch"
  config.mutual.start = config.get_ref("steps") * 7 // 20
  config.data.source = "textured_shapes"
  config.data.image_size = 48
  config.data.eval_splits = (
    "test",
    "texture_shift",
    "outline",
    "silhouette",
  )
  config.data.workers = 0
  config.data.options = ConfigDict()
  config.data.options.num_examples = placeholder(int)  # Of each split.
  config.data.options.texture_correlation = 0.97
  config.data.options.seed = 0
  config.augment = ConfigDict()
  config.augment.random_crop = ConfigDict(
    {"padding": config.data.image_size // 10}
  )
  config.augment.horizontal_flip = ConfigDict()
  config.bench.cue_conflict = "cue_conflict"
  config.bench.corruption_split = "test"
  config.bench.corruptions = CORRUPTIONS
  config.bench.corruption_examples = 512
  config.bench.severities = (1, 3, 5)
  config.bench.saliency = ("test", "outline")
  config.bench.dimensionality = "test"
  config.batch_size = 32
  config.steps = 2000
  config.save_every = 300
  config.eval_every = 0
  config.best_metric = ""
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 0.01
  config.optimizer.weight_decay = 0.05
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 100


def _domains(config: Config) -> None:
  """As `_generated`, on real photographs."""
  config.width = 32
  config.mean = (123.675, 116.28, 103.53)
  config.std = (58.395, 57.12, 57.375)
  config.data.source = "domains:pacs"
  config.data.image_size = 64
  config.data.train_split = "photo_train"
  config.data.eval_splits = ("photo_val", "art_painting", "cartoon", "sketch")
  # Whole pictures, each decoded once.
  config.data.options = ConfigDict(
    {"resize_to": config.data.get_ref("image_size"), "cache": 2**30}
  )
  config.augment.random_crop.padding = 4
  config.bench.cue_conflict = ""
  config.bench.corruption_split = ""
  config.bench.corruptions = ()
  config.bench.saliency = ()
  config.bench.stylized = ("photo_val",)
  config.bench.dimensionality = "photo_val"
  config.steps = 600
