"""Eight simulated devices, and as little compiling as the tests allow."""

import gc
import os
import pathlib
import tempfile

# Before JAX is imported for the first time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(tempfile.gettempdir()) / "jaxshape_test_cache"),
)
# The compiler warns of every program that it finds in the cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

# Where a formula is compared with a peer, XLA compiles as it does for users.
OPTIMIZED = ("attacks", "filters", "losses", "metrics", "explanations")


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(request):
  area = request.path.parent.name
  jax.config.update("jax_disable_most_optimizations", area not in OPTIMIZED)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """Lets go of compiled programs before the process may map no more memory.

  Each program takes several of the 65,530 areas that Linux allows, and when
  they run out the compiler crashes.
  """
  yield
  areas = pathlib.Path("/proc/self/maps")
  if areas.exists() and len(areas.read_bytes().splitlines()) > 20_000:
    jax.clear_caches()
    gc.collect()
