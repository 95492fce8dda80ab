"""What a study trains: presets, variants, and that all of them get the same number of steps."""

from __future__ import annotations

import dataclasses
import re

import pytest

from photon.config import PruningConfig
from photon.errors import PhotonError
from photon.training.stages import Curriculum
from pipelines.dataset import Draw
from pipelines.start import start_from_scratch
from pipelines.study.answer_table import CONDITIONS
from pipelines.study.spec import LENGTHS, PRESETS, StudySpec
from pipelines.study.variants import Variant


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_sense(name: str) -> None:
    spec = StudySpec.preset(name)
    names = [variant.name for variant in spec.variants]
    assert names[0] == "photon" and len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9.-]+", each) for each in names)
    start = start_from_scratch(["a b"], spec.model).with_pruning(spec.pruning)
    for variant in spec.variants:
        start.with_pruning(variant.pruning)  # refuses what does not fit together
        dataclasses.replace(spec.pruned_draw, **variant.draw)
        assert set(variant.conditions) <= set(CONDITIONS)
        training, own = spec.training(variant, 1), spec.own_warm_up(variant, 1, spec.lengths.warm_up)
        assert training.schedule.num_steps == spec.lengths.soft + spec.lengths.hard
        assert training.schedule.warm_up == own.schedule.soft == own.schedule.hard == 0
        assert own.schedule.num_steps == spec.lengths.warm_up
        assert training.seed == own.seed == 1


@pytest.mark.parametrize("alignment", [0, 3, 5, 7])
def test_a_warm_up_of_its_own_ends_where_the_shared_one_did(alignment: int) -> None:
    """Followed as the trainer follows it, with validations that are all below the shared one's margin."""
    lengths = dataclasses.replace(LENGTHS["smoke"], warm_up=40, validate_every=5, alignment=alignment)
    spec = dataclasses.replace(StudySpec.preset("smoke"), lengths=lengths)
    variant = Variant(name="v", has_own_warm_up=True, freeze_vision=alignment == 0)
    for ended in (15, 35, 40):
        own = spec.own_warm_up(variant, 0, ended)
        curriculum, done = Curriculum(plan=own.schedule, switch=own.switch), 0
        while done < curriculum.schedule.num_steps:
            done += 1
            if done % 5 == 0 or done == 40:
                curriculum, _ = curriculum.validated(done, 0.0)
        assert done == ended
        assert own.schedule.num_steps == 40, "the learning rate follows the same plan"


def test_policies_differ_in_nothing_but_the_policy() -> None:
    spec = StudySpec.preset("small")
    plain = {variant.name: dataclasses.replace(spec.training(variant, 0), pruning={}) for variant in spec.variants}
    published = plain.pop("published")
    assert all(training == plain["photon"] for training in plain.values())
    assert dataclasses.replace(published, pruned_draw=plain["photon"].pruned_draw) == plain["photon"]
    assert published.pruned_draw.whole_probability == 0.0, "nobody keeps everything as published"
    assert {variant.policy for variant in spec.variants} == {
        "photon",
        "all",
        "fixed",
        "fixed-blind",
        "slices",
        "pooled",
    }


def test_ablations_differ_from_photon_in_one_thing() -> None:
    spec = StudySpec.preset("ablations")
    base = spec.training(spec.variants[0], 0)
    for variant in spec.variants[1:]:
        training = spec.training(variant, 0)
        changed = {
            field.name
            for field in dataclasses.fields(training)
            if getattr(training, field.name) != getattr(base, field.name)
        }
        assert len(changed) == 1 or (variant.name == "vision-learns-no-alignment" and changed == {"freeze_vision"})
        fields = {field.name for field in dataclasses.fields(PruningConfig)}
        assert set(variant.pruning) <= fields
        assert set(variant.draw) <= {field.name for field in dataclasses.fields(Draw)}
        assert set(variant.lengths) <= {field.name for field in dataclasses.fields(LENGTHS["small"])}


def test_policies_with_a_set_number_keep_the_same_share() -> None:
    variants = StudySpec.preset("small").variants
    shares = {variant.policy: variant.pruning.get("keep_ratio") for variant in variants}
    assert shares == {"photon": None, "all": None} | dict.fromkeys(("fixed", "fixed-blind", "slices", "pooled"), 0.38)


def test_choices() -> None:
    spec = StudySpec.preset("small", seeds=[4], variants=["fixed", "photon"], precision="bfloat16", keep_ratio=0.5)
    assert spec.seeds == (4,)
    assert [variant.name for variant in spec.variants] == ["photon", "fixed"]
    assert spec.variants[1].pruning["keep_ratio"] == 0.5
    assert spec.optimiser.precision == spec.pruned_optimiser.precision == "bfloat16"


def test_the_quick_study_is_one_seed_and_three_policies_unless_others_are_asked_for() -> None:
    spec = StudySpec.preset("quick")
    assert spec.seeds == (0,) and [variant.name for variant in spec.variants] == ["photon", "all", "fixed-blind"]
    assert spec.variants[0] == StudySpec.preset("small").variants[0]
    assert [variant.name for variant in StudySpec.preset("quick", variants=["slices"]).variants] == ["slices"]


def test_ablations_go_on_from_what_a_quick_study_left() -> None:
    quick, ablations = (StudySpec.preset(name, seeds=[0], variants=["photon"]) for name in ("quick", "ablations"))
    assert dataclasses.replace(quick, name="ablations") == ablations


def test_unknown_names_are_refused() -> None:
    for code, call in (
        ("PRESET_UNKNOWN", lambda: StudySpec.preset("large")),
        ("VARIANT_UNKNOWN", lambda: StudySpec.preset("small", variants=["photon", "pruned"])),
    ):
        with pytest.raises(PhotonError) as caught:
            call()
        assert caught.value.code == code
