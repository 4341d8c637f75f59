"""Decides from two configs whether their networks agree: a teacher with its student, first weights with a new run."""

from cmscale.config.methods.base import MethodSection
from cmscale.config.methods.edm import EDM
from cmscale.config.models import Config, leaves, unequal
from cmscale.errors import UserError

OPENAI = EDM.model_validate({"kind": "edm"})
"""The method of OpenAI's files, which hold no config: their code fixes sigma_data 0.5 and noise from 0.002 to 80."""


def check_teacher(teacher: Config, student: Config, *, origin: str) -> None:
    """Checks that a student may follow a teacher and start with its weights.

    Args:
        origin: The teacher, for messages.

    Raises:
        UserError: the teacher is of a method that the student can't follow, or another network, or trained with another
            preconditioning or for a narrower range of noise.
    """
    if not student.method.may_follow(teacher.method):
        raise UserError(
            f"method.teacher: {origin} has method.kind {teacher.method.kind}; give {student.method.teacher_wanted}"
        )
    check_weights(teacher, student, key="method.teacher", origin=origin)
    check_range(teacher.method, student.method, key="method.teacher", origin=origin)


def check_openai_teacher(config: Config) -> None:
    """Checks a config whose teacher is an OpenAI `.pt`, which holds weights alone.

    Raises:
        UserError: the config requests what such a file does not have.
    """
    setting = config.method.teacher_choice
    assert setting is not None, f"{config.method.kind} has no teacher"
    check_foreign_teacher(config.method, origin=setting.source)
    check_openai_weights(config, key="method.teacher", origin=setting.source, named=setting.weights_name)
    check_range(OPENAI, config.method, key="method.teacher", origin=setting.source)


def check_foreign_teacher(student: MethodSection, *, origin: str) -> None:
    """Checks that a student may follow a diffusion model of another project.

    Raises:
        UserError: it follows models of another method.
    """
    if not student.may_follow(OPENAI):
        raise UserError(f"method.teacher: {origin} is another project's; give {student.teacher_wanted}")


def check_openai_weights(config: Config, *, key: str, origin: str, named: str | None) -> None:
    """Checks that weights without a config, in a format of another project, may be a network's first weights.

    Args:
        key: What names the weights, for messages.
        origin: Their source, for messages.
        named: The name of weights that the config requests.

    Raises:
        UserError: they may not.
    """
    if config.method.embeds_angle:
        raise UserError(f"{key}: {origin} embeds log_sigma, this config's network the angle; give other weights")
    if named is not None:
        raise UserError(f"{key}: {origin} holds unnamed weights, the config asks for {named}; leave that out")
    check_sigma_data(OPENAI, config.method, key=key, origin=origin)


def check_weights(first: Config, new: Config, *, key: str, origin: str) -> None:
    """Checks that the weights of one network may be the first weights of another.

    Args:
        key: What names the weights, for messages.
        origin: The weights' source, for messages.

    Raises:
        UserError: it is another network, embeds the time otherwise, or is scaled by another sigma_data.
    """
    if first.method.embeds_angle != new.method.embeds_angle:
        its, ours = (("log_sigma", "angle")[each.method.embeds_angle] for each in (first, new))
        raise UserError(
            f"{key}: the network of {origin} embeds {its}, this config's embeds {ours}; set "
            f"method.teacher_time_embedding={its} (scd; sct with method.start=teacher), or give other weights"
        )
    if different := unequal(network_settings(first), network_settings(new)):
        raise UserError(
            f"{key}: {origin} is another network ({'; '.join(different)}); change the model section to that network's"
        )
    check_sigma_data(first.method, new.method, key=key, origin=origin)


def check_branch(parent: Config, branch: Config, *, step: int, origin: str) -> None:
    """Checks that a run with other values may go on from a checkpoint of another: the one place that says which.

    What weights, moments and averages mean must stay: the network, the method, the scaling of the network's inputs and
    outputs, and whose weights the teacher's are. Everything else may differ: learning rate and optimizer, batch, seed
    and data, length and schedules, noise and weighting of the loss, averages, dropout, precision.

    Args:
        step: Of the checkpoint.
        origin: The parent, for messages.

    Raises:
        UserError: a value differs that must not, or nothing is left to train.
    """
    if different := unequal(_meaning(parent), _meaning(branch)):
        raise UserError(
            f"--branch {origin}: {'; '.join(different)}: a branch goes on with its parent's network, method and "
            "scaling; start a new run"
        )
    if new := sorted(set(branch.ema.lengths) - set(parent.ema.lengths)):
        raise UserError(
            f"--branch {origin}: ema.lengths: {new[0]:g} is not among its parent's {list(parent.ema.lengths)}, and "
            "such an average counts all steps from the first; leave it out"
        )
    if branch.train.total_steps <= step:
        raise UserError(
            f"--branch {origin}: step {step} is the end with train.total_steps {branch.train.total_steps}; "
            "increase it, or branch off an earlier step"
        )
    scales = [
        each.method.schedule(step, total_steps=each.method.schedule_length(each.train.total_steps)).num_scales
        for each in (parent, branch)
    ]
    if branch.method.restarts_averages and scales[0] != scales[1]:
        raise UserError(
            f"--branch {origin}: at step {step} method.kind {branch.method.kind} is in its stage of N = {scales[0]}, "
            f"and with these values in that of {scales[1]}; change method.schedule_steps so that the stage stays"
        )


def _meaning(config: Config) -> dict[str, object]:
    """What a branch must have in common with its parent, by key."""
    method = config.method
    found = network_settings(config) | {"method.kind": method.kind, "method.sigma_data": method.sigma_data}
    if method.facts.preconditioning == "consistency":
        found["method.sigma_min"] = method.sigma_min  # where the model is the identity
    if method.facts.follows_teacher:
        found["method.teacher_weights"] = None if method.teacher_choice is None else method.teacher_choice.weights_name
    return found | {"the network's time embedding": "angle" if method.embeds_angle else "log_sigma"}


def check_sigma_data(first: MethodSection, new: MethodSection, *, key: str, origin: str) -> None:
    """Checks that two networks are scaled alike: with another sigma_data the same weights are another function.

    Raises:
        UserError: they are not.
    """
    if first.sigma_data != new.sigma_data:
        raise UserError(
            f"{key}: {origin} was trained with method.sigma_data {first.sigma_data:g}, this config has "
            f"{new.sigma_data:g}; set method.sigma_data={first.sigma_data:g}, or give other weights"
        )


def check_range(teacher: MethodSection, student: MethodSection, *, key: str, origin: str) -> None:
    """Checks that the noise levels of a student lie within those of its teacher.

    Raises:
        UserError: they do not.
    """
    for name, is_outside in (
        ("sigma_min", student.sigma_min < teacher.sigma_min),
        ("sigma_max", student.sigma_max > teacher.sigma_max),
    ):
        if is_outside:
            its, ours = getattr(teacher, name), getattr(student, name)
            raise UserError(
                f"{key}: {origin} was trained for method.{name} {its:g}, the student asks it about noise of {ours:g}; "
                f"set the student's method.{name}={its:g}, or give another teacher"
            )


def network_settings(config: Config) -> dict[str, object]:
    """The settings that must be equal for one network to start from the weights of another."""
    unlike = ("dropout", "dropout_resolutions", "precision_layout")  # they change neither names nor shapes
    found = leaves(config.model)
    return {f"model.{key}": value for key, value, operational in found if not operational and key not in unlike}
