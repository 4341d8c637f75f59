"""Names the situations of commands, in the words of their messages: see `Use`.

`source` says what a SOURCE is (`cmscale.runs.source_kind` finds out); `model`, `classes`, `randomness` follow from its
config and the request.
"""

from collections.abc import Iterable

from cmscale.errors import UserError

RUN = "a run"
CHECKPOINT = "a checkpoint folder"
EXPORTED = "an exported file"
DIFFUSERS = "a diffusers folder"
OPENAI = "an OpenAI .pt"
NVLABS = "an NVlabs .pkl"
BARE = "weights without a config"
SAMPLES = "finished samples"

MODELS = (RUN, CHECKPOINT, EXPORTED, DIFFUSERS, OPENAI, NVLABS, BARE)
WITH_WEIGHTS_TO_CHOOSE = (RUN, CHECKPOINT)
WITHOUT_ANY_CONFIG = (OPENAI, NVLABS, BARE)
WITHOUT_CONFIG = (OPENAI, NVLABS, DIFFUSERS, BARE)
"""A diffusers folder that cmscale wrote has a config, and is refused another one when it is read."""

DIFFUSION_MODEL = "a diffusion model"
CONSISTENCY_MODEL = "a consistency model"
DISTILLED_MODEL = "a model that is sampled by Euler steps"
MODEL_OF_SAMPLER = {"ode": DIFFUSION_MODEL, "multistep": CONSISTENCY_MODEL, "euler": DISTILLED_MODEL}
"""By `method.facts.sampler`."""

CONDITIONAL = "a class-conditional model"
UNCONDITIONAL = "an unconditional model"

DRAWN = "samples that draw noise"
ALL_GIVEN = "samples whose only noise is that of --noise"

SLURM = "Slurm"
THIS_MACHINE = "this machine"

AS_UINT8 = "samples written as uint8"
AS_FLOAT32 = "raw samples"
AS_NPZ = "samples in an .npz"
AS_FILES = "samples in PNG files"

NEW_RUN = "a new run"
RUN_IN_RUNS_DIR = "a run in --runs-dir"
EXPORTED_RUN = "a run that is continued from its exports"
RUN_ELSEWHERE = "a run that is named by its own folder"

OWN_CONFIG = "the config that SOURCE has"
GIVEN_CONFIG = "that of --config"


def overriding(config: str | None, overrides: Iterable[str] = ()) -> str:
    """What `key=value` would override: `overriding` in a situation.

    Raises:
        UserError: one of them is no such text, but a word too many.
    """
    if stray := next((text for text in overrides if "=" not in text), None):
        raise UserError(f"{stray}: one argument too many; values of --config are written key=value")
    return OWN_CONFIG if config is None else GIVEN_CONFIG
