"""A config file that reads a resolved config, such as a run's `config.json`.

python -m ism_jax.train --config ism_jax/resolved_config.py:FOLDER/config.json
"""

from ism_jax import config
from ism_jax.runtime import paths


def get_config(path: str):
    """The config of a JSON file that holds the text of `config.to_json`."""
    return config.from_json(paths.from_user(path, '--config').read_text())
