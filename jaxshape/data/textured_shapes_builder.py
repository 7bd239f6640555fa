"""The generated pictures as a TFDS data set, prepared without TensorFlow.

  TexturedShapes(
    config="64", data_dir=..., file_format="array_record"
  ).download_and_prepare()

writes what `textured_shapes.open_source` draws, as PNG in array_record files
that any reader of TFDS opens. Only array_record works without TensorFlow.
"""

from collections.abc import Iterator
import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from jaxshape.data import textured_shapes


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
  """What `textured_shapes.open_source` is asked for.

  Attributes:
    image_size: Pixels along each side.
    num_examples: In each split; by default as many as it has.
    texture_correlation: How often the texture gives the class away.
    seed: Another seed gives other pictures.
  """

  image_size: int = 64
  num_examples: int | None = None
  texture_correlation: float = 0.97
  seed: int = 0


class TexturedShapes(tfds.core.GeneratorBasedBuilder):
  """Silhouettes of sixteen things filled with textures that mislead."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012, as TFDS has it.
  BUILDER_CONFIGS = [  # noqa: RUF012, as TFDS has it.
    Config(name=str(size), description=f"{size} px.", image_size=size)
    for size in (64, 32, 128, 224)
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    size = self._config().image_size
    return tfds.core.DatasetInfo(
      builder=self,
      description=textured_shapes.__doc__,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(size, size, 3), encoding_format="png"
          ),
          "label": tfds.features.ClassLabel(names=textured_shapes.CLASSES),
          "texture": tfds.features.Scalar(np.int32),
          "index": tfds.features.Scalar(np.int32),
        }
      ),
      supervised_keys=("image", "label"),
      # Record i is example i.
      disable_shuffling=True,
    )

  def _config(self) -> Config:
    config = self.builder_config
    if not isinstance(config, Config):
      raise TypeError(f"config must be a Config, got {config!r}.")
    return config

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager  # Nothing is downloaded.
    return {
      split: self._generate_examples(split) for split in textured_shapes.SPLITS
    }

  def _generate_examples(
    self, split: str
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    config = self._config()
    source = textured_shapes.open_source(
      split=split,
      image_size=config.image_size,
      num_examples=config.num_examples,
      texture_correlation=config.texture_correlation,
      seed=config.seed,
      cache=0,
    )
    for i, example in enumerate(source):
      # Bytes, as TFDS encodes arrays with TensorFlow.
      file = io.BytesIO()
      Image.fromarray(example["image"]).save(file, "PNG")
      file.seek(0)
      yield i, {**example, "image": file}
