"""Several processes as one run: they start, agree, stop and fail together.

Each process runs the same program on devices of its own. Numbers are agreed on
by the devices, between steps; everything else goes through the key-value store
that JAX keeps at process 0. Whatever ends one process ends all of them within a
minute, and each says on one line who was the first to go.
"""

import collections
import contextlib
import ctypes
import faulthandler
import functools
import importlib.util
import itertools
import json
import logging
import math
import os
import pathlib
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from absl import flags
import jax
from jax._src import distributed  # Orbax, too, has the store from there.
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxshape.errors import InputError

# What a run exits with that can go on: start me again.
AGAIN = 75
# After so many seconds a process that is silent counts as dead for process 0,
# which can name it, and somewhat later for JAX, which ends all in any case.
SILENCE, HEARTBEAT = 25, 40
# So long the processes wait for each other at the start.
START = 300
# So long those that are left wait for a sign of the others.
_ROLL_CALL = 5
_PARTED = b"."
_GONE = (
  "it is gone without a word; start all of them again to go on from the last "
  "checkpoint."
)
_DAY = 24 * 3600 * 1000  # In milliseconds, as the store counts.
_ENDED, _BEATS, _ALARM = "jaxshape/ended/", "jaxshape/beat/", "jaxshape/alarm"


class StartError(InputError):
  """The processes did not find each other; JAX's threads may still hang."""


def define_flags(values: flags.FlagValues) -> None:
  """Adds the flags that `initialize` takes."""
  flags.DEFINE_string(
    "coordinator", None, "Host:port of process 0.", flag_values=values
  )
  flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0.", flag_values=values
  )
  flags.DEFINE_integer(
    "num_processes",
    None,
    "How many processes train together; without it, as TPU pods, SLURM and "
    "Open MPI say.",
    flag_values=values,
  )


def initialize(
  coordinator: str | None = None,
  process_id: int | None = None,
  num_processes: int | None = None,
) -> None:
  """Joins the other processes, if there are any.

  Has to come before anything asks JAX for its devices.

  Args:
    coordinator: Host and port where process 0 listens.
    process_id: Number of this process.
    num_processes: How many there are; 1 for this one alone, whatever the
      machine says.

  Raises:
    InputError: The arguments do not fit.
    StartError: The others did not come.
  """
  given = {
    "coordinator": coordinator,
    "process_id": process_id,
    "num_processes": num_processes,
  }
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if num_processes == 1 and coordinator is None and not process_id:
    return
  found = detected() if len(missing) == len(given) else ""
  if len(missing) == len(given) and not found:
    return
  options: dict[str, Any] = {}
  where = f"what {found} names"
  if not found:
    _check(coordinator, process_id, num_processes, missing)
    where = f"--coordinator={coordinator}"
    options = {
      "coordinator_address": coordinator,
      "process_id": process_id,
      "num_processes": num_processes,
      # The flags say all; a launcher's variables may be of something else.
      "cluster_detection_method": "deactivate",
    }
  # It would swallow SIGTERM; `Agreement` is what hears it.
  jax.config.update("jax_enable_preemption_service", False)
  refusal = (
    f"the processes did not find each other within {START} s at {where}; start "
    "all of them, with the same --coordinator=host:port and --num_processes "
    "and each with its own --process_id, or one alone with --num_processes=1."
  )
  _starting.append(refusal)
  _end_on_abort()
  try:
    jax.distributed.initialize(
      **options,
      initialization_timeout=START,
      heartbeat_timeout_seconds=HEARTBEAT,
    )
  except Exception as error:
    text = " ".join(str(error).split())[:200]
    raise StartError(f"{refusal} {text}") from error
  _starting.clear()
  if count() == 1:  # A pod's software, and one host.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
  else:
    lines = _Lines()
    _keep.append(lines)
    threading.Thread(target=_watch, args=(lines,), daemon=True).start()


def _check(
  coordinator: str | None,
  process_id: int | None,
  num_processes: int | None,
  missing: list[str],
) -> None:
  if missing:
    raise InputError(
      "--coordinator, --process_id and --num_processes go together; "
      f"{' and '.join(missing)} must be given, too."
    )
  assert coordinator is not None
  assert process_id is not None
  assert num_processes is not None
  if not re.fullmatch(r"\S+:\d{1,5}", coordinator):
    raise InputError(
      f"--coordinator must be the host:port of process 0, got {coordinator!r}."
    )
  if num_processes < 1 or not 0 <= process_id < num_processes:
    raise InputError(
      "--process_id must be in 0..num_processes - 1, got "
      f"--process_id={process_id} --num_processes={num_processes}."
    )


