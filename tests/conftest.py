"""Eight simulated devices, and as little compiling as the tests allow."""

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
OPTIMIZED = ("filters", "losses", "metrics", "explanations")


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(request):
  area = request.path.parent.name
  jax.config.update("jax_disable_most_optimizations", area not in OPTIMIZED)
