"""What several methods share: where the first weights come from, the distance of the loss, and plain facts."""

from typing import Annotated, Any, Literal

from pydantic import Field

from cmscale.config.methods.base import DistanceName, DistanceSettings, MethodSection, TeacherChoice
from cmscale.config.section import key, operational

HuberC = Annotated[float, Field(ge=0)] | None
HUBER_C: Any = key(
    None,
    "c of the pseudo-Huber distance; 0: the Euclidean distance. null: 0.00054 sqrt(D), with D values per image.",
    source="iCT, section 3.3",
)
TEACHER = "The diffusion model: a run, a checkpoint, an exported file, or weights of another project; local or s3://."
TEACHER_WEIGHTS: Any = key(
    None,
    "Which weights of the teacher: an EMA's name, or master. null: its first EMA.",
    source="what it is sampled with",
)


class WithoutTeacher(MethodSection):
    """A method whose student starts with random weights."""

    @property
    def teacher_choice(self) -> None:
        return None


class FollowsTeacher(MethodSection):
    """A method whose loss evaluates a teacher in every step; a new student has the teacher's weights."""

    teacher: str = operational(..., TEACHER)
    teacher_weights: str | None = TEACHER_WEIGHTS

    @property
    def teacher_choice(self) -> TeacherChoice:
        return TeacherChoice(self.teacher, self.teacher_weights)


class StartsTrained(MethodSection):
    """A method that needs a diffusion model's weights for a new student, and no teacher after that."""

    teacher: str | None = operational(None, f"{TEACHER} null: train.init_from names the first weights.")
    teacher_weights: str | None = TEACHER_WEIGHTS

    @property
    def teacher_choice(self) -> TeacherChoice | None:
        return None if self.teacher is None else TeacherChoice(self.teacher, self.teacher_weights)

    @property
    def needs_first_weights(self) -> bool:
        return True


class ChosenDistance(MethodSection):
    """A method whose config chooses the distance between two images."""

    distance: DistanceName = key(
        "lpips",
        "Distance of the loss between two images: means over the image for l1 and l2, a perceptual distance for lpips, "
        "sqrt(||a - b||^2 + c^2) - c for pseudo_huber.",
        source="Consistency Models, LSUN 256",
    )
    lpips_pooling: Literal["average", "max"] = key(
        "average", "Pooling in LPIPS's VGG; the lpips package has max.", source="the released code"
    )
    lpips_precision: Literal["fp32", "fp16"] = key(
        "fp32",
        "What the convolutions of LPIPS's VGG compute in; distances are always float32. With fp16 distances of 0.0005 "
        "and more change by less than 0.1 percent. On CUDA, fp32 is TF32 where PyTorch allows it, its default.",
        source="the released code",
    )
    lpips_weights: str | None = operational(
        None,
        "File with VGG16's weights for LPIPS: a local path or s3:// URL, optionally with #sha256=HEX. null: the "
        "download from PyTorch's server.",
    )
    huber_c: HuberC = HUBER_C

    @property
    def distance_settings(self) -> DistanceSettings:
        return DistanceSettings(
            name=self.distance,
            huber_c=self.huber_c,
            lpips_pooling=self.lpips_pooling,
            lpips_precision=self.lpips_precision,
            lpips_weights=self.lpips_weights,
        )


class PseudoHuber(MethodSection):
    """A method whose distance is the pseudo-Huber distance."""

    huber_c: HuberC = HUBER_C

    @property
    def distance_settings(self) -> DistanceSettings:
        return DistanceSettings(name="pseudo_huber", huber_c=self.huber_c)


class OnSigma(MethodSection):
    """A method whose time embedding gets c_noise = 250 ln(sigma)."""

    @property
    def embeds_angle(self) -> bool:
        return False


class WithoutForwardMode(MethodSection):
    """A method whose loss takes no forward-mode derivatives of the network."""

    @property
    def needs_forward_mode(self) -> bool:
        return False


class SampledInOneStep(MethodSection):
    """A method whose model is sampled in one step by default."""

    @property
    def default_sampling_steps(self) -> int:
        return 1


def check_scales(s0: int, s1: int) -> None:
    """Raises ValueError if the time grid would shrink during training."""
    if s0 > s1:
        raise ValueError(f"s0: {s0} must not be above s1, {s1}: the grid grows from s0 to s1 + 1")
