"""SqueezeSegV3 (Xu et al., 2020) and RangeNet; the modes are networks and data.

python train.py --config=configs/squeezesegv3.py:small --workdir=runs/scans

SemanticKITTI, from the folder that holds `sequences/`:
  --config=...:ssgv3_21 --config.data.source=semantic_kitti:<root>

Every variant of the paper is a value of `config.network`:
  Table 3, what adapts     --config.network.variant=none, s, is, sk, isk, oisk,
                           se, cbam, pac or cam
  Table 4, kernel of A     --config.network.attention_kernel=1, 3, 5 or 7
  Table 5, baseline        --config=...:rangenet_21
  Table 5, one loss        --config.network.heads=final
  Sec. 3, who wins a pixel --config.projection.keep=farthest
  Sec. 5.2, heads          --config.network.heads=encoder
  Eq. 5, class weights     --config.loss.weights=log; they are negative, so that
                           with --config.loss.reduction=pixels, also of Eq. 5,
                           the loss as printed rewards what is wrong
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxshape.engine import settings
from jaxshape.typing import Config

MODES = (
  "ssgv3_21",
  "ssgv3_53",
  "rangenet_21",
  "rangenet_53",
  "ablation",
  "small",
  "tiny",
)
SCANS = 19_130  # Sequences 00 to 07, 09 and 10.


def get_config(mode: str = "ssgv3_21") -> Config:
  """The config of a mode, one of `MODES`."""
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
  config = settings.defaults()
  config.system = "squeezesegv3"

  config.network = ConfigDict()
  config.network.depth = 21  # Sec. 6.2; or 53.
  config.network.variant = "isk"  # Sec. 4.2.
  config.network.attention_kernel = 7  # Table 4.
  config.network.coordinates = "xyz"  # Public code; "all" is X_0 of Eq. 3.
  config.network.arrangement = "adaptive"  # Sec. 5.1; or "rangenet".
  config.network.downsampling = 3  # Sec. 5.1; 5 as in RangeNet.
  config.network.heads = "decoder"  # Public code; "encoder" is Sec. 5.2.
  config.network.width = 32  # Channels of the first layer.
  config.network.detach_skips = True  # Public code.
  config.network.dropout = 0.01
  config.network.dtype = "float32"

  config.sensor = ConfigDict()  # Sec. 6.2, degrees.
  config.sensor.height = 64
  config.sensor.width = 2048
  config.sensor.fov_up = 3.0
  config.sensor.fov_down = -25.0
  config.projection = ConfigDict()
  config.projection.keep = "nearest"  # Public code; "farthest" is Sec. 6.2.
  config.projection.rows = "public"  # Or "paper", Eq. 1.
  config.projection.clamp = True  # Points above and below to the border rows.
  config.projection.drop_first_point = True  # Public code.
  # Of range, x, y, z and remission, of filled pixels.
  config.mean = (12.12, 10.88, 0.23, -1.04, 0.21)
  config.std = (12.32, 11.47, 6.91, 0.86, 0.16)

  config.loss = ConfigDict()
  config.loss.weights = "inverse"  # Public code; "log" is Eq. 5; or "none".
  config.loss.epsilon = 0.001
  config.loss.reduction = "weights"  # Public code; "pixels" is Eq. 5.

  config.knn = ConfigDict()  # Of RangeNet++; the public configs have 7 and 7.
  config.knn.use = True
  config.knn.neighbours = 5
  config.knn.window = 5
  config.knn.sigma = 1.0
  config.knn.cutoff = 1.0
  config.crf = ConfigDict()  # Of SqueezeSegV2.
  config.crf.iterations = 0  # 3 there; 0 for none.
  config.crf.form = "mean_field"  # Or "public", what its code computes.
  config.crf.window = (3, 5)
  config.crf.sigma = 0.7  # Metres, as in the configs of RangeNet++.
  config.crf.coefficient = 0.1

  config.augment = (
    ConfigDict()
  )  # The public code has none, as these do nothing.
  config.augment.random_flip = ConfigDict({"probability": 0.0})
  config.augment.random_rotation = ConfigDict({"degrees": 0.0})
  config.augment.random_scale = ConfigDict({"scale": (1.0, 1.0)})
  config.augment.random_jitter = ConfigDict({"sigma": 0.0})
  config.augment.random_drop = ConfigDict({"share": (0.0, 0.0)})
  config.data = ConfigDict()
  config.data.source = "semantic_kitti:data/semantic_kitti"
  config.data.data_dir = ""
  config.data.train_split = "train"
  config.data.eval_splits = ("valid",)
  config.data.workers = 8
  # Options of kinds of data; those that are None are the kind's own.
  config.data.semantic_kitti = ConfigDict()
  config.data.semantic_kitti.sequences = placeholder(tuple)  # (0, 3), say.
  config.data.semantic_kitti.points = placeholder(int)
  config.data.semantic_kitti.cache = placeholder(int)
  # A file like semantic-kitti.yaml, "semantic_kitti" or "nuscenes_lidarseg".
  config.labels = "semantic_kitti"

  config.batch_size = 16
  config.steps = 150 * (SCANS // 16)
  config.save_every = 1000
  config.eval_every = SCANS // 16
  config.best_metric = "valid/mIoU"
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.001  # Public code; 0.01 in Sec. 6.2.
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  config.optimizer.schedule = "exponential"
  config.optimizer.factor = 0.995
  config.optimizer.decay_every = SCANS // 16
  config.optimizer.warmup_steps = SCANS // 16
  config.optimizer.total_steps = config.get_ref("steps")

  if mode in ("ssgv3_53", "rangenet_53"):
    config.network.depth = 53
    config.batch_size = 8
    config.steps = 150 * (SCANS // 8)
    config.eval_every = SCANS // 8
    config.optimizer.learning_rate = 0.005
    config.optimizer.factor = 0.99
    config.optimizer.decay_every = SCANS // 8
    config.optimizer.warmup_steps = SCANS // 8
  if mode == "ssgv3_53":
    # The public config has range and z in each other's place, and weights that
    # were trained by it want the same.
    config.mean = (-1.04, 10.88, 0.23, 12.12, 0.21)
    config.std = (0.86, 11.47, 6.91, 12.32, 0.16)
  if mode in ("rangenet_21", "rangenet_53"):
    config.network.variant = "none"
    config.network.arrangement = "rangenet"
    config.network.downsampling = 5
    config.network.heads = "final"
    config.optimizer.learning_rate = 0.01
    config.optimizer.factor = 0.99
  if mode == "ablation":  # Tables 3 to 5.
    config.sensor.width = 512
    config.optimizer.learning_rate = 0.01
  if mode in ("small", "tiny"):
    _generated(config)
  if mode == "tiny":
    config.network.width = 4
    config.sensor.height = 16
    config.sensor.width = 64
    config.update({"data": {"lidar_scenes": {"num_examples": 20}}})
    config.knn.window = 3
    config.knn.neighbours = 3
    config.batch_size = 8
    config.steps = 6
    config.log_every = 2
    config.save_every = 3
    # Adam makes steps of noise where the gradient is 0, as that of a bias is
    # before a normalization.
    config.optimizer.name = "sgd"
    config.optimizer.warmup_steps = 2
  return config


def _generated(config: Config) -> None:
  """Minutes on two cores: a narrow network on simulated streets."""
  config.network.width = 8
  config.sensor.height = 16
  config.sensor.width = 256
  config.data.source = "lidar_scenes"
  config.data.eval_splits = ("test",)
  config.data.workers = 0
  config.data.lidar_scenes = ConfigDict()
  config.data.lidar_scenes.beams = config.sensor.get_ref("height")
  config.data.lidar_scenes.width = 2 * config.sensor.get_ref("width")
  config.data.lidar_scenes.num_examples = placeholder(int)  # Of each split.
  config.data.lidar_scenes.seed = 0
  config.projection.drop_first_point = False
  config.augment = ConfigDict({"random_flip": {"probability": 0.5}})
  config.loss.epsilon = 0.02  # Few steps: rare classes must not drown the rest.
  config.batch_size = 4
  config.steps = 400
  config.save_every = 200
  config.eval_every = 0
  config.best_metric = ""
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 0.005
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
