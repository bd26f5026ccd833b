import pytest

from distill_core.methods.defaults import STARTING_VALUES
from distill_core.models.backends.diffusers import ARCHITECTURES, DiffusersBackend
from distill_core.models.families import FAMILIES, OTHER_HOST_MODELS, PIPELINES, family_of_host_model, family_of_network
from distill_core.perceptual.weights import SPACES
from distill_core.presets.table import presets


def test_every_other_table_uses_the_names_of_this_one():
    used = {family for preset in presets().values() for family in (*preset.families, *preset.auto)}
    assert used | STARTING_VALUES.keys() | SPACES.keys() <= FAMILIES.keys()


def test_what_a_family_names_exists():
    for family in FAMILIES.values():
        assert (family.pipeline == "") == (family.network == "")
        assert family.pipeline in {"", *PIPELINES} and family.network in {"", *ARCHITECTURES}
        assert family.space is None or family.space.channels == family.channels


def test_every_network_that_can_be_distilled_is_of_one_family():
    networks = [(f.network, tuple(f.network_config.items())) for f in FAMILIES.values() if f.network]
    assert len(set(networks)) == len(networks) and {name for name, _ in networks} == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    "class_name, config, family",
    [
        ("UNet2DConditionModel", {"cross_attention_dim": 768}, "sd15"),
        ("UNet2DConditionModel", {"cross_attention_dim": 1024}, "sd21"),
        ("UNet2DConditionModel", {"cross_attention_dim": 2048}, "sdxl"),
        ("UNet2DConditionModel", {"cross_attention_dim": 32}, None),
        ("SD3Transformer2DModel", {}, "sd3"),
        ("FluxTransformer2DModel", {"guidance_embeds": True}, "flux"),
        ("FluxTransformer2DModel", {"guidance_embeds": False}, "flux-schnell"),
        ("PixArtTransformer2DModel", {}, None),
    ],
)
def test_the_family_of_a_diffusers_network(class_name, config, family):
    assert family_of_network(class_name, config) == family


def test_the_family_of_a_host_model_is_that_of_the_nearest_class_in_the_table():
    assert family_of_host_model(["Flux2", "Flux", "BASE", "object"]) == "flux2"
    assert family_of_host_model(["SSD1B", "SDXL", "BASE", "object"]) == "sdxl"
    assert family_of_host_model([*OTHER_HOST_MODELS, "ZImage", "Lumina2", "BASE", "object"]) is None
    assert family_of_host_model(["BASE", "object"]) is None


@pytest.mark.parametrize(
    "network, changes, family",
    [("unet", {"cross_attention_dim": 768}, "sd15"), ("unet", {}, "unet"), ("sd3", {}, "sd3")],
)
def test_a_lora_says_the_family_of_its_base_where_the_network_tells_it(make_backend, network, changes, family):
    backend: DiffusersBackend = make_backend(network, **changes)
    assert backend.description()["family"] == family
