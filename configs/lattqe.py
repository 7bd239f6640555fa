"""LAttQE (Gordo et al., 2020); the modes are sizes and data.

python train.py --config=configs/lattqe.py:small --workdir=runs/expansion

On retrieval-SfM-120k, evaluated on Revisited Oxford and Paris:
  --config=configs/lattqe.py --config.data.source=sfm120k:<folder>
  --config.data.eval_splits="('valid','revisited:<folder>@roxford5k')"
On descriptors of one's own:
  --config.data.source=descriptors:<folder>

Every variant of the paper is a value of the config:
  Table 2, without self-attention      --config.network.attention=False
  Table 2, without positions           --config.network.positions=False
  Table 2, without visual embedding    --config.network.visual=False
  Table 2, without the auxiliary loss  --config.loss.auxiliary=0.0
  Sec. 3.4, database side (Eq. 4)      --config.dba.start=<step>
  Table 3, Fig. 3 and 4, the rivals    --config.bench.compare=True
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxshape.engine import settings
from jaxshape.typing import Config

MODES = ("published", "small", "tiny")
IMAGES = 91_642  # Of retrieval-SfM-120k, to train on.


def get_config(mode: str = "published") -> Config:
  """The config of a mode, one of `MODES`."""
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
  config = settings.defaults()
  config.system = "lattqe"

  config.dimensions = 0  # Of the descriptors; 0 for what the data have.
  config.neighbours = 64  # Sec. 4.3, nQE.
  config.network = ConfigDict()
  config.network.layers = 3  # Sec. 4.1, as the heads.
  config.network.heads = 64
  config.network.feedforward = 0  # Sec. 4.1: as wide as the descriptors.
  config.network.attention = True
  config.network.positions = True
  config.network.visual = True
  # Not in the paper: how the network starts. Plain starts learn far slower.
  config.network.position_scale = 0.3
  config.network.alike = True  # Queries and keys of the attention.
  config.network.dropout = 0.1
  config.network.dtype = "float32"

  config.loss = ConfigDict()
  config.loss.margin = 0.1  # Sec. 4.1.
  config.loss.auxiliary = 1.0  # Weight of the auxiliary loss.
  config.pool = ConfigDict()  # Sec. 4.1: where negatives are found.
  config.pool.size = 20_000
  config.pool.negatives = 5
  config.refresh_every = 2000
  config.draw = ConfigDict()  # Sec. 4.1: neighbours in training.
  config.draw.neighbours = (32, 64)
  config.draw.drop = 0.6

  config.dba = ConfigDict()  # Sec. 3.4.
  config.dba.start = 0  # The step from which on T alone moves; 0 for never.
  config.dba.neighbours = 48  # Sec. 4.4, nDBA.
  config.dba.temperature = 0.1  # T at the start.
  config.dba.learning_rate = 0.01

  config.data = ConfigDict()
  config.data.source = "sfm120k:data/sfm120k"
  config.data.data_dir = ""
  config.data.train_split = "train"
  # Splits of the same data, or "kind:name@split" of others.
  config.data.eval_splits = ("valid",)
  config.data.workers = 0
  # Options of kinds of data; those that are None are the kind's own.
  config.data.sfm120k = ConfigDict()
  config.data.sfm120k.positives = placeholder(str)  # Or "cluster".
  config.data.sfm120k.normalize = placeholder(bool)
  config.data.sfm120k.memory = placeholder(int)
  config.data.revisited = ConfigDict()
  config.data.revisited.distractors = placeholder(str)  # A .npy, for R1M.
  config.data.revisited.features = placeholder(str)
  config.data.revisited.query_features = placeholder(str)
  config.data.revisited.normalize = placeholder(bool)
  config.data.revisited.memory = placeholder(int)
  config.data.descriptors = ConfigDict()
  config.data.descriptors.normalize = placeholder(bool)
  config.data.descriptors.memory = placeholder(int)

  config.bench = ConfigDict()
  # Whether to tune the rivals on the data that are evaluated, as the paper did.
  config.bench.compare = False
  config.bench.sizes = ()  # Other numbers of neighbours, for Fig. 3.
  config.bench.rivals = ConfigDict()
  config.bench.rivals.sizes = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
  config.bench.rivals.alpha = (1.0, 2.0, 3.0, 4.0)
  config.bench.rivals.database_sizes = (2, 4, 8, 36)
  config.bench.rivals.c = 0.1  # Of DQE, as the negatives.
  config.bench.rivals.negatives = 5

  config.batch_size = 64
  config.steps = 75 * (IMAGES // 64)  # Sec. 4.1: 50 to 100 epochs.
  config.save_every = 1000
  config.eval_every = IMAGES // 64
  config.best_metric = "valid/mAP"
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 1e-4
  config.optimizer.weight_decay = 1e-6
  config.optimizer.schedule = "exponential"
  config.optimizer.factor = 0.99
  config.optimizer.decay_every = IMAGES // 64

  if mode in ("small", "tiny"):
    _generated(config)
  if mode == "tiny":
    config.neighbours = 8
    config.dba.neighbours = 6
    config.draw.neighbours = (4, 8)
    config.network.layers = 1
    config.network.heads = 2
    config.pool.size = 32
    config.refresh_every = 2
    small = {"dimensions": 16, "landmarks": 12, "distractors": 60}
    config.update({"data": {"landmarks": small}})
    config.bench.sizes = (4,)
    config.bench.rivals.sizes = (2, 4)
    config.bench.rivals.alpha = (3.0,)
    config.bench.rivals.database_sizes = (2,)
    config.batch_size = 8
    config.steps = 6
    config.dba.start = 3
    config.log_every = 2
    config.save_every = 3
    config.optimizer.warmup_steps = 2
    config.optimizer.total_steps = 6
    # Adam makes steps of noise where a gradient is 0.
    config.optimizer.name = "sgd"
  return config


def _generated(config: Config) -> None:
  """Minutes on two cores: generated landmarks, descriptors of 128 numbers."""
  config.data.source = "landmarks"
  config.data.eval_splits = ("valid", "test")
  config.data.landmarks = ConfigDict()
  config.data.landmarks.dimensions = 128
  config.data.landmarks.landmarks = placeholder(int)
  config.data.landmarks.distractors = placeholder(int)
  config.data.landmarks.seed = 0
  config.network.heads = 8
  config.network.dropout = 0.0
  # Half as many as published, so that a run takes minutes.
  config.neighbours = 32
  config.draw.neighbours = (16, 32)
  config.dba.neighbours = 24
  config.bench.compare = True
  config.bench.sizes = (1, 2, 4, 8, 16, 24)
  config.bench.rivals.database_sizes = (2, 4, 8)
  config.loss.auxiliary = 0.5
  config.steps = 2150
  # 2000 of them for the network, and as large a share of longer runs.
  config.dba.start = config.get_ref("steps") * 40 // 43
  config.pool.size = 8000
  config.refresh_every = 500
  config.save_every = 500
  config.eval_every = 0
  config.best_metric = ""
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.1
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 100
  config.optimizer.total_steps = config.get_ref("steps") * 40 // 43
