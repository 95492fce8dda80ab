"""Model configuration: frozen dataclasses, read from and written to a Hugging Face style ``config.json``.

The flat keys are Qwen2.5-VL's; what Photon adds lives under the one key ``photon``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from photon.errors import PhotonError

SGP_RULES = ("paper", "taylor")
POLICIES = ("photon", "all", "slices", "pooled", "fixed", "fixed-blind")
"""Who decides which visual tokens a question gets; see :attr:`PruningConfig.policy`."""
_RANKED = ("fixed", "fixed-blind")
_QWEN_IMAGE_CHANNELS = 3
_PHOTON_PATCH = {"in_chans": 1, "temporal_patch_size": 14}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a positive whole number": (
        lambda value: _is_whole(value) and value > 0,
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
        "vision.depth vision.hidden_size vision.intermediate_size vision.num_heads vision.out_hidden_size "
        "vision.patch_size vision.temporal_patch_size vision.spatial_merge_size vision.window_size vision.in_channels "
        "pruning.min_tokens",
    ),
    "a whole number from 0": (
        lambda value: _is_whole(value) and value >= 0,
        "vision_start_token_id vision_end_token_id video_token_id eos_token_id pruning.layer",
    ),
    "a positive number": (
        lambda value: _is_number(value) and value > 0,
        "rms_norm_eps rope_theta vision.intensity_std pruning.threshold_scale pruning.temperature",
    ),
    "a number from 0": (
        lambda value: _is_number(value) and value >= 0,
        "initializer_range vision.tokens_per_second pruning.seconds_per_grid pruning.band_weight "
        "pruning.distillation_weight pruning.warm_up_distillation_weight",
    ),
    "a finite number": (_is_number, "vision.intensity_mean pruning.threshold_bias_init"),
    "a number above 0 and at most 1": (
        lambda value: _is_number(value) and 0 < value <= 1,
        "pruning.keep_ratio",
    ),
    "true or false": (lambda value: isinstance(value, bool), "pruning.saliency_gradient"),
    "None or a voxel value from 0 to below 1": (
        lambda value: value is None or (_is_number(value) and 0 <= value < 1),
        "vision.empty_below",
    ),
    "two numbers with 0 <= low <= high <= 1": (
        lambda value: len(value) == 2 and all(map(_is_number, value)) and 0 <= value[0] <= value[1] <= 1,
        "pruning.keep_band",
    ),
    "three whole numbers from 0": (
        lambda value: len(value) == 3 and all(_is_whole(part) and part >= 0 for part in value),
        "mrope_section",
    ),
}
"""What each setting has to be, by itself: the test, and the settings that it is for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower: a 3D patch embedding and transformer blocks over one depth slab at a time."""

    depth: int
    """Number of transformer blocks."""
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    """Width of the tokens handed to the decoder."""
    patch_size: int = 14
    """Voxels of a patch along y and x."""
    temporal_patch_size: int = 14
    """Voxels of a patch along z."""
    spatial_merge_size: int = 2
    """Patches merged into one visual token along y and along x."""
    window_size: int = 112
    """Side of an attention window in voxels, in blocks without full attention."""
    fullatt_block_indexes: tuple[int, ...] = ()
    """Blocks whose attention spans the whole depth slab."""
    in_channels: int = 1
    tokens_per_second: int = 2
    intensity_mean: float = 0.0
    """Subtracted from voxels in [0, 1] before the patch embedding; the public model takes them as they are."""
    intensity_std: float = 1.0
    """Divides what is left. A network trained from scratch needs inputs around 0 with a spread around 1."""
    empty_below: float | None = None
    """Visual tokens without a voxel above this value in [0, 1] never enter the model; None: every token does."""

    @property
    def patch_voxels(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Instruction-conditioned token scheduling and its training."""

    layer: int
    """Decoder layer (from 0) after whose output visual tokens are dropped."""
    threshold_scale: float = 0.9
    """theta = threshold_scale * sigmoid(MLP(descriptor)); 0.9 in the public implementation."""
    temperature: float = 0.2
    """p = sigmoid((rho - theta) / temperature)."""
    threshold_bias_init: float = 0.0
    """First value of the threshold network's last bias; 0 starts theta near 0.45, -5 near 0.006."""
    min_tokens: int = 1
    """Visual tokens kept whatever the scores say (fewer only if the scan has fewer)."""
    sgp_rule: str = "taylor"
    """Sign convention of the surrogate gradient: "paper" or "taylor"."""
    keep_band: tuple[float, float] = (0.3, 0.8)
    """Mean keep probabilities outside this band are penalised linearly."""
    seconds_per_grid: float = 14.0
    """Depth positions advance by tokens_per_second * seconds_per_grid."""
    policy: str = "photon"
    """Which tokens a question gets: "photon": those above the threshold that the question sets. "all": every token, in
    every training stage and in inference. "fixed": the share ``keep_ratio`` with the highest instruction saliency.
    "fixed-blind": the same share by a saliency for which the scan's own tokens ask instead of the question. "slices":
    those of evenly spaced depth slabs. "pooled": means over blocks of neighbouring tokens."""
    keep_ratio: float = 0.35
    """Share of the visual tokens that "fixed" and "fixed-blind" keep and that "slices" and "pooled" come near to."""
    band_weight: float = 1.0
    """Weight of the keep band's penalty in the loss."""
    saliency_gradient: bool = False
    """Whether in the soft stage the gradient of p also reaches the saliency, and through it queries and keys of the
    pruning layer."""
    distillation_weight: float = 0.0
    """Weight of the distillation of attention: in the soft and hard stages the saliency of each question learns to
    foretell where the later layers look when they answer it. 0: as published, nothing teaches it."""
    warm_up_distillation_weight: float = 0.0
    """The same weight in the warm-up, before which there is nothing to foretell."""

    @property
    def prunes(self) -> bool:
        """Whether rows are dropped after the pruning layer; otherwise every token that enters stays."""
        return self.policy == "photon" or self.is_ranked

    @property
    def is_ranked(self) -> bool:
        """Whether a share of the tokens stays, by rank, instead of those above a threshold."""
        return self.policy in _RANKED


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotonConfig:
    """The whole model: Qwen2.5-VL's decoder, the 3D vision tower and the pruning layer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    mrope_section: tuple[int, int, int]
    """Rotary frequency pairs given to the depth, height and width position."""
    vision: VisionConfig
    pruning: PruningConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    """Standard deviation of a fresh token embedding; matrices start at 1 / sqrt(inputs)."""
    vision_start_token_id: int
    vision_end_token_id: int
    video_token_id: int
    """Placeholder id of a visual token."""
    eos_token_id: int
    """End of a turn (`<|im_end|>`); closes the question and the answer."""

    def __post_init__(self) -> None:
        def refuse(fact: str) -> None:
            raise PhotonError("CONFIG_INVALID", "config.json", fact, "Use a configuration that fits together.")

        for wanted, (is_fine, names) in _RANGES.items():
            for name in names.split():
                if not is_fine(value := attrgetter(name)(self)):
                    refuse(f"{name} is {value!r}, not {wanted}.")
        if self.hidden_size % self.num_attention_heads:
            refuse(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads.")
        if self.num_attention_heads % self.num_key_value_heads:
            refuse(f"{self.num_attention_heads} heads do not share {self.num_key_value_heads} key/value heads.")
        if sum(self.mrope_section) * 2 != self.head_dim:
            refuse(f"mrope_section {self.mrope_section} does not sum to half the head width {self.head_dim}.")
        if self.vision.out_hidden_size != self.hidden_size:
            refuse(f"the vision tower gives {self.vision.out_hidden_size} numbers a token, not {self.hidden_size}.")
        if self.pruning.layer >= self.num_hidden_layers:
            refuse(f"pruning layer {self.pruning.layer} is not one of {self.num_hidden_layers} layers.")
        if self.pruning.sgp_rule not in SGP_RULES:
            refuse(f"sgp_rule {self.pruning.sgp_rule!r} is not one of {SGP_RULES}.")
        if self.pruning.policy not in POLICIES:
            refuse(f"policy {self.pruning.policy!r} is not one of {POLICIES}.")
        if self.pruning.policy == "pooled" and self.vision.empty_below is not None:
            refuse("empty_below leaves tokens out, and the policy pooled averages over all of them.")
        if self.pruning.saliency_gradient and self.pruning.policy != "photon":
            refuse(f"saliency_gradient is on, and the policy {self.pruning.policy} has no keep probabilities.")
        distils = self.pruning.distillation_weight or self.pruning.warm_up_distillation_weight
        if distils and self.pruning.policy != "photon":
            refuse(f"attention is distilled, and the policy {self.pruning.policy} learns no saliency.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def depth_position_step(self) -> float:
        """Rotary distance between two depth slabs."""
        return self.vision.tokens_per_second * self.pruning.seconds_per_grid

    def digest(self) -> str:
        """Twelve hex digits that name this configuration."""
        return content_digest(self.to_hf())

    @classmethod
    def from_hf(cls, content: Mapping[str, Any]) -> PhotonConfig:
        """Read a Qwen2.5-VL ``config.json`` with the public Photon changes.

        Both generations of that file are read: all keys of the decoder at the top, or in ``text_config``; rotary
        settings in ``rope_scaling``, or in ``rope_parameters``. Keys that do not change the network are ignored.

        Raises:
            PhotonError: ``CONFIG_INVALID`` when a key is missing, the numbers do not fit together, or the file asks
                for a network that this one is not (another activation, scaled rotary positions, sliding windows).
        """
        try:
            return cls._from_hf(content)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise PhotonError(
                "CONFIG_INVALID",
                "config.json",
                f"a key is missing or malformed ({type(error).__name__}: {error}).",
                "Use the config.json of a Qwen2.5-VL or Photon checkpoint.",
            ) from error

    @classmethod
    def from_qwen(cls, content: Mapping[str, Any]) -> PhotonConfig:
        """Read the ``config.json`` of a plain Qwen2.5-VL: its patches of pictures become patches of a volume.

        Three colours, two frames deep, become one channel, 14 voxels deep. A file with one channel is Photon's own
        and is read as :meth:`from_hf` reads it, with the same errors.
        """
        vision = content.get("vision_config") if isinstance(content, Mapping) else None
        if not isinstance(vision, Mapping):
            return cls.from_hf(content)
        if vision.get("in_chans", vision.get("in_channels", _QWEN_IMAGE_CHANNELS)) == _QWEN_IMAGE_CHANNELS:
            content = {**content, "vision_config": {**vision, **_PHOTON_PATCH}}
        return cls.from_hf(content)

    @classmethod
    def _from_hf(cls, content: Mapping[str, Any]) -> PhotonConfig:
        decoder = {key: value for key, value in content.get("text_config", {}).items() if value is not None}
        flat = {**content, **decoder}
        vision = flat["vision_config"]
        photon = dict(flat.get("photon", {}))
        if "layer" not in photon:
            photon["layer"] = max(flat["num_hidden_layers"] // 4 - 1, 0)
        if "keep_band" in photon:
            photon["keep_band"] = tuple(photon["keep_band"])
        rope = flat.get("rope_scaling") or flat["rope_parameters"]
        _refuse_other_networks(flat, vision, rope)
        eos = flat["eos_token_id"]
        return cls(
            hidden_size=flat["hidden_size"],
            intermediate_size=flat["intermediate_size"],
            num_hidden_layers=flat["num_hidden_layers"],
            num_attention_heads=flat["num_attention_heads"],
            num_key_value_heads=flat["num_key_value_heads"],
            vocab_size=flat["vocab_size"],
            mrope_section=tuple(rope["mrope_section"]),
            rms_norm_eps=flat.get("rms_norm_eps", 1e-6),
            rope_theta=flat.get("rope_theta", rope.get("rope_theta", 1e6)),
            # The public library leaves the key out where it is false.
            tie_word_embeddings=flat.get("tie_word_embeddings", False),
            initializer_range=flat.get("initializer_range", 0.02),
            vision_start_token_id=flat["vision_start_token_id"],
            vision_end_token_id=flat["vision_end_token_id"],
            video_token_id=flat["video_token_id"],
            eos_token_id=eos[0] if isinstance(eos, list) else eos,
            vision=VisionConfig(
                depth=vision["depth"],
                hidden_size=vision["hidden_size"],
                intermediate_size=vision["intermediate_size"],
                num_heads=vision["num_heads"],
                out_hidden_size=vision["out_hidden_size"],
                patch_size=vision["patch_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                spatial_merge_size=vision["spatial_merge_size"],
                window_size=vision["window_size"],
                fullatt_block_indexes=tuple(vision["fullatt_block_indexes"]),
                in_channels=vision.get("in_chans", vision.get("in_channels", 1)),
                tokens_per_second=vision.get("tokens_per_second", 2),
                intensity_mean=vision.get("intensity_mean", 0.0),
                intensity_std=vision.get("intensity_std", 1.0),
                empty_below=vision.get("empty_below"),
            ),
            pruning=PruningConfig(**photon),
        )

    def to_hf(self) -> dict[str, Any]:
        """The configuration as the content of a ``config.json``; :meth:`from_hf` reads it back unchanged."""
        content = dataclasses.asdict(self)
        vision = content.pop("vision")
        vision["in_chans"] = vision.pop("in_channels")
        vision["fullatt_block_indexes"] = list(vision["fullatt_block_indexes"])
        pruning = content.pop("pruning")
        pruning["keep_band"] = list(pruning["keep_band"])
        # Files and digests from before these settings existed stay what they were.
        pruning = {name: value for name, value in pruning.items() if _LATER.get(name, ()) != value}
        section = list(content.pop("mrope_section"))
        return {
            **content,
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": section},
            "vision_config": {**vision, "hidden_act": "silu"},
            "photon": pruning,
        }


_LATER = {
    field.name: field.default
    for field in dataclasses.fields(PruningConfig)
    if field.name
    in (
        "policy",
        "keep_ratio",
        "band_weight",
        "saliency_gradient",
        "distillation_weight",
        "warm_up_distillation_weight",
    )
}
"""Pruning settings that are written only where they are not as ever, with their defaults."""


def _refuse_other_networks(flat: Mapping[str, Any], vision: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Refuse settings that would silently give other numbers than their authors'."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    facts = {
        f"the activation {flat.get('hidden_act')!r}": flat.get("hidden_act", "silu") != "silu",
        f"the vision activation {vision.get('hidden_act')!r}": vision.get("hidden_act", "silu") != "silu",
        f"rotary positions of type {rope_type!r}": rope_type not in ("default", "mrope"),
        "sliding windows in the decoder": bool(flat.get("use_sliding_window")),
    }
    for fact, is_so in facts.items():
        if is_so:
            raise PhotonError(
                "CONFIG_INVALID",
                "config.json",
                f"it asks for {fact}, which this network does not have.",
                "Use a checkpoint without it.",
            )


def content_digest(content: Mapping[str, Any]) -> str:
    """:meth:`PhotonConfig.digest` of what :meth:`PhotonConfig.to_hf` gave, also after it went through JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def tiny(vocab_size: int, *, special_ids: Mapping[str, int]) -> PhotonConfig:
    """The demonstration preset: the real architecture at about half a million parameters.

    Args:
        vocab_size: number of token ids.
        special_ids: ids of ``vision_start``, ``vision_end``, ``video`` and ``eos``.
    """
    return PhotonConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        mrope_section=(2, 3, 3),
        # The public base of 1e6 turns the width axis by 1e-4 a token: over a 4 x 4 plane, positions look alike.
        rope_theta=1e4,
        initializer_range=0.2,
        vision_start_token_id=special_ids["vision_start"],
        vision_end_token_id=special_ids["vision_end"],
        video_token_id=special_ids["video"],
        eos_token_id=special_ids["eos"],
        vision=VisionConfig(
            depth=4,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=64,
            window_size=56,
            fullatt_block_indexes=(1, 3),
            intensity_mean=0.35,
            intensity_std=0.25,
        ),
        pruning=PruningConfig(layer=1, min_tokens=4, seconds_per_grid=0.5),
    )


def qwen2_5_vl_3b() -> PhotonConfig:
    """The public size: Qwen2.5-VL-3B with patches of 14x14x14 voxels of one channel, pruning after layer 8 of 36."""
    return PhotonConfig(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        mrope_section=(16, 24, 24),
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        video_token_id=151656,
        eos_token_id=151645,
        vision=VisionConfig(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            out_hidden_size=2048,
            fullatt_block_indexes=(7, 15, 23, 31),
        ),
        pruning=PruningConfig(layer=8),
    )
