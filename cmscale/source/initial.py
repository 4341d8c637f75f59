"""Loads the weights that a training starts from: the teacher's, or those of `train.init_from`."""

import torch

from cmscale.config import Config
from cmscale.config.agreement import (
    check_foreign_teacher,
    check_openai_teacher,
    check_openai_weights,
    check_teacher,
    check_weights,
)
from cmscale.config.sources import is_nvlabs, is_openai, is_safetensors
from cmscale.errors import UserError
from cmscale.interop import read_diffusers, read_openai
from cmscale.io.fetch import local_file
from cmscale.io.storage import open_storage
from cmscale.source.foreign import read_edm, read_foreign
from cmscale.source.loading import load_source


def load_teacher(config: Config) -> dict[str, torch.Tensor]:
    """Weights of the diffusion model `method.teacher`; a file without a config is read with this one's model section.

    Raises:
        UserError: it is not a diffusion model, another network, or one that can't teach this config's student.
    """
    setting = config.method.teacher_choice
    assert setting is not None, f"{config.method.kind} has no teacher"
    origin = setting.source
    if is_nvlabs(origin):
        check_foreign_teacher(config.method, origin=origin)
        if config.method.embeds_angle:
            raise UserError(f"method.teacher: {origin} embeds log_sigma; leave out teacher_time_embedding")
        if setting.weights_name is not None:
            raise UserError(f"method.teacher_weights: {setting.weights_name}, but {origin} holds one set; leave it out")
        return read_edm(origin, config, key="method.teacher")
    if is_openai(origin):
        check_openai_teacher(config)
        return read_openai(local_file(origin), config.model)
    teacher = load_source(origin, weights=setting.weights_name)
    if setting.weights_name not in (None, teacher.weights_name):
        raise UserError(
            f"method.teacher_weights: {setting.weights_name}, but {origin} holds {teacher.weights_name}; leave it out"
        )
    check_teacher(teacher.config, config, origin=origin)
    return teacher.weights


def load_first_weights(config: Config) -> dict[str, torch.Tensor]:
    """The weights that `train.init_from` names; those without a config are read with this config's model section.

    Raises:
        UserError: they are not those of this config's network.
    """
    origin, named, key = config.train.init_from, config.train.init_weights, "train.init_from"
    assert origin is not None
    if is_nvlabs(origin) and named is None and not config.method.embeds_angle:
        return read_edm(origin, config, key=key)
    if is_openai(origin) or is_nvlabs(origin):
        check_openai_weights(config, key=key, origin=origin, named=named)
        return read_foreign(origin, config)
    if not is_safetensors(origin) and (storage := open_storage(origin)).read_if_present("model_index.json"):
        weights, card = read_diffusers(storage, model=config.model)
        if not card:
            check_openai_weights(config, key=key, origin=origin, named=named)
            return weights
    source = load_source(origin, weights=named)
    if named not in (None, source.weights_name):
        raise UserError(f"train.init_weights: {named}, but {origin} holds {source.weights_name}; leave it out")
    check_weights(source.config, config, key=key, origin=origin)
    return source.weights
