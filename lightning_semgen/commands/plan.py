"""`lightning plan`: what a fit will need, as lines for a person or JSON for a script."""

import json
from typing import Literal

import torch
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from lightning.pytorch.cli import LightningArgumentParser

from lightning_semgen.errors import UserError
from lightning_semgen.hardware import GPUS
from lightning_semgen.resources import Setting, plan_fit
from lightning_semgen.stages.base import Stage
from lightning_semgen.trainer_cli import SemGenCLI, run


class PlanCLI(SemGenCLI):
    """Builds the stage of a config on the meta device, without a trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpus", type=PositiveInt | None, help="default: trainer.devices × trainer.num_nodes")
        parser.add_argument("--gpu", type=Literal[tuple(GPUS)], default="h200", help="kind of GPU")
        parser.add_argument("--mfu", type=OpenUnitInterval, default=0.4, help="share of the GPU's peak that is reached")
        parser.add_argument("--json", action="store_true", help="bytes, FLOPs and seconds, for scripts")

    def instantiate_classes(self) -> None:
        with torch.device("meta"):
            self.model = self.parser.instantiate_classes(self.config).model


def plan(arguments: list[str]) -> None:
    """Says what memory, FLOPs and time the fit of a config needs: -c CONFIG --gpus 8 --gpu h200."""
    cli = run(arguments, execute=False, kind=PlanCLI)
    options, data = cli.config, cli.config.data
    if not isinstance(cli.model, Stage):
        raise UserError(f"A plan is made for SemanticStage and LatentStage, not for {type(cli.model).__name__}.")
    setting = Setting.of(options.trainer, data.batch_size, options.gpus)
    facts = plan_fit(cli.model, setting, data.encoded is not None, options.gpu, options.mfu)
    print(json.dumps(facts, indent=1) if options.json else table(facts))


def table(facts: dict) -> str:
    """The plan as readable lines."""
    setting, card = facts["setting"], GPUS[facts["setting"]["gpu"]]
    batches, wait = facts["largest_batch"], facts["total_seconds"]
    steps = f"{setting['gpus']} × {setting['batch_size'] * setting['accumulate']} clips"
    rows = [
        ("machine", f"{setting['gpus']} × {setting['gpu']}, {setting['strategy']}, {setting['precision']}"),
        ("parameters", ", ".join(f"{number(value)} {name}" for name, value in facts["parameters"].items())),
        ("tokens of a clip", ", ".join(f"{value:,} {name}" for name, value in facts["tokens"].items())),
        ("FLOPs of a step", f"{number(sum(facts['flops'].values()))} for {steps}"),
        *((f"  {name}", number(value)) for name, value in facts["flops"].items()),
        ("time of a step", f"{facts['step_seconds']:.3g} s at {setting['mfu']:.0%} of {number(card.flops)}FLOP/s"),
        (f"{setting['max_steps']:,} steps", f"{wait / 3600:.3g} h" if wait else "trainer.max_steps is not set"),
        ("memory of a GPU", f"{gb(facts['memory_total'])} of {gb(facts['memory_usable'])}"),
        *((f"  {name}", gb(value)) for name, value in facts["memory"].items()),
        ("largest batch of a GPU", f"{batches['kept']} clips; {batches['checkpointed']} with checkpoint_blocks"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([*(f"{name:{width}}{value}" for name, value in rows), verdict(facts)])


def verdict(facts: dict) -> str:
    """Whether it fits, and what to change if not. A clip is on one GPU: nothing splits its tokens."""
    setting, kept = facts["setting"], facts["activations_per_clip"]
    clip = (
        f"There is no context parallelism: a clip of {facts['clip_seconds']:.3g} s has to fit one GPU, and its"
        f" activations are {gb(kept['kept'])}, or {gb(kept['checkpointed'])} with model.checkpoint_blocks."
    )
    if facts["fits"]:
        return f"It fits. {clip}"
    best = max(facts["largest_batch"].values())
    if best == 0:
        more = "more or " if min(kept.values()) < facts["memory_usable"] else ""  # which share weights, not a clip
        return f"It does not fit, nor does a batch of 1. {clip} Take {more}larger GPUs, or a shorter clip."
    with_blocks = "" if facts["largest_batch"]["kept"] == best else " with model.checkpoint_blocks"
    return f"It does not fit: data.batch_size {min(best, setting['batch_size'])}{with_blocks} does. {clip}"


def number(value: float) -> str:
    """1.42e9 as 1.42 G."""
    for power, unit in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {unit}"
    return f"{value:,.0f}"


def gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
