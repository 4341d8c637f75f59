"""Defines the config section of evaluations."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from cmscale.config.features import known_network
from cmscale.config.section import Section, operational
from cmscale.errors import UserError


class Evaluate(Section):
    """What evaluations use; options of their commands replace these values."""

    features: Annotated[str, AfterValidator(known_network)] = operational(
        "inception",
        "Network whose features are compared: inception (FID), dinov2 (FD-DINOv2), efficientnet (FD-EfficientNet, "
        "which needs no download).",
        source="the published FIDs",
    )
    features_weights: str | None = operational(
        None,
        "Weights of the network that `features` names: a local path or s3:// URL, optionally with #sha256=HEX. null: "
        "the download from their home, if this network has one.",
    )
    inception_weights: str | None = operational(
        None, "As `features_weights`, for inception; without effect while `features` names another network."
    )
    dinov2_weights: str | None = operational(
        None, "As `features_weights`, for dinov2; without effect while `features` names another network."
    )
    reference: str | None = operational(
        None,
        "What samples are compared with: a prepared data set, a folder of images, or a statistics file; local or "
        "s3://. null: the training data.",
    )
    num_samples: Annotated[int, Field(ge=2)] = operational(
        50000, "Samples of each evaluation.", unit="samples", source="the published FIDs"
    )

    @model_validator(mode="after")
    def _one_weights_file(self) -> "Evaluate":
        key = f"{self.features}_weights"
        if self.features_weights is not None and getattr(self, key, None) is not None:
            raise ValueError(f"features_weights and {key} both name the weights of {self.features}; remove one")
        return self

    def weights(self) -> tuple[str, str | None]:
        """The key that names the weights of `features`, and its value; None for the network's default weights."""
        single = {"inception": self.inception_weights, "dinov2": self.dinov2_weights}
        if self.features_weights is None and self.features in single:
            return f"{self.features}_weights", single[self.features]
        return "features_weights", self.features_weights

    def replaced(self, options: Mapping[str, Any]) -> "Evaluate":
        """The section with the values that a command's options replace.

        Args:
            options: Values by key; None keeps the config's value. Weights among them replace the config's weights of
                the same network under either key.

        Raises:
            UserError: a value that the config would refuse.
        """
        given = {key: value for key, value in options.items() if value is not None}
        kept = self.model_dump()
        features = given.get("features", self.features)
        of_network = {"features_weights", f"{features}_weights"}
        if features != self.features:
            kept["features_weights"] = None
        if of_network & given.keys():
            kept |= dict.fromkeys(of_network & kept.keys())
        try:
            return Evaluate.model_validate(kept | given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(("evaluate", *map(str, first["loc"])))
            raise UserError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from None
