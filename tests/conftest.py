"""Settings of all tests."""

import os
import tempfile

# Eight devices, so that meshes are real; set before JAX starts.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Many tests compile the same program; most of the time would go there. New for each
# session, and shared with the processes that tests start.
_CACHE = tempfile.TemporaryDirectory(prefix='ism-jax-tests-')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
