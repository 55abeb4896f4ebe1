"""AUTOMATIC1111's API: its clients get images, and what cannot be honoured is named."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve_app.gateway.sdapi.fields import (
    MOST_NAMED,
    REJECTED,
    SETTINGS,
)
from serve_app.protocol.loras import LoraStatus
from tests.fakes.backend import INFO
from tests.gateway.sdapi.clients import OPEN_WEBUI, SILLYTAVERN, TEXT_TO_IMAGE
from tests.gateway.sdapi.gateway import SMALL, Backend, answered, client_of, rejected, warnings_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
async def test_the_bodies_of_clients_give_an_image(
    client: httpx.AsyncClient, backend: Backend, name: str
) -> None:
    body = TEXT_TO_IMAGE[name]
    answer = await answered(client, **body)
    [file] = answer["files"]
    info = answer["info"]
    assert (file.format, file.size) == ("PNG", (64, 64))
    [params] = backend.received
    assert (params.prompt, params.negative_prompt) == ("a red circle", "a square")
    assert params.num_inference_steps == info["steps"] == 8
    assert params.guidance_scale == info["cfg_scale"] == body.get("cfg_scale")
    assert info["seed"] == params.seed == info["all_seeds"][0]
    assert (info["width"], info["height"], info["prompt"]) == (64, 64, "a red circle")
    assert info["negative_prompt"] == "a square"
    assert info["infotexts"] == [file.info["parameters"]]
    assert isinstance(info["sampler_name"], str)


async def test_sillytavern_is_told_what_has_no_effect_and_its_secret_is_not_repeated(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    answer = await answered(client, **SILLYTAVERN)
    for name in ("denoising_strength", "hr_scale", "save_images", "auth", "url"):
        assert name in warnings_of(answer)
    assert "scheduler 'normal'" in warnings_of(answer)
    assert "enable_hr" not in warnings_of(answer)
    assert "secret" not in json.dumps([answer["info"], answer["parameters"]])
    assert backend.received[0].noise_scheduler == "ddim"
    assert backend.received[0].strength is None


async def test_open_webui_reads_options_changes_the_model_and_sends_all_of_them_back(
    client: httpx.AsyncClient,
) -> None:
    options = (await client.get("/options")).json()
    assert options["sd_model_checkpoint"] == "demo"
    listed = (await client.get("/sd-models")).json()
    assert [(model["title"], model["model_name"]) for model in listed] == [("demo", "demo")]
    assert (await client.post("/options", json=options)).json() is None
    other = options | {"sd_model_checkpoint": "sdxl"}
    error = await rejected(client, "/options", 404, **other)
    assert error["param"] == "sd_model_checkpoint"
    assert "'demo'" in error["message"]
    assert warnings_of(await answered(client, **OPEN_WEBUI)) == ""


async def test_sillytavern_finds_its_lists(client: httpx.AsyncClient, backend: Backend) -> None:
    async def names(path: str, field: str = "name") -> list[str]:
        return [item[field] for item in (await client.get(path)).json()]

    assert await names("/samplers") == ["Automatic", "Euler", "DDIM"]
    assert await names("/schedulers") == ["automatic", "karras"]
    assert await names("/upscalers") == ["None"]
    for path in ("/latent-upscale-modes", "/sd-vae", "/sd-modules"):
        assert await names(path) == []
    assert await names("/loras") == ["pixel", "ink"]
    backend.info = replace(backend.info, loras_on_demand=True)
    backend.adapters = (LoraStatus("pixel", False, 1), LoraStatus("styles/oil", True, 0))
    assert await names("/loras") == ["pixel", "styles/oil"]
    assert (await client.get("/embeddings")).json() == {"loaded": {}, "skipped": {}}
    assert (await client.get("/memory")).json().keys() == {"ram", "cuda"}
    idle = (await client.get("/progress?skip_current_image=true")).json()
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)
    assert (await client.post("/interrupt")).json() == {}


async def test_the_api_is_off_by_default(backend: Backend) -> None:
    async with client_of(backend, sdapi=False) as client:
        assert (await client.post("/txt2img", json=SMALL)).status_code == 404
        assert (await client.get("/options")).status_code == 404


async def test_several_images_have_seeds_one_after_the_other(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    answer = await answered(client, prompt="x", seed=5, batch_size=2, n_iter=2)
    assert answer["info"]["all_seeds"] == [5, 6, 7, 8]
    assert [params.seed for params in backend.received] == [5, 6, 7, 8]
    texts = [file.info["parameters"] for file in answer["files"]]
    assert [f"Seed: {seed}," in text for seed, text in zip(range(5, 9), texts, strict=True)]
    assert len(set(texts)) == 4
    error = await rejected(client, prompt="x", batch_size=2, n_iter=3)
    assert "batch_size * n_iter must be from 1 to 4; it is 6" in error["message"]
    drawn = [(await answered(client, prompt="x", seed=-1))["info"]["seed"] for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert min(drawn) >= 0


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        (None, None, None),
        ("", "", None),
        ("automatic", "Automatic", None),
        ("Euler", None, "euler"),
        ("k_euler", "automatic", "euler"),
        ("DDIM", "Uniform", "ddim"),
        ("Euler", "Karras", "euler_karras"),
        ("Euler Karras", None, "euler_karras"),
        ("euler karras", "automatic", "euler_karras"),
    ],
)
async def test_samplers_are_noise_schedulers(
    client: httpx.AsyncClient,
    backend: Backend,
    sampler: str | None,
    scheduler: str | None,
    expected: str | None,
) -> None:
    answer = await answered(client, **SMALL, sampler_name=sampler, scheduler=scheduler)
    assert backend.received[0].noise_scheduler == expected
    text = answer["files"][0].info["parameters"]
    assert ("Schedule type: Karras" in text) == (expected == "euler_karras")
    assert answer["info"]["sampler_name"] == {None: "Automatic", "ddim": "DDIM"}.get(
        expected, "Euler"
    )
    await answered(client, **SMALL, sampler_index=sampler)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "param", "known"),
    [
        ("Heun", None, "sampler_name", "Automatic, Euler, DDIM"),
        ("DPM++ SDE Karras", None, "sampler_name", "Automatic, Euler, DDIM"),
        ("DDIM", "Karras", "scheduler", "Automatic, Karras with Euler"),
        (None, "Karras", "scheduler", "Automatic, Karras with Euler"),
        ("Euler", "Beta", "scheduler", "Automatic, Karras with Euler"),
        ("x" * 5000, None, "sampler_name", "Automatic"),
    ],
)
async def test_a_sampler_that_is_not_here_is_named_with_those_that_are(
    client: httpx.AsyncClient, sampler: str | None, scheduler: str | None, param: str, known: str
) -> None:
    error = await rejected(client, **SMALL, sampler_name=sampler, scheduler=scheduler)
    assert error["param"] == param
    assert known in error["message"]
    assert len(error["message"]) < 400


async def test_adapters_in_the_prompt_are_used_and_taken_out_of_it(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    prompt = "a <lora:ink:0.8> cat <lora:pixel>"
    answer = await answered(client, prompt=prompt)
    [params] = backend.received
    assert params.lora == (("ink", 0.8), ("pixel", 1.0))
    assert params.prompt == "a  cat"
    assert answer["info"]["prompt"] == prompt
    assert answer["files"][0].info["parameters"].startswith(prompt)
    plain = "a <b> cat, a<b, 2>1 <i:x>"
    await answered(client, prompt=plain)
    assert backend.received[-1].prompt == plain


@pytest.mark.parametrize(
    ("prompt", "status", "message"),
    [
        ("x <lora:none:1>", 404, "there are pixel, ink"),
        ("x <lora:ink:a>", 400, "one scale"),
        ("x <lora:ink:nan>", 400, "one scale"),
        ("x <lora:ink:0.5:0.7>", 400, "one scale"),
        ("x <lora:ink:11>", 400, "from -10 to 10"),
        ("x <lora:ink:1><lora:ink:1>", 400, "twice"),
        ("x <hypernet:ink:1>", 400, "hypernetworks"),
        ("<lora:ink:1>", 400, "must not be empty"),
        ("", 400, "must not be empty"),
    ],
)
async def test_wrong_adapters_are_named(
    client: httpx.AsyncClient, prompt: str, status: int, message: str
) -> None:
    error = await rejected(client, status=status, prompt=prompt)
    assert error["param"] == "prompt"
    assert message in error["message"]


async def test_weights_in_the_prompt_get_a_warning(client: httpx.AsyncClient) -> None:
    assert "(word:1.2)" in warnings_of(await answered(client, prompt="a (red:1.3) circle"))
    assert warnings_of(await answered(client, prompt="a (red) circle: 3")) == ""


ON: dict[str, Any] = {
    "alwayson_scripts": {"ADetailer": {"args": [True, {"ad_model": "face"}]}},
    "clip_skip": 2,
    "disable_extra_networks": True,
    "enable_hr": True,
    "eta": 0.5,
    "infotext": "Steps: 3",
    "initial_noise_multiplier": 1.5,
    "inpainting_fill": 2,
    "refiner_checkpoint": "refiner",
    "resize_mode": 3,
    "restore_faces": True,
    "s_churn": 0.5,
    "s_min_uncond": 0.5,
    "script_name": "x/y plot",
    "seed_resize_from_h": 512,
    "seed_resize_from_w": 512,
    "styles": ["anime"],
    "subseed_strength": 0.1,
    "tiling": True,
}
"""A value that changes the image, of each field that cannot be honoured."""


async def test_every_field_that_cannot_be_honoured_is_named(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    assert ON.keys() == REJECTED.keys()
    for name, value in ON.items():
        error = await rejected(client, **SMALL, **{name: value})
        assert error["param"] == name
        assert error["message"].startswith(f"{name}: ")
    assert (await rejected(client, **SMALL, send_images=False))["param"] == "send_images"
    assert backend.received == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CLIP_stop_at_last_layers", 2),
        ("sd_vae", "other.safetensors"),
        ("forge_additional_modules", ["vae"]),
        ("samples_format", "jpg"),
        ("eta_noise_seed_delta", 31337),
        ("x" * 1000, 1),
    ],
)
async def test_settings_that_cannot_be_honoured_are_named(
    client: httpx.AsyncClient, name: str, value: Any
) -> None:
    settings = {name: value}
    error = await rejected(client, **SMALL, override_settings=settings)
    assert error["param"] == f"override_settings.{name}"[:100]
    error = await rejected(client, "/options", **settings)
    assert error["param"] == name[:100]


async def test_settings_that_are_off_or_of_files_are_accepted(client: httpx.AsyncClient) -> None:
    off = {name: rule.off[0] for name, rule in SETTINGS.items() if rule.off}
    settings = off | {"sd_model_checkpoint": "demo", "grid_save": True, "eta_ancestral": None}
    answer = await answered(client, **SMALL, override_settings=settings)
    assert warnings_of(answer) == "fields without effect here: override_settings.grid_save."
    assert (await client.post("/options", json=settings)).status_code == 200
    error = await rejected(
        client, status=404, **SMALL, override_settings={"sd_model_checkpoint": "sdxl"}
    )
    assert error["param"] == "sd_model_checkpoint"


async def test_acceleration_is_a_setting_of_one_request(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    await answered(client, **SMALL, override_settings={"acceleration": "fast"})
    assert backend.received[-1].acceleration == "fast"
    await answered(client, **SMALL)
    assert backend.received[-1].acceleration == "none"
    error = await rejected(client, **SMALL, override_settings={"acceleration": ["fast"]})
    assert error["message"].endswith("must be one of none, balanced, fast.")
    assert error["param"] == "override_settings.acceleration"
    error = await rejected(client, "/options", acceleration="fast")
    assert error["param"] == "acceleration"


async def test_unknown_fields_are_named_up_to_a_number(client: httpx.AsyncClient) -> None:
    many: dict[str, Any] = {f"stray_{number:03}": number for number in range(100)} | {"n" * 1000: 1}
    warning = warnings_of(await answered(client, **SMALL, **many))
    assert "stray_000" in warning
    assert "…" in warning
    assert warning.count("stray_") == MOST_NAMED


@pytest.mark.parametrize(
    ("field", "value", "status", "message"),
    [
        ("steps", 99, 400, "steps must be from 1 to 50"),
        ("steps", 0, 400, "steps: "),
        ("steps", "many", 400, "steps: "),
        ("cfg_scale", 101, 400, "cfg_scale: "),
        ("seed", -2, 400, "seed: "),
        ("seed", 2**63, 400, "seed: "),
        ("seed", 10**400, 400, "seed: "),
        ("width", 63, 400, "multiples of 8"),
        ("width", 4096, 400, "4096"),
        ("height", 10**7, 400, "height: "),
        ("prompt", None, 400, "must not be empty"),
        ("prompt", ["x"], 400, "prompt: "),
        ("prompt", "x" * 6000, 400, "characters"),
        ("batch_size", 0, 400, "batch_size: "),
        ("n_iter", 10**30, 400, "n_iter"),
        ("override_settings", [], 400, "override_settings: "),
        ("override_settings", {"sd_model_checkpoint": {"a": 1}}, 404, "no model"),
        ("sampler_name", 5, 400, "sampler_name: "),
    ],
)
async def test_wrong_values_are_named(
    client: httpx.AsyncClient, backend: Backend, field: str, value: Any, status: int, message: str
) -> None:
    error = await rejected(client, status=status, **{**SMALL, field: value})
    assert message in error["message"]
    assert backend.received == []


async def test_numbers_that_are_none_are_not_repeated(client: httpx.AsyncClient) -> None:
    content = b'{"prompt": "x", "stray": Infinity, "override_settings": {"grid_a": NaN}}'
    response = await client.post("/txt2img", content=content)
    assert response.status_code in (200, 400), response.text
    response = await client.post("/txt2img", content=b'{"prompt": "x", "cfg_scale": NaN}')
    assert response.status_code == 400, response.text


async def test_the_examples_of_the_description_are_true(client: httpx.AsyncClient) -> None:
    described = (await client.get("http://test/openapi.json")).json()
    for path in ("/txt2img", "/img2img"):
        content = described["paths"][f"/sdapi/v1{path}"]["post"]["requestBody"]["content"]
        fields = content["application/json"]["schema"]["properties"].items()
        body = {name: field["examples"][0] for name, field in fields if "examples" in field}
        assert {"prompt", "steps"} < body.keys()
        await answered(client, path, **body)


async def test_numbers_may_come_as_text(client: httpx.AsyncClient, backend: Backend) -> None:
    await answered(client, prompt="x", steps="8", cfg_scale="7", width="32", height=32.0, seed="3")
    [params] = backend.received
    assert (params.num_inference_steps, params.guidance_scale) == (8, 7.0)
    assert (params.width, params.height, params.seed) == (32, 32, 3)


async def test_a_side_that_is_left_out_is_the_models(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    await answered(client, **SMALL, width=32)
    assert (backend.received[0].width, backend.received[0].height) == (32, INFO.default_height)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("path", ["/txt2img", "/img2img", "/options"])
async def test_a_body_that_is_no_object_is_an_error(
    backend: Backend, path: str, content: bytes
) -> None:
    async with client_of(backend) as client:
        response = await client.post(path, content=content)
        assert response.status_code in (400, 413), response.text
        assert response.json()["detail"]
