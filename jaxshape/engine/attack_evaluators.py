"""Evaluators for any classifier: its accuracy on images that are attacked.

White-box, each state is attacked itself; transferred, the images are made on
another run's network, the surrogate, and shown to all. Images are 0..255, and
so is epsilon: what the literature calls 8/255 is 8.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
import numpy as np

from jaxshape.attacks import gradient
from jaxshape.engine import (
  comparison,
  evaluators,
  report,
  runtime,
  trained,
)
from jaxshape.errors import InputError, few
from jaxshape.metrics import classification
from jaxshape.system import Evaluator, TrainState
from jaxshape.typing import Array, Batch, PyTree

LogitsFn = Callable[[TrainState, Any], Array]


class Recipe(NamedTuple):
  """An attack as numbers, so that one program holds all attacks.

  Attributes:
    iterations: Number of steps.
    parts: The step size is epsilon divided by this.
    decay: Of the momentum.
    random: 1 if it starts at a random point of the ball.
  """

  iterations: int
  parts: int
  decay: int
  random: int


# The defaults of `attacks.gradient`, by the names of its functions.
ATTACKS: Mapping[str, Recipe] = {
  "fgsm": Recipe(1, 1, 0, 0),
  "pgd": Recipe(10, 4, 0, 1),
  "iterative_fgsm": Recipe(10, 10, 0, 0),
  "momentum_fgsm": Recipe(5, 5, 1, 0),
}
CLEAN = "clean_top1"
_READ = ("image", "label", "index")


class Surrogate(NamedTuple):
  """A trained network that images are attacked on.

  Attributes:
    name: For errors, such as the run's folder.
    logits: `(state, images 0..255) -> [batch, classes]`.
    state: On the devices of the mesh.
    classes: Names of the classes, in the order of the logits.
    mesh: As `runtime.make_mesh` gives it.
  """

  name: str
  logits: LogitsFn
  state: TrainState
  classes: Sequence[str]
  mesh: Mesh


def load_surrogate(
  workdir: str | os.PathLike[str],
  *,
  mesh: Mapping[str, int] | None = None,
  step: int | str | None = None,
) -> Surrogate:
  """The network of another run, whatever its system and architecture.

  Args:
    workdir: That run's folder.
    mesh: As `config.mesh` of the run that is evaluated; without it all devices
      share the batch.
    step: Which checkpoint; "best" by that run's metric, the newest intact one
      by default.

  Raises:
    InputError: Nothing intact was trained there, or no classifier of images.
  """
  name = os.fspath(workdir)
  if not name:
    raise InputError(
      "the attacks' surrogate must be the --workdir of a run, got ''."
    )
  found = trained.classifier(workdir, mesh=mesh, step=step)
  return Surrogate(
    name, found.logits, found.state, found.splits.classes, found.mesh
  )


def metric(attack: str, epsilon: float) -> str:
  """The name of a number of `attacked`, such as "fgsm_8_top1"."""
  return f"{attack}_{epsilon:g}_top1"


def attacked(
  classifier: evaluators.Classifier,
  data: evaluators.Data,
  *,
  attacks: Sequence[str] = tuple(ATTACKS),
  epsilons: Sequence[float] = (2, 4, 8, 16),
  surrogate: Callable[[], Surrogate] | None = None,
  seed: int = 0,
  shown: int = 6,
) -> Evaluator:
  """Top-1 on attacked images, by attack and epsilon, and on clean ones.

  Every image has one random start, by its place in the data, whatever the
  batch size. All attacks and epsilons are one compiled program.

  Args:
    classifier: What is evaluated, and attacked if there is no surrogate.
    data: Batches with "image" 0..255 and "label".
    attacks: Names of `ATTACKS`.
    epsilons: Radii of the ball, above 0 and at most 255.
    surrogate: Gives the network that the images are attacked on instead, such
      as `functools.partial(load_surrogate, workdir)`; called once, when the
      first batch is asked for.
    seed: Of the random starts.
    shown: So many images are drawn.

  Raises:
    InputError: There is no such attack, or an epsilon is outside its range.

  Reference:
    Islam et al., "Maximizing Mutual Shape Information", Tables 2 and 3.
  """
  _check(attacks, epsilons)
  cases = _Cases(tuple(attacks), tuple(epsilons), seed)
  transfer = None
  if surrogate is not None:
    transfer = _Transfer(surrogate, classifier, cases)

  def batches() -> Generator[Batch, None, None]:
    each = cases.each(data)
    return each if transfer is None else transfer.each(each)

  def step(state: TrainState, batch: Batch) -> PyTree:
    images = batch["image"]
    if transfer is None:
      images = cases.perturb(classifier.logits, state, batch)
    logits = classifier.logits(state, images)
    labels = jnp.asarray(batch["label"])
    return {
      "mask": batch["mask"],
      "case": batch["case"],
      "right": classification.top_k_correct(logits, labels, k=1),
    }

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    names = [CLEAN, *(metric(*pair) for pair in cases.pairs)]
    return dict(zip(names, cases.accuracies(outputs), strict=True))

  def plots(outputs: Sequence[PyTree]) -> Mapping[str, comparison.Plot]:
    numbers = summarize(outputs)
    order = sorted(set(epsilons))
    return {
      name: comparison.Plot(
        "lines",
        (0.0, *order),
        [numbers[m] for m in (CLEAN, *(metric(name, e) for e in order))],
        place="epsilon (grey levels)",
        value="accuracy",
      )
      for name in attacks
    }

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    first = evaluators.first_rows(data, most=shown)
    rows = {name: first[name] for name in _READ}
    made_on = classifier.logits, state
    if transfer is not None:
      found, _ = transfer.open()
      made_on = found.logits, runtime.local(found.state)
    made = cases.strongest(*made_on, rows)
    name = jax.jit(lambda s, x: jnp.argmax(classifier.logits(s, x), axis=-1))
    named = {attack: np.asarray(name(state, x)) for attack, x in made.items()}
    return {
      "accuracy": comparison.draw(plots(outputs)),
      "images": _sheet(rows, made, named, classifier.classes),
    }

  return Evaluator(batches, step, summarize, pictures, plots)


@dataclasses.dataclass(frozen=True)
class _Cases:
  """All attacks at all epsilons; case 0 leaves the images as they are."""

  attacks: tuple[str, ...]
  epsilons: tuple[float, ...]
  seed: int

  @property
  def pairs(self) -> list[tuple[str, float]]:
    """Attack and epsilon of the cases from 1 on."""
    return [(attack, e) for attack in self.attacks for e in self.epsilons]

  def each(self, data: evaluators.Data) -> Generator[Batch, None, None]:
    """Every batch once for each case; its rows say which."""
    with contextlib.closing(data()) as batches:
      for batch in batches:
        for case in range(len(self.pairs) + 1):
          rows = np.full(len(batch["label"]), case, np.int32)
          yield {**batch, "case": rows}

  def perturb(
    self, logits_fn: LogitsFn, state: TrainState, batch: Batch
  ) -> Array:
    """The images of a batch, attacked as its case says."""
    recipes = [Recipe(0, 1, 0, 0), *(ATTACKS[name] for name, _ in self.pairs)]
    case = jnp.asarray(batch["case"])[0]
    iterations, parts, decay, random = jnp.asarray(recipes)[case]
    epsilon = jnp.asarray([0, *(e for _, e in self.pairs)], jnp.float32)[case]
    images = jnp.asarray(batch["image"], jnp.float32)
    keys = evaluators.keys_of(self.seed, batch)
    draw = lambda key: jax.random.uniform(key, images.shape[1:], minval=-1.0)
    return gradient.sign_ascent(
      lambda x: logits_fn(state, x),
      images,
      batch["label"],
      epsilon=epsilon,
      step_size=epsilon / parts,
      iterations=iterations,
      decay=decay,
      start=random * epsilon * jax.vmap(draw)(keys),
    )

  def strongest(
    self, logits_fn: LogitsFn, state: TrainState, rows: Batch
  ) -> dict[str, np.ndarray]:
    """Images by attack, at the largest epsilon."""
    perturb = jax.jit(functools.partial(self.perturb, logits_fn))
    out = {}
    for attack in self.attacks:
      number = 1 + self.pairs.index((attack, max(self.epsilons)))
      case = np.full(len(rows["label"]), number, np.int32)
      made = np.asarray(perturb(state, {**rows, "case": case}))
      out[f"{attack} {max(self.epsilons):g}"] = made
    return out

  def accuracies(self, outputs: Sequence[PyTree]) -> list[float]:
    """Top-1 by case."""
    rows = evaluators.real_rows(outputs)
    cases = range(len(self.pairs) + 1)
    right = [rows["right"][rows["case"] == case] for case in cases]
    return [float(r.mean()) if r.size else float("nan") for r in right]


class _Transfer:
  """Attacks on a surrogate, made before the step sees a batch."""

  def __init__(
    self,
    surrogate: Callable[[], Surrogate],
    classifier: evaluators.Classifier,
    cases: _Cases,
  ):
    self._surrogate, self._classifier = surrogate, classifier
    self._cases = cases
    self.open = functools.cache(self._open)

  def _open(self) -> tuple[Surrogate, Any]:
    """The surrogate, and what attacks it: `(state, batch) -> images`."""
    found = self._surrogate()
    _check_classes(found, self._classifier)
    rows = NamedSharding(found.mesh, PartitionSpec("data"))
    perturb = functools.partial(self._cases.perturb, found.logits)
    # The state is an argument: as a constant it would be part of the program.
    return found, jax.jit(perturb, out_shardings=rows)

  def each(
    self, batches: Generator[Batch, None, None]
  ) -> Generator[Batch, None, None]:
    """The batches with attacked images."""
    with contextlib.closing(batches):
      found, perturb = self.open()
      for batch in batches:
        read = {name: batch[name] for name in (*_READ, "case")}
        images = perturb(found.state, runtime.place(read, found.mesh))
        yield {**batch, "image": _own_rows(images)}


def _own_rows(images: jax.Array) -> np.ndarray:
  """The rows of this process, which are what a stream gives."""
  parts = {s.index[0].start or 0: s.data for s in images.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _check(attacks: Sequence[str], epsilons: Sequence[float]) -> None:
  there = ", ".join(ATTACKS)
  if isinstance(attacks, str) or not attacks:
    raise InputError(f"attacks must be some of {there}, got {attacks!r}.")
  if unknown := [name for name in attacks if name not in ATTACKS]:
    raise InputError(
      f"attacks: there is no {unknown[0]!r}; there are: {there}."
    )
  if not epsilons or not all(0 < epsilon <= 255 for epsilon in epsilons):
    raise InputError(
      "the attacks' epsilons must be above 0 and at most 255, in the units of "
      f"images 0..255, got {tuple(epsilons)}."
    )
  for name, values in (("attacks", attacks), ("epsilons", epsilons)):
    if len(set(values)) < len(values):
      raise InputError(f"{name} must differ, got {tuple(values)}.")


def _check_classes(
  surrogate: Surrogate, classifier: evaluators.Classifier
) -> None:
  theirs, ours = tuple(surrogate.classes), tuple(classifier.classes)
  if theirs == ours:
    return
  differ = sorted(set(theirs) ^ set(ours)) or ["their order"]
  raise InputError(
    f"the attacks' surrogate {surrogate.name} tells {len(theirs)} classes "
    f"apart and the network that is evaluated {len(ours)}; they have to be "
    f"the same ones, and differ in {few(differ)}."
  )


def _sheet(
  rows: Batch,
  made: Mapping[str, np.ndarray],
  named: Mapping[str, np.ndarray],
  classes: Sequence[str],
) -> Figure:
  """Images, and below them what each attack made of them and changed."""
  images = np.asarray(rows["image"], np.float32)
  labels = np.asarray(rows["label"])
  shown, names = [images], ["original"]
  titles = [[classes[n] if 0 <= n < len(classes) else "" for n in labels]]
  for attack, changed in made.items():
    shown += [changed, 127.5 + 10 * (changed - images)]
    names += [attack, "change x 10"]
    titles += [[classes[n] for n in named[attack]], [""] * len(labels)]
  return report.image_sheet(shown, titles=titles, row_names=names)