def detected() -> str:
  """What says that there may be several processes; empty if nothing does."""
  env = os.environ

  def number(name: str) -> int:
    return int(env[name]) if env.get(name, "").isdigit() else 0

  # Within a job, but beside `srun`, there is one process of a script.
  if "SLURM_STEP_NODELIST" in env and number("SLURM_NTASKS") > 1:
    return "SLURM"
  if number("OMPI_COMM_WORLD_SIZE") > 1:
    return "Open MPI"
  if "MEGASCALE_COORDINATOR_ADDRESS" in env:
    return "MEGASCALE_COORDINATOR_ADDRESS"
  if "," in env.get("TPU_WORKER_HOSTNAMES", ""):
    return "TPU_WORKER_HOSTNAMES"
  # Only the metadata of a virtual machine tell a pod from a single host; on
  # machines without them (Colab) this variable is set.
  chips = [*pathlib.Path("/dev").glob("accel[0-9]*")]
  chips += pathlib.Path("/dev/vfio").glob("[0-9]*")
  library = importlib.util.find_spec("libtpu") is not None
  chosen = env.get("JAX_PLATFORMS", "tpu")
  if chips and library and "tpu" in chosen and "TPU_SKIP_MDS_QUERY" not in env:
    return "TPU metadata"
  return ""


def index() -> int:
  """Number of this process, without asking for devices."""
  return distributed.global_state.process_id


def count() -> int:
  """How many processes there are, without asking for devices."""
  return distributed.global_state.num_processes or 1


def name(number: int | None = None) -> str:
  """What a process is called in messages; this one by default."""
  return f"process {index() if number is None else number} of {count()}"


def gather(value: Any) -> list[Any]:
  """The values of all processes, by number; all have to call it.

  Args:
    value: Whatever JSON can say.
  """
  if count() == 1:
    return [value]
  client, key = _client(), f"jaxshape/gather/{next(_gathered)}"
  client.key_value_set(f"{key}/{index()}", json.dumps(value))
  return [
    json.loads(client.blocking_key_value_get(f"{key}/{i}", _DAY))
    for i in range(count())
  ]


_gathered = itertools.count()


class Agreement:
  """The largest of a number that each process says at each step.

  The answer is of two steps ago, which the loop has waited for anyway, so that
  no device waits; it is the same one on all processes at the same step.
  """

  def __init__(self, mesh: Mesh):
    """Compiles nothing yet; `mesh` holds all devices."""
    self._pending: collections.deque[jax.Array] = collections.deque()
    devices = Mesh(mesh.devices.reshape(-1), "all")
    self._each = NamedSharding(devices, PartitionSpec("all"))
    whole = NamedSharding(devices, PartitionSpec())
    self._largest = jax.jit(lambda said: said.max(), out_shardings=whole)

  def __call__(self, number: int) -> int:
    """Says a number of this step, 0 or more; gives 0 for the first two."""
    if count() == 1:
      return number
    self._pending.append(self._largest(self._everywhere(number)))
    return int(self._pending.popleft()) if len(self._pending) > 2 else 0

  @functools.cache  # noqa: B019 (there is one, and it says two numbers)
  def _everywhere(self, number: int) -> jax.Array:
    said = np.full(jax.local_device_count(), number, np.int32)
    return jax.make_array_from_process_local_data(self._each, said)


def alive(seconds: float, *, waiting: bool = False) -> None:
  """Says that this process moves; if it does not say so again, it is ended.

  A process that hangs keeps the others waiting for ever while JAX's heartbeats,
  which come from another thread, go on.

  Args:
    seconds: Until all threads' stacks are printed and the process exits.
    waiting: Whether it now waits for the others, of which the one that hangs
      shall be the first to end, so that it is named.
  """
  if count() > 1:
    seconds += 4 * _ROLL_CALL if waiting else 0
    _until[0] = time.monotonic() + seconds, seconds
    # Where not even the watcher can move.
    faulthandler.dump_traceback_later(seconds + 2 * _ROLL_CALL, exit=True)


