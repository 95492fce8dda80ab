"""Configurations as files write them, in both generations of the public format, and the presets."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from photon.config import PhotonConfig, qwen2_5_vl_3b
from photon.errors import PhotonError
from photon.model.network import Photon
from photon.testing import micro_config

PUBLIC_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
"""What the public 3B checkpoint's file holds."""

OUTER = ("model_type", "vision_config", "photon", "image_token_id", "video_token_id")
OUTER += ("vision_start_token_id", "vision_end_token_id")


def newer(content: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as the newer generation writes it."""
    text = {key: value for key, value in content.items() if key not in OUTER}
    rope = text.pop("rope_scaling")
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": rope["mrope_section"],
    }
    outer = {key: value for key, value in content.items() if key in OUTER}
    return outer | {"text_config": text | {"bos_token_id": None, "vision_end_token_id": None}, "dtype": "bfloat16"}


def nested(content: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with its decoder in `text_config`, rotary settings as before."""
    text = {key: value for key, value in content.items() if key not in OUTER}
    return {key: value for key, value in content.items() if key in OUTER} | {"text_config": text}


@pytest.mark.parametrize("rewrite", [copy.deepcopy, newer, nested])
def test_both_generations_are_read(rewrite: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    config = micro_config(pruning={"min_tokens": 3, "keep_band": (0.2, 0.7)}, tie_word_embeddings=False)
    assert PhotonConfig.from_hf(rewrite(config.to_hf())) == config
    assert PhotonConfig.from_qwen(rewrite(PUBLIC_3B)) == qwen2_5_vl_3b()


def test_a_plain_configuration_gets_patches_of_a_volume() -> None:
    config = PhotonConfig.from_qwen(PUBLIC_3B)
    assert (config.vision.in_channels, config.vision.temporal_patch_size) == (1, 14)
    assert config.vision.patch_voxels == 14**3
    assert config.pruning.layer == 8
    assert PUBLIC_3B["vision_config"]["in_chans"] == 3
    unnamed = copy.deepcopy(PUBLIC_3B)
    del unnamed["vision_config"]["in_chans"], unnamed["vision_config"]["temporal_patch_size"]
    assert PhotonConfig.from_qwen(unnamed) == config


def test_a_photon_configuration_is_left_as_it_is() -> None:
    for config in (micro_config(), qwen2_5_vl_3b()):
        assert PhotonConfig.from_qwen(config.to_hf()) == config


def test_several_ends_of_a_turn() -> None:
    content = micro_config().to_hf()
    assert PhotonConfig.from_hf(content | {"eos_token_id": [39, 7]}) == micro_config()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_of_the_weights_is_no_part_of_it(key: str) -> None:
    config = micro_config()
    assert PhotonConfig.from_hf(config.to_hf() | {key: "bfloat16", "max_position_embeddings": 7}) == config


def test_a_key_that_the_library_leaves_out_is_false() -> None:
    content = micro_config(tie_word_embeddings=False).to_hf()
    del content["tie_word_embeddings"]
    assert not PhotonConfig.from_hf(content).tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"hidden_act": "gelu"}, "the activation 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mrope_section": [1, 1, 2]}}, "of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "mrope_section": [1, 1, 2]}}, "of type 'linear'"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"vision_config": micro_config().to_hf()["vision_config"] | {"hidden_act": "relu"}}, "activation 'relu'"),
        ({"eos_token_id": []}, "IndexError"),
        ({"text_config": []}, "AttributeError"),
        ({"rope_scaling": None}, "rope_parameters"),
        ({"rope_scaling": "default"}, "malformed"),
    ],
)
def test_other_networks_are_refused(changes: dict[str, Any], fact: str) -> None:
    for read in (PhotonConfig.from_hf, PhotonConfig.from_qwen):
        with pytest.raises(PhotonError) as caught:
            read(micro_config().to_hf() | changes)
        assert caught.value.code == "CONFIG_INVALID" and fact in caught.value.fact


NO_SIZES: tuple[object, ...] = (0, -1, 2.0, "8", None, True)
NO_NUMBERS: tuple[object, ...] = (math.nan, math.inf, -math.inf, "1", None, True)


