"""Says in a model card how other programs sample as `cmscale sample` does."""

from collections.abc import Iterator
from contextlib import suppress
from typing import assert_never

from cmscale import __version__
from cmscale.config import MethodSection
from cmscale.config.agreement import OPENAI
from cmscale.consistency.sampler import default_sigmas
from cmscale.errors import UserError
from cmscale.export.target import Format
from cmscale.interop import pipeline_timesteps


def usage(format: Format, method: MethodSection, *, file: str) -> Iterator[str]:
    """How the project of a format samples as `cmscale sample` does."""
    match format:
        case "safetensors":
            yield from _with_cmscale(method, file)
        case "openai":
            yield from _with_openai(method)
        case "diffusers":
            yield from _with_diffusers(method)
        case _:
            assert_never(format)


def _with_cmscale(method: MethodSection, file: str) -> Iterator[str]:
    """How this project loads the file, whose metadata hold the config."""
    steps = ", steps=1" if method.facts.sampler == "multistep" else ""  # others take the steps of their training
    yield "## Use"
    yield ""
    yield "```python"
    yield "import cmscale"
    yield ""
    yield f'model = cmscale.load("{file}")'
    yield f"pictures = model.sample(4{steps})  # PIL images"
    yield "```"
    yield ""
    yield f"On the command line: `cmscale sample {file} --samples 4 --out samples.npz --grid grid.png`."
    yield f"`pip install .` in a checkout of cmscale {__version__} or newer installs both."
    yield ""


def _with_openai(method: MethodSection) -> Iterator[str]:
    """The arguments with which OpenAI's scripts compute the same function of the same weights."""
    mode = "consistency_distillation" if method.facts.preconditioning == "consistency" else "edm"
    yield "## Use with OpenAI's code"
    yield ""
    yield f"`--training_mode {mode} --sigma_min {method.sigma_min:g} --sigma_max {method.sigma_max:g}`"
    yield ""
    for caution in unlike_openai(method):
        yield f"{caution}."
        yield ""


def unlike_openai(method: MethodSection) -> list[str]:
    """What no argument of OpenAI's scripts sets as this method has it, one line each."""
    return [
        f"OpenAI's code takes {key} {theirs:g}, this model was trained with {ours:g}: as it is, that code computes "
        f"another function of these weights; construct its KarrasDenoiser with {key}={ours:g}"
        for key in ("sigma_data", "rho")
        if (ours := getattr(method, key)) != (theirs := getattr(OPENAI, key))
    ]


def _with_diffusers(method: MethodSection) -> Iterator[str]:
    """How diffusers' pipeline samples at the times that `cmscale sample` takes by default."""
    found = _timesteps(method)
    yield "## Use with diffusers"
    yield ""
    yield "```python"
    yield "import diffusers"
    yield ""
    yield 'pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(".")  # this folder, or its name on the hub'
    for timesteps, _, _ in list(found.values())[:1]:
        yield f"pictures = pipeline(batch_size=4, num_inference_steps=None, timesteps={timesteps}).images"
    yield "```"
    yield ""
    yield "From the same noise these timesteps give the images of `cmscale sample`:"
    yield ""
    for steps, (timesteps, times, sigmas) in found.items():
        line = f"- `--steps {steps}`: `timesteps={timesteps}`"
        if any(abs(time / sigma - 1) > 1e-6 for time, sigma in zip(times, sigmas, strict=True)):
            given = ",".join(f"{time:.10g}" for time in times)
            line += (
                " is the nearest that the scheduler has; the same images come of "
                f"`cmscale sample --sampling-times {given}`"
            )
        yield line
    yield ""


def _timesteps(method: MethodSection) -> dict[int, tuple[list[int], list[float], list[float]]]:
    """By number of steps the scheduler's timesteps, the times that they stand for, and those of `cmscale sample`."""
    found = {}
    for steps in (1, 2):
        with suppress(UserError):  # no second time is known for this range of noise
            sigmas = default_sigmas(method, steps).tolist()
            found[steps] = (*pipeline_timesteps(method, sigmas), sigmas)
    return found
