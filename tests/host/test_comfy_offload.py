"""Networks of the host whose blocks wait in host memory or in a file (probe_offload.py)."""

from __future__ import annotations

import json

from server import run_probe


def test_the_student_is_the_same_to_the_last_bit(tmp_path):
    """Two steps of LADD on SD 1.5, FLUX and Wan, and of Diffusion2GAN with a critic of its own on SDXL."""
    run_probe("probe_offload.py", tmp_path)
    found = json.loads((tmp_path / "offload.json").read_text())
    students = found["same_student"]
    assert len(students) == 12 and {name: sides for name, sides in students.items() if sides != [True, True]} == {}
    assert not list(tmp_path.glob("offloaded_*"))
    # On a CPU the mapped weights are MODEL's too, which computes as before; but for those that a LoRA of it changes.
    plain, patched = found["one_memory"]["plain"], found["one_memory"]["patched"]
    assert plain["shared"] == plain["weights"] > patched["shared"] > 0
    for of in (plain, patched):
        assert of["same"] and of["in the old place"] == 0
