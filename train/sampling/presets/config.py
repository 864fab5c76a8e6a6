"""AMG's presets: the values that its settings take where they say nothing themselves."""

from __future__ import annotations

from typing import Any, Literal

DEFAULT: Literal["views"] = "views"
"""The preset of ``--guidance amg``."""

_EARLY: dict[str, Any] = {
    "lambda_a": 0.3,
    "lambda_b": 0.4,
    "lambda_c": 0.005,
    "sim_offset": 0.3,
    "sim_form": "excess",
    "normalise": True,
    "gain": 1.0,
    "decoder": "linear",
    "release": 0.25,
    "floor": 0.0,
    "t_range": (0.0, 900.0),
    "sim_t_range": (500.0, 900.0),
}
# What differs between the presets. ``main`` has the constants of the authors' released Stable Diffusion sampler. The
# paper gives no numbers for its strong version, only its aim (nothing above .4 rather than .5) and its means (more
# guidance): here the dissimilarity term is doubled and everything starts 0.1 earlier.
# ``early`` is ours (docs/sampling.md shows why). It watches and steers through a linear preview of the decoder, at the
# published threshold, but not in the first steps, where every image is near some training image; it holds on to what it
# guides, and steers while layout is open.
# ``views`` is that as a loop that closes: by the highest of several views, which is higher of any image, so that it
# begins 0.1 later; with a floor that falls while the similarity does not, and drawn again where it is a copy in the
# end, or was guided and is still near.
# ``pixels`` is for similarities that are minus a normalised L2 distance: the schedule of the authors' released CIFAR
# sampler, whose t of 250 is a quarter of ours. Their c_3 is not published; this form and strength are ours.
PRESETS: dict[str, dict[str, Any]] = {
    "main": {"lambda_a": 0.3, "lambda_b": 0.4, "lambda_c": 0.005, "sim_offset": 0.3, "gain": 1.0},
    "strong": {"lambda_a": 0.2, "lambda_b": 0.3, "lambda_c": 0.005, "sim_offset": 0.2, "gain": 2.0},
    "early": _EARLY,
    "views": _EARLY
    | {
        "views": True,
        "lambda_a": 0.4,
        "lambda_b": 0.5,
        "c_1_at": 7.5,
        "floor": 1.0,
        "escalate": 25.0,
        "restarts": 4,
        "guided_limit": 0.3,
    },
    "pixels": {
        "lambda_a": -1.95,
        "lambda_b": -1.5,
        "lambda_c": 0.025 / 4,
        "sim_offset": -1.95,
        "sim_form": "excess",
        "normalise": True,
        "gain": 1.0,
    },
}
# Where a preset says nothing.
DEFAULTS: dict[str, Any] = {
    "sim_form": "released",
    "normalise": False,
    "floor": 1.0,
    "escalate": 0.0,
    "restarts": 0,
    "guided_limit": None,
    "decoder": "full",
    "release": 0.0,
    "views": False,
    "through_unet": False,
    "t_range": (0.0, 1000.0),
    "sim_t_range": (0.0, 1000.0),
}
# c_3 of each form of the dissimilarity term, for raw and for normalised gradients. Only the first is
# published.
C_3 = {
    ("released", False): 100.0,
    ("paper", False): 400.0,
    ("excess", False): 2000.0,
    ("paper", True): 0.5,
    ("excess", True): 2.0,
}
