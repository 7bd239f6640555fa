"""Transfer (Islam et al., 2022, Sec. 4.4); the modes are data sets and tasks.

python train.py --config=configs/transfer.py:voc07 --workdir=runs/y \
    --config.pretrained=runs/x --config.data.source=voc:<folder of VOCdevkit>

`pretrained` is a run of this library, whose config tells the backbone, or a
file with torchvision's names (.pth, .safetensors) for the backbone named here;
without it the network starts from nothing.

Table 6, from the left:
  VOC2007, mAP            voc07, or voc07_linear
  Caltech-101             caltech101
  CIFAR-100               cifar100
  DTD                     dtd
  VOC12, fine-tuned       voc12_segmentation
  VOC12, "freeze"         voc12_segmentation_frozen
  CAMs, mIoU              voc12_cam
Any of them is linear with --config.head=linear, and then sees each image once
with --config.augment={} and without random crops. Offline: `small`,
`small_voc`, `small_segmentation`, on generated pictures.

Your own pictures, in folders `<root>/train/<class>/` and `<root>/val/<class>/`:
  --config=...:folder --config.data.source=folder:<root>
"""

from ml_collections import ConfigDict

from jaxshape.engine import settings
from jaxshape.typing import Config

MODES = (
  "voc07",
  "voc07_linear",
  "voc12_segmentation",
  "voc12_segmentation_frozen",
  "voc12_cam",
  "caltech101",
  "cifar100",
  "dtd",
  "folder",
  "small",
  "small_voc",
  "small_segmentation",
  "tiny",
)


def get_config(mode: str = "voc07") -> Config:
  """The config of a mode, one of `MODES`."""
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
  config = settings.defaults()
  config.system = "transfer"
  config.pretrained = ""  # A workdir, or a file.
  config.task = "single"  # Or multilabel, segmentation.
  config.head = "fine_tune"  # Or linear.

  # A run named in `pretrained` has these of its own.
  config.backbone = "resnet50"
  config.width = 0  # 0 for the backbone's own.
  config.stem = ""
  config.mean = (123.675, 116.28, 103.53)  # Of ImageNet, 0..255.
  config.std = (58.395, 57.12, 57.375)
  config.dtype = "float32"  # bfloat16 on accelerators.
  config.label_smoothing = 0.0  # Of task=single.

  config.data = ConfigDict()
  config.data.source = "voc:"
  config.data.data_dir = ""
  config.data.image_size = 224
  config.data.train_split = "train"
  config.data.eval_splits = ("test",)
  config.data.workers = 8
  config.data.options = ConfigDict()  # What the source takes besides.
  config.augment = ConfigDict({"horizontal_flip": ConfigDict()})

  config.bench = ConfigDict()
  config.bench.cam_split = ""  # Of task=multilabel: maps to compare with.
  config.bench.cam_threshold = 0.15  # Sec. 4.4.

  # The paper has these in its supplement: the numbers are ours.
  config.batch_size = 64
  config.steps = 4000
  config.save_every = 500
  config.eval_every = 500
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.01
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 100
  # Schedules that have an end follow another --config.steps.
  config.optimizer.total_steps = config.get_ref("steps")

  if mode.startswith("voc"):
    _voc(config, mode)
  if mode in ("caltech101", "cifar100", "dtd"):
    _single(config, mode)
  if mode == "folder":
    config.data.source = ""
    config.data.eval_splits = ("val",)
    config.data.options.skip_damaged = False
    config.data.options.classes = ()  # Their order; () for all there are.
    config.best_metric = "val/top1"
  if mode.startswith("small") or mode == "tiny":
    _generated(config, mode)
  if mode == "tiny":
    config.width = 4
    config.steps = 6
    config.batch_size = 16
    config.log_every = 2
    config.save_every = 3
    config.data.image_size = 32
    config.data.options.num_examples = 40
    config.optimizer.warmup_steps = 2
  return config


def _voc(config: Config, mode: str) -> None:
  if mode in ("voc07", "voc07_linear"):
    config.task = "multilabel"
    config.data.train_split = "trainval"
    config.data.options.year = 2007
    config.data.options.crop = "random"
    config.data.options.scale = (0.3, 1.0)  # Less would cut things away.
    config.best_metric = "test/mAP"
  if mode == "voc07_linear":
    config.data.options.crop = "center"
    config.augment = ConfigDict()
  if mode == "voc12_cam":
    config.task = "multilabel"
    config.data.image_size = 448
    config.data.eval_splits = ("val",)
    config.data.options.fit = "pad"
    config.bench.cam_split = "train"  # Sec. 4.4: of the training images.
    config.batch_size = 16
    config.best_metric = "val/mAP"
  if mode in ("voc12_segmentation", "voc12_segmentation_frozen"):
    config.task = "segmentation"
    config.data.image_size = 512
    config.data.eval_splits = ("val",)
    config.data.options.task = "segmentation"
    config.data.options.fit = "pad"
    config.batch_size = 16
    config.best_metric = "val/mIoU"
  if mode in ("voc07_linear", "voc12_segmentation_frozen"):
    config.head = "linear"
    config.optimizer.learning_rate = 0.1


def _single(config: Config, mode: str) -> None:
  config.data.source = f"tfds:{mode}"
  config.data.options.crop = "random"
  config.data.options.scale = (0.3, 1.0)
  config.best_metric = "test/top1"
  if mode == "caltech101":
    config.best_metric = "test/mean_class_accuracy"
  if mode == "cifar100":
    config.steps = 20_000
    config.eval_every = 2000
  if mode == "dtd":
    config.data.train_split = "train+validation"


def _generated(config: Config, mode: str) -> None:
  """Minutes on two cores: a small network on generated pictures."""
  config.backbone = "resnet8"
  config.width = 32
  config.stem = "imagenet"
  config.mean = (127.5, 127.5, 127.5)
  config.std = (64.0, 64.0, 64.0)
  config.data.source = "voc:generated"
  config.data.image_size = 64
  config.data.eval_splits = ("val",)
  config.data.workers = 0
  config.data.options = ConfigDict({"cache": 2**28})
  config.batch_size = 32
  config.steps = 600
  config.save_every = 300
  config.eval_every = 0
  config.best_metric = ""
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 0.01
  config.optimizer.weight_decay = 0.05
  if mode in ("small_voc", "tiny"):
    config.task = "multilabel"
    config.bench.cam_split = "val"
  if mode == "small_segmentation":
    config.task = "segmentation"
    config.head = "linear"
    config.data.options.task = "segmentation"
  if mode == "small":
    config.head = "linear"
    config.data.source = "textured_shapes"
    config.data.eval_splits = ("test", "texture_shift", "outline", "silhouette")
    config.data.options = ConfigDict()
    config.data.options.texture_correlation = 0.97
    config.data.options.seed = 0
    config.augment = ConfigDict()
