"""Finds out what a SOURCE is, without reading weights: a run, a checkpoint, an exported file, finished samples, ..."""

import re
from pathlib import Path

from cmscale.commands import situation
from cmscale.config.sources import is_npz, is_nvlabs, is_openai, is_safetensors, names_file, own_card
from cmscale.errors import UserError
from cmscale.io.fetch import local_file
from cmscale.io.image_files import image_suffixes
from cmscale.io.json_text import parse_json
from cmscale.io.place import Place, split_hash
from cmscale.io.protocol import Storage
from cmscale.io.reading import why_no_file
from cmscale.io.storage import has_object, open_storage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir
from cmscale.runs.meant import is_run, named_runs, run_meant

_INDEX = "model_index.json"
EXPORTED_WEIGHTS = "model.safetensors"
"""The weights in the folder of an export."""
CARD = "README.md"
"""The model card in the folder of an export."""
_MOST_HEADER_BYTES = 100 << 20  # of a safetensors file, by its format's definition
_CONFIG_OF_CARD = re.compile(r"^## Config\n\n```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FOLDERS_OF_A_RUN = ("checkpoints", "samples", "evaluations", "logs", "report")  # samples/ holds grids
_KINDS = "a run, a checkpoint folder, a .safetensors file or its folder, a diffusers folder, or an OpenAI .pt"
_ADVICE = {
    ".npy": "write finished samples as uint8 [N, H, W, 3] with numpy.savez(FILE, arr_0=...)",
    ".yaml": "a config holds no weights; give the run's folder",
    ".json": "give the folder that the file is in, if it is a model's",
    ".ckpt": "convert its state dict to OpenAI's names, and save it as .pt or .safetensors",
    ".zip": "unpack it, and give the folder",
    ".tar": "unpack it, and give the folder",
}


def kind_of_source(origin: str) -> str:
    """One of the kinds of `cmscale.commands.situation`: RUN, CHECKPOINT, EXPORTED, ...

    Raises:
        UserError: nothing is there, or something that is no SOURCE; the line says what to give in its place.
    """
    place = Place(origin)
    file = Path(split_hash(place)[0])
    if names_file(place) and not place.is_remote and not file.exists():
        raise UserError(f"{origin}: {why_no_file(file)}; give {_KINDS}")
    if is_openai(place):
        return situation.OPENAI
    if is_nvlabs(place):
        return situation.NVLABS
    if is_npz(place):
        return situation.SAMPLES
    if is_safetensors(place):
        return situation.EXPORTED if _has_config(local_file(place)) else situation.BARE
    if not place.is_remote and Path(place).exists() and not Path(place).is_dir():
        raise UserError(f"{origin}: no SOURCE; {_advice(Path(place).suffix.lower())}")
    storage = open_storage(place)
    found = _kind_of_folder(storage, origin)
    if found is None:
        raise UserError(f"{origin}: no run, checkpoint or exported weights there; {_hint(storage, origin)}")
    return found


def _kind_of_folder(storage: Storage, origin: str) -> str | None:
    if storage.read_if_present(_INDEX) is not None:
        return situation.DIFFUSERS
    manifest = storage.read_if_present(CHECKPOINT_MANIFEST)
    if manifest is not None:
        if is_data_set(manifest):
            raise UserError(f"{origin}: is a prepared data set, not a model; give {_KINDS}")
        return situation.CHECKPOINT
    if storage.read_if_present("config.yaml") is not None or committed_steps(storage):
        return situation.RUN
    if has_object(storage, EXPORTED_WEIGHTS):
        return situation.EXPORTED if _is_exported(storage) else situation.BARE
    folder = storage.local_path("")
    if folder is None or not folder.is_dir():
        return None
    if run := next((parent for parent in list(folder.absolute().parents)[:3] if is_run(parent)), None):
        if folder.absolute().parent.name == "checkpoints":
            raise UserError(f"{origin}: is no complete checkpoint (no {CHECKPOINT_MANIFEST}); give the run, {run}")
        if folder.absolute().parent == run and folder.name in _FOLDERS_OF_A_RUN:
            raise UserError(f"{origin}: is a folder in the run {run}; give the run")
    if named := named_runs(folder):
        raise UserError(f"{origin}: is a folder of runs ({named}); give one of them")
    return situation.SAMPLES if next(folder.iterdir(), None) else None


def file_of_weights(origin: str) -> Place:
    """The safetensors file of a SOURCE that is one (EXPORTED, BARE): itself, or the one in the folder of an export."""
    place = Place(origin)
    return place if is_safetensors(place) else Place(open_storage(place).join(EXPORTED_WEIGHTS))


def config_of_card(text: bytes) -> str | None:
    """The config, as YAML, in a model card that cmscale wrote; None in another."""
    found = _CONFIG_OF_CARD.search(text.decode("utf-8", "replace").replace("\r\n", "\n"))
    return None if found is None else found[1]


def _is_exported(storage: Storage) -> bool:
    """Whether cmscale wrote the weights in a folder. Its card says so too: weights of gigabytes are not fetched."""
    if storage.local_path("") is None and config_of_card(storage.read_if_present(CARD) or b"") is not None:
        return True
    return _has_config(local_file(storage.join(EXPORTED_WEIGHTS)))


def _advice(suffix: str) -> str:
    if suffix in image_suffixes():
        return "one image can't be measured; finished samples are a folder of images"
    return _ADVICE.get(suffix, f"give {_KINDS}")


def _hint(storage: Storage, origin: str) -> str:
    folder = storage.local_path("")
    if folder is not None and not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", origin):
        return f"no such folder (the id of a model on a hub? download it first); give {_KINDS}"
    if folder is not None and folder.is_dir() and next(folder.iterdir(), None) is None:
        return f"the folder is empty; give {_KINDS}"
    run, _, step = origin.rpartition("@")
    if run and re.fullmatch("[0-9]{1,9}", step) and is_run(Path(run)):  # as --branch names it
        named = RunDir(Path(run))
        if int(step) in (steps := committed_steps(named)):
            return f"a checkpoint is given by its folder: {named.checkpoint(int(step))}"
        return f"the run has no checkpoint of step {step}, but of {', '.join(map(str, steps)) or 'none'}"
    if meant := run_meant(origin):
        return f"no such file or folder{meant}"
    if folder is not None and not folder.exists():
        return f"{why_no_file(folder, absent='no such file or folder')}; give {_KINDS}"
    return f"give {_KINDS}"


def is_data_set(manifest: bytes) -> bool:
    """Whether a `manifest.json` is that of a prepared data set, and not that of a checkpoint."""
    try:
        return "shards" in parse_json(manifest)
    except (ValueError, TypeError):
        return False  # a damaged manifest is reported by who reads the checkpoint


def _has_config(path: Path) -> bool:
    """Whether cmscale wrote a safetensors file, with its config. A damaged file counts as one that has it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = parse_json(file.read(min(size, _MOST_HEADER_BYTES)))
            return own_card(header.get("__metadata__") or {}) is not None
        except (ValueError, TypeError, AttributeError):
            return True
