"""A run as the planner is asked for it, and the same step with real tensors; inside the host's Python."""

from host_tools import latents

# isort: split
from types import SimpleNamespace

import tiny_models
from pack.distill_core.methods.components import Components, DiscriminatorConfig
from pack.distill_core.training.ledger import Ledger
from pack.distill_core.training.loop_config import TrainConfig
from pack.distill_core.training.plan import Shapes, counted_step
from pack.distill_core.training.run import RunConfig, StudentConfig, assemble
from pack.nodes.host.backend import training_backend
from pack.nodes.host.parts import Parts


def asked(model, family: str, method, **student):
    """A request as `plan_of` reads it, with what decides the run and the shapes of its dataset."""
    with training_backend(model) as backend:
        cond = backend.cond(tiny_models.conditioning(family, 1))
        levels = method.levels(backend.process) if method.weight("pairs") else ()
    heads, train = DiscriminatorConfig(width=8, blocks=1), TrainConfig(batch_size=4)
    config = RunConfig(method, train, StudentConfig(4), {"base": "", "dataset": ""}, heads)
    request = SimpleNamespace(
        model=model, train=train, student=config.student, parts=Parts(), checkpointing=True, other_teacher=None
    )
    return request, config, Shapes(tuple(latents(family).shape[1:]), cond, levels, 2.0)


def counted(request, config, shapes) -> int:
    """The same step with real tensors."""
    with training_backend(request.model) as backend:
        ledger = Ledger()
        with ledger:
            run = assemble(config, Components(backend), shapes)
            counted_step(ledger, run)
        return ledger.peak
