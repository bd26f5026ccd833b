"""Who teaches: the model itself, told here how it is guided."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Checked, setting


@dataclass(frozen=True)
class TeacherConfig(Checked):
    """The teacher of a student, where it is not just the model as it made the dataset."""

    guidance: float = setting(
        0.0,
        "Guidance scale of the teacher in the distillation, consistency and distribution_matching terms. 0: that of "
        "the dataset, which is 1 for own pictures.",
        decides=False,
        added=True,
        low=0,
        high=100,
    )
