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
            f"method.teacher_time_embedding={its} (sct, scd only), or give other weights"
        )
    if different := unequal(network_settings(first), network_settings(new)):
        raise UserError(
            f"{key}: {origin} is another network ({'; '.join(different)}); change the model section to that network's"
        )
    check_sigma_data(first.method, new.method, key=key, origin=origin)


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
