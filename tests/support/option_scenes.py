"""The table of the walk over all options: a value for every option of every command, and the scenes it is given in."""

from dataclasses import dataclass, field

from cmscale.config.requests import SearchTimesRequest

AS_ELSEWHERE = {"device", "batch_size", "workers", "wait", "dry_run", "clip", "check_source", "take_over", "force"}
"""Options that say where and how, not what; and --clip, which changes the pixels of one step nowhere."""


@dataclass(frozen=True)
class Scene:
    """A command line in a situation.

    Attributes:
        refused: The options that must be refused there; all others must have an effect.
        values: Values of options in this scene, where `VALUES` has none that fits.
    """

    name: str
    command: str
    line: tuple[str, ...]
    refused: frozenset[str] = frozenset()
    values: dict[str, tuple[str, ...] | None] = field(default_factory=dict)


OF_A_RUN = frozenset({"weights", "step", "checkpoints"})
OF_A_BARE_FILE = frozenset({"config", "overrides"})

# By command and option: the words on the command line, or None for what the line of every scene has already.
VALUES: dict[str, dict[str, tuple[str, ...] | None]] = {
    "sample": {
        "source": None,
        "out": None,
        "format": ("--format", "tar", "--out", "{out}/tars"),
        "samples": ("--samples", "3"),
        "steps": ("--steps", "2"),
        "seed": ("--seed", "1"),
        "seeds": ("--seeds", "2"),
        "grid": ("--grid", "{out}/grid.png"),
        "noise": ("--noise", "{in}/noise.npy"),
        "times": ("--sampling-times", "70"),
        "sampler": ("--sampler", "euler"),
        "raw": ("--raw",),
        "clip": ("--no-clip",),
        "classes": ("--classes", "1"),
        "batch_size": ("--batch-size", "1"),
        "weights": ("--weights", "master"),
        "step": ("--checkpoint", "3"),
        "config": ("--config", "{in}/other.yaml"),
        "overrides": ("method.sigma_max=40",),
        "device": ("--device", "cpu"),
    },
    "edit": {
        "task": None,
        "source": None,
        "images": None,
        "out": ("--out", "{out}/other.png"),
        "strip": ("--strip", "{out}/strip.png"),
        "in_report": ("--in-report",),
        "mask": ("--mask", "{in}/mask.png"),
        "box": ("--box", "0,0,2,2"),
        "factor": ("--factor", "2"),
        "sigma": ("--sigma", "3"),
        "steps": ("--steps", "3"),
        "count": ("--samples", "3"),
        "seed": ("--seed", "1"),
        "weights": ("--weights", "master"),
        "step": ("--checkpoint", "3"),
        "config": ("--config", "{in}/other.yaml"),
        "device": ("--device", "cpu"),
    },
    "evaluate": {
        "source": None,
        "overrides": ("method.sigma_max=40",),
        "reference": ("--reference", "{in}/other_images"),
        "samples": ("--samples", "13"),
        "features": ("--features", "inception"),
        "features_weights": ("--features-weights", "{in}/features.pth"),
        "inception_weights": ("--inception-weights", "{in}/features.pth"),
        "dinov2_weights": ("--dinov2-weights", "{in}/features.pth"),
        "config": ("--config", "{in}/other.yaml"),
        "device": ("--device", "cpu"),
        "force": ("--force",),
        "out": None,
        "steps": ("--steps", "2"),
        "times": ("--sampling-times", "70"),
        "seeds": ("--seeds", "2"),
        "weights": ("--weights", "master"),
        "checkpoints": ("--checkpoint", "3"),
        "keep_samples": ("--keep-samples", "{out}/kept"),
        "format": ("--format", "tar"),
    },
    "consistency-error": {
        "source": None,
        "data": ("--data", "{in}/other_data"),
        "out": None,
        "plot": ("--plot", "{out}/plot.png"),
        "num": ("--samples", "3"),
        "teacher": ("--teacher", "{in}/edm.safetensors"),
        "seed": ("--seed", "1"),
        "batch_size": ("--batch-size", "1"),
        "weights": ("--weights", "master"),
        "step": ("--checkpoint", "3"),
        "config": ("--config", "{in}/other.yaml"),
        "overrides": ("method.sigma_max=40",),
        "device": ("--device", "cpu"),
        "force": ("--force",),
    },
    "export": {
        "source": None,
        "to": None,
        "format": ("--format", "openai", "--to", "{out}/model.pt"),
        "weights": ("--weights", "master"),
        "step": ("--checkpoint", "3"),
        "config": ("--config", "{in}/other.yaml"),
        "overrides": ("method.sigma_max=40",),
        "license": ("--license", "mit"),
    },
    "ema": {
        "run": None,
        "length": ("--length", "0.08"),
        "as_json": ("--json",),
        "to": ("--to", "{out}/other.safetensors"),
        "step": ("--checkpoint", "3"),
    },
    "import": {
        "source": None,
        "to": None,
        "config": ("--config", "{in}/other.yaml"),
        "overrides": ("method.sigma_max=40",),
    },
    "estimate": {
        "config": None,
        "overrides": ("model.num_res_blocks=2",),
        "nodes": ("--nodes", "2"),
        "gpus_per_node": ("--gpus-per-node", "4"),
        "gpu": ("--gpu", "l40s"),
        "tflops": ("--tflops", "10"),
        "network": ("--network", "1"),
        "price": ("--price", "2"),
        "images_per_core": ("--images-per-core", "100"),
        "interruption_hours": ("--interruption-hours", "10"),
        "save_seconds": ("--save-seconds", "9"),
        "restart_seconds": ("--restart-seconds", "90"),
        "as_json": ("--json",),
    },
    "mirror": {"run": None, "as_json": ("--json",)},
    "report": {
        "run": None,
        "beside": ("--beside", "{in}/shown_too"),
        "serve": ("--serve",),
        "host": ("--host", "::1"),
        "port": ("--port", "1"),
    },
    "runs": {"runs_dir": None, "as_json": ("--json",), "watch": None},
    "compare": {"runs": None, "out": ("--out", "{out}/page.html"), "as_json": ("--json",)},
    "verify": {"source": None, "as_json": ("--json",)},
    "completion": {"shell": None},
    "doctor": {
        "place": ("{out}/tried",),
        "runs_dir": ("--runs-dir", "{out}/elsewhere"),
        "nodes": None,  # see test_nodes_are_asked_by_srun_and_compared
        "as_json": ("--json",),
        "of_node": ("--of-node",),
        "sign": ("--sign", "{out}/sign"),
    },
    "schema": {},
    "config explain": {"names": None, "as_json": ("--json",)},
    "config diff": {"configs": None, "as_json": ("--json",)},
    "submit": {
        "nodes": ("--nodes", "2"),
        "gpus_per_node": ("--gpus-per-node", "2"),
        "cluster": None,
        "partition": ("--partition", "gpu"),
        "time": ("--time", "30"),
        "name": ("--name", "another"),
        "runs_dir": ("--runs-dir", "{out}/elsewhere"),
        "dry_run": ("--dry-run",),
        "wait": ("--wait",),
        "resume": ("--resume", "{in}/launched"),
        "fresh": ("--fresh",),
        "take_over": ("--take-over",),
        "branch": ("--branch", "{in}/branched"),
        "evaluate_every": ("--evaluate-every", "1000"),
        "items": ("train.seed=5",),
    },
    "evaluate-job": {
        "nodes": ("--nodes", "2"),
        "gpus_per_node": ("--gpus-per-node", "2"),
        "cluster": None,
        "partition": ("--partition", "gpu"),
        "time": ("--time", "30"),
        "name": ("--name", "another"),
        "runs_dir": ("--runs-dir", "{out}/elsewhere"),
        "dry_run": ("--dry-run",),
        "wait": ("--wait",),
    },
    "sample-job": {
        "nodes": ("--nodes", "2"),
        "gpus_per_node": ("--gpus-per-node", "2"),
        "cluster": None,
        "partition": ("--partition", "gpu"),
        "time": ("--time", "30"),
        "name": ("--name", "another"),
        "runs_dir": ("--runs-dir", "{out}/elsewhere"),
        "dry_run": ("--dry-run",),
        "wait": ("--wait",),
    },
    "prepare": {
        "source": None,
        "format": ("--format", "webdataset"),
        "out": None,
        "workers": ("--workers", "1"),
        "image_size": ("--image-size", "4"),
        "preprocess": ("--preprocess", "edm"),
        "encoding": ("--encoding", "webp"),
        "exif": ("--exif", "apply"),
        "check_source": ("--check-source",),
        "samples_per_shard": ("--samples-per-shard", "2"),
        "max_bad": None,
        "slurm": None,
        "nodes": ("--nodes", "2"),
        "partition": ("--partition", "gpu"),
        "time": ("--time", "5"),
        "settings": ("slurm.account=us",),
    },
    "verify-set": {
        "dataset": None,
        "repair": None,
        "source": ("--source", "folder:{in}/images"),
        "workers": ("--workers", "2"),
        "json": ("--json",),
    },
    "reference": {
        "dataset": None,
        "out": None,
        "format": ("--format", "edm"),
        "features": ("--features", "efficientnet"),
        "weights": ("--features-weights", "{in}/features.pth"),
        "device": ("--device", "cpu"),
        "limit": ("--samples", "5"),
        "subset": ("--subset", "4"),
    },
    "demo": {
        "folder": ("{out}/lmdb",),
        "picture": ("--picture", "{out}/picture.png"),
        "view": ("--view", "flower"),
        "count": ("--samples", "2"),
        "side": ("--side", "8"),
        "seed": ("--seed", "1"),
    },
}
VALUES["evaluate-job"] |= {name: value for name, value in VALUES["evaluate"].items() if name != "out"}
VALUES["evaluate-job"] |= {"out": ("--out", "{out}/result.json"), "config": ("--config", "{in}/other.yaml")}
VALUES["sample-job"] |= VALUES["sample"]
_OF_A_SEARCH = SearchTimesRequest.model_fields
VALUES["search-times"] = {name: value for name, value in VALUES["evaluate"].items() if name in _OF_A_SEARCH}
VALUES["search-times"] |= {"steps": ("--steps", "3"), "seed": ("--seed", "1"), "step": ("--checkpoint", "3")}
VALUES["worker"] = dict.fromkeys(("name", "runs_dir", "fresh", "items"))  # the same command starts and continues

