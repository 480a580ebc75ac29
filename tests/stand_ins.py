"""Programs that stand in for the tools of a cluster."""

import os
from pathlib import Path
import sys


def path_of(*folders):
    """A PATH with `folders`, this environment and the system, in this order."""
    own = Path(sys.executable).parent
    return os.pathsep.join([*map(str, folders), str(own), os.environ['PATH']])


def stand_in(folder, name, script):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\nFOLDER={folder}\n{script}')
    path.chmod(0o755)
    return path
