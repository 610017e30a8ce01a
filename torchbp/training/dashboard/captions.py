"""The caption of each tag, which names the equation behind it, and the layout of the
CUSTOM SCALARS tab."""

from __future__ import annotations

__all__ = ["EPOCHS", "LAYOUT", "MINI_BATCHES", "caption"]

# The unit of the global step ends each caption. A resumed run recognises event files by
# the second one, so it must not change.
EPOCHS = "Step: epochs."
MINI_BATCHES = "Step: mini-batches."

# Keys: the tag's part before the slash; for distributions and pictures the first word
# after it. {l} is the layer, {k} the layer before it, {source} the equation of its δ.
_CAPTIONS = {
    "cost": (
        "C = 1/n Σ_x C_x (A1). running: the mean over the mini-batches since the "
        "point before, each before its update."
    ),
    "accuracy": "The share of examples whose largest output is that of their label.",
    "speed": "Training images per second, without the evaluation.",
    "learning_rate": "η of W → W - η ∂C/∂W.",
    "delta_norm": (
        "How fast layer {l} learns: ‖∂C/∂b^{l}‖ = ‖Σ_x δ^{l}‖ (BP3), {source}. Over "
        "fixed training images."
    ),
    "saturated": (
        "The share of neurons, over fixed training images, whose σ'(z^{l}) is below 5 "
        "% of its largest value. δ^{l} has σ'(z^{l}) as a factor, {source}: such "
        "neurons hardly learn."
    ),
    "update_ratio": (
        "η‖∂C/∂W^{l}‖/‖W^{l}‖: the size of a step relative to W, with ∂C/∂W^{l} = "
        "Σ_x δ^{l} (a^{k})ᵀ (BP4) over fixed training images."
    ),
    "norm_weight": "‖W^{l}‖, the root of the sum of squares (not the spectral norm).",
    "norm_bias": "‖b^{l}‖.",
    "W": "Entries of W^{l}, which moves by -η ∂C/∂W^{l} (BP4).",
    "b": "Entries of b^{l}, which moves by -η ∂C/∂b^{l} (BP3).",
    "z": (
        "z^{l} = W^{l} a^{k} + b^{l} over fixed training images; σ' is small where "
        "|z| is large."
    ),
    "a": (
        "a^{l} = σ(z^{l}) over fixed training images; a factor in the next layer's "
        "∂C/∂W (BP4)."
    ),
    "delta": "δ^{l} = ∂C/∂z^{l} over fixed training images, {source}.",
    "weights": (
        "W^1: a tile for each neuron, a pixel for each weight, red above zero and "
        "blue below. The tiles look like digits because of BP4: ∂C/∂W^1 = Σ_x δ^1 "
        "(a^0)ᵀ is a sum of the images themselves, weighted by δ^1."
    ),
    "misclassified": (
        "The first misclassified test images: label, then answer. Their ∇_a C, from "
        "which BP1 starts, is large."
    ),
    "confusion": (
        "The number of test images of each class (row) by answer (column); the right "
        "answers, on the diagonal, are not shaded."
    ),
    "learning": (
        "How fast each layer learns: ‖∂C/∂b^l‖ = ‖Σ_x δ^l‖ (BP3) over fixed training "
        "images, a colour for each layer, on a logarithmic axis. δ^L comes from BP1, "
        "the others from the layer above by BP2: where W and σ' are small, the first "
        "layers learn slowest."
    ),
    "journey": (
        "One test image in all layers, a^l = σ(W^l a^(l-1) + b^l) forward and δ^l "
        "backward: δ^L from BP1, the others from BP2, and ∂C/∂a^0 = (W^1)ᵀ δ^1."
    ),
}


def caption(tag: str, layers: int) -> str:
    """Return the caption of a tag.

    Args:
        tag: of a curve, a distribution or a picture.
        layers: the number of layers of the run's network.

    Examples:
        >>> caption("norm_bias/layer_2", layers=3)
        '‖b^2‖.'
    """
    group, _, name = tag.partition("/")
    key = {"distributions": name.partition("_layer_")[0], "pictures": name}.get(
        group, group
    )
    number = tag.rpartition("layer_")[2]
    if not number.isdigit():
        return _CAPTIONS[key]
    layer = int(number)
    source = (
        f"from BP1: δ^{layer} = ∇_a C ⊙ σ'(z^{layer})"
        if layer == layers
        else f"from BP2: δ^{layer} = (W^{layer + 1})ᵀ δ^{layer + 1} ⊙ σ'(z^{layer})"
    )
    return _CAPTIONS[key].format(l=layer, k=layer - 1, source=source)


# The CUSTOM SCALARS tab: category, chart, and the tags as regular expressions. They are
# the same for every depth, so that TensorBoard merges the layouts of different runs.
LAYOUT = {
    "Learning": {
        "running cost of the mini-batches": ["Multiline", [r"cost/running$"]],
        "cost C": ["Multiline", [r"cost/(train|validation|test)$"]],
        "accuracy": ["Multiline", [r"accuracy/(train|validation|test)$"]],
    },
    "Backpropagation, layer by layer": {
        "how fast each layer learns: ‖∂C/∂b^ℓ‖ (BP1-BP3)": [
            "Multiline",
            [r"delta_norm/layer_\d+$"],
        ],
        "update-to-weight ratio: η‖∂C/∂W^ℓ‖/‖W^ℓ‖ (BP4)": [
            "Multiline",
            [r"update_ratio/layer_\d+$"],
        ],
        "saturated neurons: share with σ'(z^ℓ) ≈ 0 (BP1, BP2)": [
            "Multiline",
            [r"saturated/layer_\d+$"],
        ],
    },
}