@pytest.mark.parametrize(
    ("part", "names", "values"),
    [
        ("", "vocab_size hidden_size intermediate_size num_hidden_layers num_key_value_heads", NO_SIZES),
        ("", "vision_start_token_id vision_end_token_id video_token_id eos_token_id", (-1, 1.5, None, False)),
        ("", "rms_norm_eps rope_theta", (0, -1e-6, *NO_NUMBERS)),
        ("", "initializer_range", (-0.1, *NO_NUMBERS)),
        ("", "mrope_section", ((2, 2), (5, 1, -2), (1.0, 1, 2), ("1", 1, 2))),
        ("vision", "patch_size temporal_patch_size spatial_merge_size depth window_size num_heads", NO_SIZES),
        ("vision", "in_channels", NO_SIZES),
        ("vision", "intensity_std", (0, -1.0, *NO_NUMBERS)),
        ("vision", "intensity_mean", NO_NUMBERS),
        ("vision", "tokens_per_second", (-1, *NO_NUMBERS)),
        ("vision", "empty_below", (-0.1, 1, math.nan, "0", False)),
        ("pruning", "layer", (-1, 1.0, True, 5)),
        ("pruning", "min_tokens", NO_SIZES),
        ("pruning", "temperature threshold_scale", (0, -0.2, *NO_NUMBERS)),
        ("pruning", "seconds_per_grid", (-1.0, *NO_NUMBERS)),
        ("pruning", "threshold_bias_init", NO_NUMBERS),
        ("pruning", "keep_band", ((), (0.3,), (0.1, 0.2, 0.3), (0.8, 0.3), (-0.1, 0.5), (0.5, 1.1), ("0", "1"),
                                  (math.nan, 0.5), (False, True))),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(part: str, names: str, values: tuple[object, ...]) -> None:
    for name in names.split():
        for value in values:
            # Both when made in code and when read from a file.
            content = micro_config().to_hf()
            section = content["vision_config" if part == "vision" else "photon"] if part else content
            target = content["rope_scaling"] if name == "mrope_section" else section
            key = "in_chans" if name == "in_channels" else name
            target[key] = list(value) if isinstance(value, tuple) else value
            for make in (
                lambda name=name, value=value: micro_config(**({part: {name: value}} if part else {name: value})),
                lambda content=content: PhotonConfig.from_hf(content),
            ):
                with pytest.raises(PhotonError) as caught:
                    make()
                assert caught.value.code == "CONFIG_INVALID", (name, value)
                assert name in caught.value.fact or "pruning layer" in caught.value.fact, (name, value)


def test_values_at_the_edge_of_their_range_are_accepted() -> None:
    pruning = {"keep_band": (0, 1), "seconds_per_grid": 0, "temperature": 1, "layer": 0, "threshold_bias_init": -5}
    config = micro_config(pruning=pruning, vision={"empty_below": 0}, rope_theta=100, video_token_id=0)
    assert PhotonConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("content", [[], "text", {}, {"vision_config": 3}, None])
def test_what_is_no_plain_configuration_is_refused(content: Any) -> None:
    with pytest.raises(PhotonError) as caught:
        PhotonConfig.from_qwen(content)
    assert caught.value.code == "CONFIG_INVALID"


def test_full_size_survives_json() -> None:
    config = qwen2_5_vl_3b()
    assert PhotonConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert config.head_dim == 128 and config.depth_position_step == 28


def test_full_size_has_the_public_number_of_parameters() -> None:
    """Counted by hand from the sizes of the public checkpoint."""
    width, inner, layers, vocabulary, key_width = 2048, 11008, 36, 151936, 2 * 128
    attention = width * width + width + 2 * (width * key_width + key_width) + width * width
    decoder = layers * (attention + 3 * width * inner + 2 * width) + width
    v_width, v_inner, blocks = 1280, 3420, 32
    block = 3 * v_width * v_width + 3 * v_width + v_width * v_width + v_width
    block += 2 * (v_width * v_inner + v_inner) + v_inner * v_width + v_width + 2 * v_width
    merged = 4 * v_width
    merger = v_width + merged * merged + merged + merged * width + width
    plain = vocabulary * width + decoder + blocks * block + merger + v_width * 3 * 2 * 14 * 14
    assert plain == 3_754_622_976
    pruning = 12 * 256 + 256 + 256 + 1 + width
    with torch.device("meta"):
        model = Photon(qwen2_5_vl_3b())
    assert all(parameter.is_meta for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == plain - v_width * 3 * 2 * 14 * 14 + v_width * 14**3 + pruning == 3_756_635_649