_until = [(math.inf, 0.0)]


def finish() -> None:
  """Waits until all processes are here, and parts from them."""
  if count() == 1:
    return
  for lines in _keep:
    if isinstance(lines, _Lines):
      lines.part()
  try:
    _client().wait_at_barrier("jaxshape/finish", _DAY)
  except jax.errors.JaxRuntimeError as error:
    fail(error)
  _finished.set()
  faulthandler.cancel_dump_traceback_later()
  jax.distributed.shutdown()


def fail(
  error: BaseException, text: str | None = None, code: int = AGAIN
) -> NoReturn:
  """Ends this process and, soon after, all others; says who was the first.

  Args:
    error: What happened here.
    text: In one line, if it began here; None if it may be that another process
      was lost.
    code: What to exit with.
  """
  if text is not None:
    say(text)
  _end(text, code, error)


def say(text: object) -> None:
  """Prints an error in one line, with this process's name if there are more."""
  line = " ".join(str(text).split())
  who = f"{name()}: " if count() > 1 else ""
  print(f"error: {who}{line}", file=sys.stderr, flush=True)  # noqa: T201


_ending = threading.Lock()
_aborted, _finished = threading.Event(), threading.Event()
_lost: set[int] = set()


def _client() -> Any:
  client = distributed.global_state.client
  assert client is not None
  return client


def _end(text: str | None, code: int, error: BaseException | None) -> NoReturn:
  """Tells the others, hears from them, says what happened and exits."""
  if not _ending.acquire(blocking=False):
    time.sleep(4 * _ROLL_CALL)  # Another thread is at it.
    os._exit(code)
  # Whatever the store does now, this is the end.
  faulthandler.dump_traceback_later(4 * _ROLL_CALL, exit=True)
  # Unless the store, which process 0 has, answers.
  causes = {0: (_GONE, AGAIN)} if index() else {}

  def call() -> None:
    nonlocal causes
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      causes = _roll_call(text, code)

  # Without process 0, some calls of the store never come back.
  calling = threading.Thread(target=call, daemon=True)
  calling.start()
  until = time.monotonic() + _ROLL_CALL + 3
  while calling.is_alive() and 0 not in _lost and time.monotonic() < until:
    calling.join(0.1)
  causes.pop(index(), None)
  if text is not None:
    pass  # It was said.
  elif causes:
    first = min(causes)
    code = causes[first][1]
    say(f"ended because {name(first)} failed: {causes[first][0]}")
  elif _aborted.is_set():
    code = 128 + signal.SIGABRT  # As shells report it.
    say("aborted by a library; what it said is above.")
  else:
    said = " ".join(str(error or "one of them gave up.").split())[:300]
    say(f"lost touch with the others, though all of them answer: {said}")
  sys.stdout.flush()
  os._exit(code)


def _roll_call(text: str | None, code: int) -> dict[int, tuple[str, int]]:
  """What ended the processes that began it, in words and as a code.

  They say so themselves, or others do for those that are gone.
  """
  client, until = _client(), time.monotonic() + _ROLL_CALL
  for number in _lost:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # It said why.
      client.key_value_set(f"{_ENDED}{number}", json.dumps([_GONE, AGAIN]))
  own = json.dumps([text, code])
  client.key_value_set(f"{_ENDED}{index()}", own, allow_overwrite=True)
  client.key_value_set(_ALARM, "", allow_overwrite=True)
  while True:
    said = {
      int(key.rpartition("/")[2]): json.loads(value)
      for key, value in client.key_value_dir_get(_ENDED)
    }
    causes = {i: (t, c) for i, (t, c) in said.items() if t is not None}
    missing = set(range(count())) - set(said)
    known = not missing or (causes and index())
    if known or time.monotonic() > until:
      break
    time.sleep(0.1)
  if index() == 0:  # The store ends with this process; others still read it.
    time.sleep(1)
  return causes or dict.fromkeys(missing, (_GONE, AGAIN))


