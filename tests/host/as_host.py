"""Imported first by the probes: makes this process the host's. The script's argument is the folder for its files."""

import sys
from pathlib import Path

from launch import enter_host

folder = Path(sys.argv[1])
enter_host()
