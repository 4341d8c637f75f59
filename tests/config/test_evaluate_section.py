"""The `evaluate` section: which weights file belongs to which network, in the config and from a command's options."""

import pytest

from cmscale.config import Evaluate
from cmscale.config.features import feature_networks
from cmscale.errors import UserError


def test_an_unknown_network_is_refused_with_the_known_ones() -> None:
    assert feature_networks() == ["dinov2", "efficientnet", "inception"]
    with pytest.raises(ValueError, match="got 'resnet'; allowed: dinov2, efficientnet, inception"):
        Evaluate(features="resnet")
    with pytest.raises(UserError, match=r"evaluate\.features: got 'extractor'; allowed"):
        Evaluate().replaced({"features": "extractor"})


def test_either_key_names_the_weights_but_not_both() -> None:
    assert Evaluate(inception_weights="i").weights() == ("inception_weights", "i")
    assert Evaluate(features_weights="f", dinov2_weights="d").weights() == ("features_weights", "f")
    assert Evaluate(features="dinov2", inception_weights="i").weights() == ("dinov2_weights", None)
    assert Evaluate(features="efficientnet", features_weights="f").weights() == ("features_weights", "f")
    with pytest.raises(ValueError, match="features_weights and dinov2_weights both name the weights of dinov2"):
        Evaluate(features="dinov2", features_weights="f", dinov2_weights="d")
    with pytest.raises(UserError, match=r"^evaluate: features_weights and inception_weights both name"):
        Evaluate().replaced({"features_weights": "f", "inception_weights": "i"})


@pytest.mark.parametrize(
    ("config", "options", "weights"),
    [
        ({"inception_weights": "i"}, {"features_weights": "f"}, "f"),
        ({"features_weights": "f"}, {"inception_weights": "i"}, "i"),
        ({"features_weights": "f"}, {"dinov2_weights": "d"}, "f"),
        ({"features_weights": "f"}, {"features": "efficientnet"}, None),
        ({"features_weights": "f"}, {"features": "inception"}, "f"),
        ({"inception_weights": "i", "dinov2_weights": "d"}, {"features": "dinov2"}, "d"),
        ({"inception_weights": "i", "dinov2_weights": "d"}, {"features": "dinov2", "features_weights": "f"}, "f"),
    ],
)
def test_options_replace_the_weights_of_their_network(
    config: dict[str, str], options: dict[str, str], weights: str | None
) -> None:
    found = Evaluate(**config).replaced({**options, "reference": None})  # pyright: ignore[reportArgumentType]
    assert found.weights()[1] == weights
    assert found.features == options.get("features", "inception")