def _watch(lines: "_Lines") -> None:
  """Waits for another process to fail, also while this one computes."""
  client, heard = _client(), {}
  for beat in itertools.count():
    _lost.update(lines.ended(1.0))
    until, seconds = _until[0]
    if time.monotonic() > until and not _finished.is_set():
      faulthandler.dump_traceback()
      stuck = TimeoutError(f"no step and no batch for {seconds:.0f} s")
      fail(stuck, f"{stuck}; its stacks are above. Start all of them again.")
    if 0 in _lost:  # With the store; what one asks it now may never come back.
      _end(None, AGAIN, None)
    try:
      client.key_value_set(
        f"{_BEATS}{index()}", str(beat), allow_overwrite=True
      )
      if index() == 0:
        _lost.update(_silent(client.key_value_dir_get(_BEATS), heard))
      if not _lost:
        client.key_value_try_get(_ALARM)
    except jax.errors.JaxRuntimeError as error:
      if "NOT_FOUND" in str(error) and not _aborted.is_set():
        continue
      _lost.update(lines.ended(0.2))
    if _finished.is_set():
      return
    _end(None, AGAIN, None)


def _silent(
  beats: list[tuple[str, str]], heard: dict[int, tuple[str, float]]
) -> list[int]:
  """Those that have stopped beating; keeps in `heard` when each did."""
  now = time.monotonic()
  for key, beat in beats:
    number = int(key.rpartition("/")[2])
    if heard.get(number, ("", 0.0))[0] != beat:
      heard[number] = (beat, now)
  return [n for n, (_, since) in heard.items() if now - since > SILENCE]


class _Lines:
  """A connection of each process with process 0.

  The system closes it when a process dies, which the collectives may never
  notice and the beats only late. Where a firewall is between, there is none.
  """

  def __init__(self) -> None:
    self._server: socket.socket | None = None
    self._ends: dict[socket.socket, int] = {}
    self._parted: list[socket.socket] = []
    try:
      self._open()
    except OSError as error:
      logging.warning("%s: no line to process 0: %s", name(), error)

  def _open(self) -> None:
    client, key = _client(), "jaxshape/line"
    if index() == 0:
      self._server = socket.create_server(("", 0))
      self._secret = secrets.token_bytes(16)
      port = self._server.getsockname()[1]
      client.key_value_set(key, f"{port} {self._secret.hex()}")
      return
    port, secret = client.blocking_key_value_get(key, START * 1000).split()
    address = distributed.global_state.coordinator_address or ""
    host = address.rpartition(":")[0].strip("[]")
    line = socket.create_connection((host, int(port)), timeout=10)
    line.sendall(bytes.fromhex(secret) + index().to_bytes(4, "big"))
    self._ends[line] = 0

  def ended(self, seconds: float) -> list[int]:
    """Whose lines end within some seconds, other than by parting."""
    out = []
    listening = [self._server] if self._server else []
    ready, _, _ = select.select([*listening, *self._ends], [], [], seconds)
    for line in ready:
      if line is self._server:
        self._accept(line)
        continue
      try:
        said = line.recv(1)
      except OSError:
        said = b""
      number = self._ends.pop(line)
      if said == _PARTED:  # Kept open, as its end would alarm the other.
        self._parted.append(line)
      else:
        out.append(number)
    if not (listening or self._ends or ready):
      time.sleep(seconds)  # `select` has nothing to wait for on some systems.
    return out

  def _accept(self, server: socket.socket) -> None:
    line, _ = server.accept()
    line.settimeout(10)
    with contextlib.suppress(OSError):
      said = line.recv(20, socket.MSG_WAITALL)
      if len(said) == 20 and secrets.compare_digest(said[:16], self._secret):
        self._ends[line] = int.from_bytes(said[16:], "big")
        return
    line.close()

  def part(self) -> None:
    """Says that what comes is no failure."""
    for line in (*self._ends, *self._parted):
      with contextlib.suppress(OSError):
        line.sendall(_PARTED)


def _end_on_abort() -> None:
  """Lets the watcher say who is gone when JAX aborts this process.

  JAX does so from a thread of its own when process 0 or a heartbeat is missed,
  and can call nothing of Python's, so the signal is caught in C.
  """

  def note(_: int) -> None:
    if _starting:
      say(_starting[0])
      os._exit(1)
    _aborted.set()
    time.sleep(4 * _ROLL_CALL)  # The watcher ends the process long before.
    os._exit(AGAIN)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(note)
  _keep.append(handler)
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  libc.signal.restype = ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


# What C may call has to live; and what to say if the start is aborted.
_keep: list[Any] = []
_starting: list[str] = []