_SAMPLE = ("--samples", "2", "--out", "{out}/x.npz")
_EVALUATE = ("--samples", "12", "--reference", "{in}/images", "--out", "{out}/r.json")
_EXPORTED = OF_A_RUN | OF_A_BARE_FILE
_CURVE = ("--samples", "2", "--data", "{in}/data", "--out", "{out}/c.json")
_ONLY_CM = frozenset({"sampler", "classes"})
_IMAGE = ("{in}/cm.safetensors", "{in}/images/0000.png", "--out", "{out}/x.png")
_TASK_OPTIONS = frozenset({"mask", "box", "factor", "sigma", "steps", "count"})
_USED_BY_TASK = {
    "inpaint": {"mask", "box", "steps"},
    "colorize": {"steps"},
    "superres": {"factor", "steps"},
    "stroke": set(),
    "denoise": {"sigma"},
    "interpolate": {"count"},
}
_LOCAL = ("--cluster", "local")

SCENES = [
    Scene("of a run", "sample", ("{in}/run", *_SAMPLE), _ONLY_CM | OF_A_BARE_FILE),
    Scene(
        "of a checkpoint",
        "sample",
        ("{in}/run/checkpoints/step-000000007", *_SAMPLE),
        _ONLY_CM | OF_A_BARE_FILE | {"step"},
    ),
    Scene("of an exported file", "sample", ("{in}/cm.safetensors", *_SAMPLE), _ONLY_CM | _EXPORTED),
    Scene("of an OpenAI file", "sample", ("{in}/cm.pt", "--config", "{in}/config.yaml", *_SAMPLE), _ONLY_CM | OF_A_RUN),
    Scene("of a diffusers folder", "sample", ("{in}/diffusers", *_SAMPLE), _ONLY_CM | OF_A_RUN | OF_A_BARE_FILE),
    Scene(
        "of a diffusion model",
        "sample",
        ("{in}/edm.safetensors", *_SAMPLE, "--steps", "3"),
        _EXPORTED | {"classes", "times"},
        values={"steps": ("--steps", "2")},
    ),
    Scene(
        "with all noise given",
        "sample",
        ("{in}/cm.safetensors", *_SAMPLE, "--noise", "{in}/noise.npy"),
        _ONLY_CM | _EXPORTED | {"seed", "seeds", "samples"},  # another number does not fit the noise
        values={"noise": ("--noise", "{in}/other_noise.npy")},
    ),
    Scene(
        "with the start noise given",
        "sample",
        ("{in}/cm.safetensors", *_SAMPLE, "--noise", "{in}/noise.npy", "--sampling-times", "80,3"),
        _ONLY_CM | _EXPORTED | {"samples", "steps"},
        values={"noise": ("--noise", "{in}/other_noise.npy")},
    ),
    Scene(
        "of a conditional model",
        "sample",
        ("{in}/conditional.safetensors", "--classes", "0", "--raw", *_SAMPLE),
        _EXPORTED | {"sampler", "clip", "format"},
        values={"raw": ("--no-raw",)},
    ),
    Scene(
        "as raw samples",
        "sample",
        ("{in}/cm.safetensors", "--raw", *_SAMPLE),
        _ONLY_CM | _EXPORTED | {"clip", "format"},
        values={"raw": ("--no-raw",)},
    ),
    *(
        Scene(
            task,
            "edit",
            (
                task,
                *(part for part in _IMAGE if task != "interpolate" or "images" not in part),
                *(("--steps", "4") if "steps" in used else ()),
            ),
            (_TASK_OPTIONS - used)
            | {"weights", "step", "config", "in_report"}
            | ({"strip"} if task == "interpolate" else set()),
        )
        for task, used in _USED_BY_TASK.items()
    ),
    Scene(
        "with a run",
        "edit",
        ("colorize", "{in}/run", "{in}/images/0000.png", "--out", "{out}/x.png", "--steps", "4"),
        (_TASK_OPTIONS - {"steps"}) | {"config"},
    ),
    Scene(
        "of a run",
        "evaluate",
        ("{in}/run", *_EVALUATE),
        OF_A_BARE_FILE | {"inception_weights", "dinov2_weights", "format"},
    ),
    Scene(
        "that keeps its samples",
        "evaluate",
        ("{in}/run", *_EVALUATE, "--keep-samples", "{out}/pictures"),
        OF_A_BARE_FILE | {"inception_weights", "dinov2_weights"},
    ),
    Scene(
        "of an exported file",
        "evaluate",
        ("{in}/cm.safetensors", *_EVALUATE, "--features", "inception"),
        _EXPORTED | {"dinov2_weights", "format"},
        values={"features": ("--features", "efficientnet")},
    ),
    Scene(
        "of finished samples",
        "evaluate",
        ("{in}/samples.npz", *_EVALUATE[2:]),
        _EXPORTED | {"samples", "steps", "times", "seeds", "dinov2_weights", "keep_samples", "format"},
        values={"features": ("--features", "efficientnet")},
    ),
    Scene(
        "of a run",
        "search-times",
        ("{in}/run", *_EVALUATE),
        OF_A_BARE_FILE | {"inception_weights", "dinov2_weights"},
    ),
    Scene(
        "of an OpenAI file",
        "search-times",
        ("{in}/cm.pt", "--config", "{in}/config.yaml", *_EVALUATE),
        frozenset({"weights", "step", "inception_weights", "dinov2_weights"}),
    ),
    Scene("of a run", "consistency-error", ("{in}/run", *_CURVE), OF_A_BARE_FILE),
    Scene("of an exported file", "consistency-error", ("{in}/cm.safetensors", *_CURVE), _EXPORTED),
    Scene("a run", "export", ("{in}/run", "--to", "{out}/m.safetensors"), OF_A_BARE_FILE),
    Scene("an exported file", "export", ("{in}/cm.safetensors", "--to", "{out}/m.safetensors"), _EXPORTED),
    Scene("a run", "ema", ("{in}/averaged", "--length", "0.07", "--to", "{out}/m.safetensors"), frozenset({"as_json"})),
    Scene("what a run keeps", "ema", ("{in}/averaged",), frozenset({"to"})),
    Scene(
        "an OpenAI file",
        "import",
        ("{in}/cm.pt", "--config", "{in}/config.yaml", "--to", "{out}/m.safetensors"),
    ),
    Scene("an exported file", "import", ("{in}/cm.safetensors", "--to", "{out}/m.safetensors"), OF_A_BARE_FILE),
    Scene("of this machine", "doctor", (), frozenset({"sign"})),
    Scene("of a node", "doctor", ("--of-node",), frozenset({"as_json"}), values={"of_node": None}),
    Scene("a config", "estimate", ("{in}/config.yaml", "train.global_batch_size=64")),
    Scene("of a run", "report", ("{in}/shown",), frozenset({"host", "port"})),
    Scene("that is served", "report", ("{in}/shown", "--serve"), values={"serve": None}),
    Scene("of the folder of runs", "runs", ("{in}/folder_of_runs",)),
    Scene("of two runs", "compare", ("{in}/run", "{in}/other_run")),
    Scene("of a run", "verify", ("{in}/run",)),
    Scene("of a run", "mirror", ("{in}/ended_run",)),
    Scene("of a key", "config explain", ("train.seed",)),
    Scene("of a shell", "completion", ("bash",)),
    Scene("of two configs", "config diff", ("{in}/config.yaml", "{in}/other.yaml")),
    Scene(
        "of a new run",
        "submit",
        (*_LOCAL, "--name", "one", "--runs-dir", "{out}/runs", "{in}/launch.yaml"),
        frozenset({"nodes", "partition", "fresh", "take_over", "resume", "branch"}),  # --name and a config are given
    ),
    Scene(
        "of a branch",
        "submit",
        (*_LOCAL, "--dry-run", "--name", "one", "--branch", "{in}/branched"),
        frozenset({"nodes", "partition", "fresh", "take_over", "resume"}),
        values={"branch": ("--branch", "{in}/branched@3")},
    ),
    Scene(
        "of a run again",
        "submit",
        (*_LOCAL, "--resume", "{out}/launched"),
        frozenset({"nodes", "partition", "name", "runs_dir", "branch"}),
        values={"resume": ("--resume", "{out}/again"), "items": ("train.log_every=7",)},
    ),
    Scene(
        "on Slurm",
        "submit",
        ("--cluster", "slurm", "--dry-run", "--name", "one", "--runs-dir", "{out}/runs", "{in}/launch.yaml"),
        frozenset({"fresh", "take_over", "resume", "branch"}),
        values={"items": ("slurm.account=us",)},
    ),
    Scene(
        "of a run",
        "evaluate-job",
        (*_LOCAL, "{in}/run"),
        OF_A_BARE_FILE | {"nodes", "partition", "name", "runs_dir", "inception_weights", "dinov2_weights", "format"},
    ),
    Scene(
        "of an OpenAI file",
        "evaluate-job",
        (*_LOCAL, "--name", "n", "--runs-dir", "{out}/runs", "{in}/cm.pt", "--config", "{in}/config.yaml"),
        OF_A_RUN | {"nodes", "partition", "inception_weights", "dinov2_weights", "format"},
    ),
    Scene(
        "of a run",
        "sample-job",
        (*_LOCAL, "{in}/run", *_SAMPLE),
        OF_A_BARE_FILE | _ONLY_CM | {"nodes", "partition", "name", "runs_dir"},
    ),
    Scene(
        "of an exported diffusion model",
        "sample-job",
        (*_LOCAL, "--name", "n", "--runs-dir", "{out}/runs", "{in}/edm.safetensors", *_SAMPLE),
        _EXPORTED | {"nodes", "partition", "classes"},
        values={"times": ("--sampling-times", "70,3")},
    ),
    Scene(
        "of a folder",
        "prepare",
        ("--source", "folder:{in}/images", "--format", "mds", "--image-size", "8", "--out", "{out}/set"),
        frozenset({"nodes", "partition", "time", "settings"}),
    ),
    Scene("of a set", "verify-set", ("{in}/data",), frozenset({"source"})),
    Scene("of a set", "reference", ("{in}/data", "--out", "{out}/r.npz")),
    Scene(
        "for EDM",
        "reference",
        ("{in}/data", "--out", "{out}/r.npz", "--format", "edm"),
        frozenset({"subset", "features"}),  # EDM's files hold Inception features alone
        values={"format": ("--format", "adm")},
    ),
    Scene("of a folder", "demo", ("{out}/lmdb", "--samples", "3"), values={"folder": ("--picture", "{out}/p.png")}),
    Scene(
        "of a picture",
        "demo",
        ("--picture", "{out}/p.png"),
        frozenset({"count"}),
        values={"folder": ("{out}/lmdb", "--samples", "2")},
    ),
]
