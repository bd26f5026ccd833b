"""Write one GGUF file of the tiny FLUX: probe_gguf_file.py FOLDER FORMAT."""

import sys

KIND = sys.argv[2]  # entering the host takes the arguments
from as_host import folder  # noqa: E402

# isort: split
from quantized_files import gguf_files  # noqa: E402

gguf_files(KIND, folder)
