"""Text to image: models of our own learn to paint labels, pipelines give what diffusers gives, all within limits."""

import base64
import io
import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import NO_CHECKPOINTS, HubClient, Served, build_here, train_here
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Trainer, TrainerCallback

import marble_client
from archiver import __main__ as archiver
from handler import golden
from handler.engine import Engine
from handler.errors import InternalError, InvalidInput, InvalidParameter, RequestError, TooLarge
from handler.messages import Media, Request, Result
from handler.models.label_to_image import Gan, GanConfig, Vae, VaeConfig
from handler.models.pipeline import INDEX, check
from handler.settings import Settings
from handler.tasks import text_to_image as task
from training.base_model import resolve
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks.text_to_image import TextToImage

SIZES = "image_size=8 latent_size=4 hidden_size=8"
TASK = ("--task", "text-to-image")
QUICKLY = ("--per-device-train-batch-size", 16, *NO_CHECKPOINTS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 8 x 8 images for each of two labels: a bright row and a bright column, at some place."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label in ("column", "row"):
        (folder / label).mkdir()
        for number in range(40):
            pixels = random.integers(0, 30, (8, 8), dtype=np.uint8)
            pixels[:, 2 + number % 3] = 250
            Image.fromarray(pixels if label == "column" else pixels.T.copy()).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def vae(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundles") / "vae"
    train_here(
        *(*TASK, "--from-scratch", f"marble-vae {SIZES} kl_weight=1.0", "--train-file", images),
        *("--output-dir", place, "--max-steps", 200, "--learning-rate", 1e-2, "--validation-share", 0.25, *QUICKLY),
    )
    return place


@pytest.fixture(scope="module")
def engine(vae: Path) -> Engine:
    return Engine(vae, threads=1)


def ask(engine: Engine, text: Any, **parameters: Any) -> Result | RequestError:
    [outcome] = engine.predict([Request([text], parameters)])
    return outcome


def painted(outcome: Result | RequestError) -> bytes:
    assert isinstance(outcome, Result), outcome
    [media] = outcome.predictions
    assert isinstance(media, Media)
    assert media.media_type == "image/png"
    return media.content


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        return np.asarray(image).astype(int)


# --- models of our own


def test_a_vae_learns_to_paint_what_it_is_asked_for(vae: Path) -> None:
    scores = json.loads((vae / "metrics.json").read_text())["splits"]["validation"]
    assert scores["rows"] == 20
    assert scores["real_accuracy"] == 1
    assert scores["label_accuracy"] >= 0.9
    assert scores["variety"] > 0.3


def test_a_gan_learns_and_its_last_epoch_is_shipped(images: Path, tmp_path: Path) -> None:
    place = tmp_path / "gan"
    train_here(
        *(*TASK, "--from-scratch", f"marble-gan {SIZES}", "--train-file", images, "--output-dir", place),
        *("--max-steps", 200, "--learning-rate", 5e-3, "--validation-share", 0.25, *QUICKLY),
    )
    scores = json.loads((place / "metrics.json").read_text())["splits"]["validation"]
    assert scores["label_accuracy"] >= 0.8
    assert scores["variety"] > 0.3
    assert AutoModel.from_pretrained(place).critic.score.weight.abs().sum() > 0
    again = tmp_path / "again"
    train_here(*TASK, "--base-model", place, "--output-dir", again)
    assert (again / "model.safetensors").read_bytes() == (place / "model.safetensors").read_bytes()


def test_an_image_depends_on_its_label_and_seed_alone(engine: Engine) -> None:
    labels = ["row", "column", "row"]
    before = torch.random.get_rng_state()
    alone = [painted(ask(engine, label, seed=seed)) for seed, label in enumerate(labels)]
    together = engine.predict([Request([label], {"seed": seed}) for seed, label in enumerate(labels)])
    assert [painted(outcome) for outcome in together] == alone
    assert len({pixels(content).tobytes() for content in alone}) == 3
    [several] = engine.predict([Request(labels, {"seed": 2})])
    assert isinstance(several, Result)
    assert several.predictions[2].content == several.predictions[0].content == alone[2]
    assert several.predictions[1].content != alone[1]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_seed_that_was_drawn_is_in_the_image(engine: Engine) -> None:
    one, other = painted(ask(engine, "row")), painted(ask(engine, "row"))
    assert not np.array_equal(pixels(one), pixels(other))
    seed = int(Image.open(io.BytesIO(one)).text["seed"])  # type: ignore[attr-defined]
    assert painted(ask(engine, "row", seed=seed)) == one


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"width": 8, "height": 8}, "'width' means nothing to this model; it takes: details, overflow, seed"),
        ({"num_inference_steps": 5}, "details, overflow, seed"),
        ({"guidance_scale": 2.0}, "details, overflow, seed"),
        ({"negative_prompt": "blurred"}, "details, overflow, seed"),
        ({"scheduler": "ddim"}, "unknown parameter 'scheduler'"),
        ({"seed": -1}, "at least 0"),
        ({"seed": "one"}, "an integer"),
        ({"overflow": "window"}, "'error' or 'truncate'"),
    ],
)
def test_what_a_label_cannot_honour_is_refused(engine: Engine, parameters: dict[str, Any], said: str) -> None:
    outcome = ask(engine, "row", **parameters)
    assert isinstance(outcome, InvalidParameter)
    assert said in str(outcome)


@pytest.mark.parametrize("text", ["circle", "", "Row", "row "])
def test_an_unknown_label_is_refused_and_the_labels_named(engine: Engine, text: str) -> None:
    outcome = ask(engine, text)
    assert isinstance(outcome, InvalidInput)
    assert "'column', 'row'" in str(outcome)


@pytest.mark.parametrize("value", [3, None, {"text": "row"}, b"\x89PNG"])
def test_anything_but_a_string_is_refused(engine: Engine, value: Any) -> None:
    outcome = ask(engine, value)
    assert isinstance(outcome, RequestError)
    assert outcome.code in (415, 422)


def write_model(folder: Path, model: Any, **settings: Any) -> Path:
    """A bundle of a model with random weights, as far as the engine needs one."""
    model.save_pretrained(folder)
    section = "".join(f"  {name}: {value}\n" for name, value in {"task": "text-to-image", **settings}.items())
    (folder / "model-config.yaml").write_text(f"handler:\n{section}")
    return folder


def test_at_most_twenty_labels_are_named(tmp_path: Path) -> None:
    config = VaeConfig(image_size=8, hidden_size=4, id2label={index: f"label{index:02}" for index in range(30)})
    outcome = ask(Engine(write_model(tmp_path, Vae(config)), threads=1), "none")
    assert "'label19', …" in str(outcome)
    assert "label20" not in str(outcome)


def test_colours(tmp_path: Path) -> None:
    model = Gan(GanConfig(image_size=12, num_channels=3, hidden_size=4))
    engine = Engine(write_model(tmp_path, model), threads=1)
    noise = torch.randn(1, model.config.latent_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        [expected] = model.eval().paint(noise, torch.tensor([1]))
    found = pixels(painted(ask(engine, "LABEL_1", seed=1)))
    assert found.shape == (12, 12, 3)
    assert np.abs(found - expected.permute(1, 2, 0).numpy() * 255).max() <= 0.51


def test_unsound_weights_are_an_error_of_the_server(tmp_path: Path) -> None:
    model = Vae(VaeConfig(image_size=8, hidden_size=4))
    torch.nn.init.constant_(model.painter.label_embedding.weight, torch.nan)
    outcome = ask(Engine(write_model(tmp_path, model), threads=1), "LABEL_0")
    assert isinstance(outcome, InternalError)


def test_golden_images_tell_other_weights(vae: Path, tmp_path: Path) -> None:
    assert golden.replay(Engine(vae), vae / golden.FILE_NAME) == 0
    assert {example["inputs"] for example in golden.read(vae / golden.FILE_NAME)} == {"column", "row"}
    other = tmp_path / "other"
    shutil.copytree(vae, other)
    weights = load_file(other / "model.safetensors")
    weights["painter.layers.0.bias"] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(golden.GoldenMismatch):
        golden.replay(Engine(other), other / golden.FILE_NAME)


def test_drift_overlooks_rounding() -> None:
    grey = np.full((4, 4, 1), 100 / 255, dtype=np.float32)
    one, next_step, two_steps, smaller, colour = (
        base64.b64encode(task.to_png(values, 0)).decode()
        for values in (grey, grey + 1 / 255, grey + 2 / 255, grey[:2], grey.repeat(3, axis=2))
    )
    drift = task.TextToImage.drift
    assert drift(one, one) == drift(one, next_step) == 0
    assert drift(one, two_steps) == pytest.approx(1 / 255)
    assert drift(one, smaller) == drift(one, colour) == float("inf")


def test_scores_tell_right_labels_and_variety() -> None:
    def png(values: np.ndarray) -> bytes:
        return task.to_png(values.astype(np.float32), 0)

    random = np.random.default_rng(0)
    real = {label: random.random((6, 4, 4, 1)) / 4 + shift for label, shift in (("dark", 0.0), ("light", 0.7))}
    targets = [
        {"label": label, "image": base64.b64encode(png(values)).decode()}
        for label, group in real.items()
        for values in group
    ]

    def score(found: list[np.ndarray]) -> dict[str, Any]:
        return TextToImage().score([Media(png(values), "image/png") for values in found], targets, ["dark", "light"])

    same = score([*real["dark"], *real["light"]])
    assert same == {"rows": 12, "label_accuracy": 1.0, "real_accuracy": 1.0, "variety": pytest.approx(1.0)}
    swapped = score([*real["light"], *real["dark"]])
    assert swapped["label_accuracy"] == 0
    alike = score([real["dark"][0]] * 12)
    assert alike["label_accuracy"] == 0.5
    assert alike["variety"] == pytest.approx(0, abs=1e-6)


def test_painter_and_critic_learn_from_their_own_losses_alone() -> None:
    torch.manual_seed(0)
    model = Gan(GanConfig(image_size=8, hidden_size=4, latent_size=4)).train()
    real, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1])
    torch.manual_seed(1)
    loss = model(real, labels)["loss"]
    loss.backward()
    torch.manual_seed(1)
    fake = model.paint(torch.randn(6, 4), labels)
    painter_loss = functional.softplus(model.critic(real, labels) - model.critic(fake, labels)).mean()
    critic_loss = torch.zeros(())
    scores = []
    for images in (real, fake.detach()):
        images = images.clone().requires_grad_()
        scores.append(model.critic(images, labels))
        [slope] = torch.autograd.grad(scores[-1].sum(), images, create_graph=True)
        critic_loss = critic_loss + model.config.gradient_penalty / 2 * slope.square().sum() / 6
    critic_loss = critic_loss + functional.softplus(scores[1] - scores[0]).mean()
    assert loss.item() == pytest.approx((painter_loss + critic_loss).item(), rel=1e-5)
    for part, expected in ((model.painter, painter_loss), (model.critic, critic_loss)):
        parameters = list(part.parameters())
        gradients = torch.autograd.grad(expected, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert torch.allclose(parameter.grad, gradient, atol=1e-6)


class Stop(TrainerCallback):
    """Ends training after a number of steps, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_save = state.global_step == self.step


@pytest.mark.parametrize("kind", ["marble-vae", "marble-gan"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(images: Path, tmp_path: Path, kind: str) -> None:
    def trainer() -> Trainer:
        torch.manual_seed(0)
        training = TextToImage()
        options = Options(task="text-to-image", train_file=str(images), from_scratch=f"{kind} {SIZES}")
        base = resolve(None, options.from_scratch)
        splits = training.read(options, 0, base)
        model, processor = training.load(base, splits, options)
        arguments = TrainerOptions(
            output_dir=str(tmp_path / kind),
            max_steps=6,
            num_train_epochs=1.0,
            learning_rate=1e-4,
            save_strategy="no",
            eval_strategy="no",
            load_best_model_at_end=False,
        )
        return training.trainer(model, processor, splits, options, arguments, {})

    whole = trainer()
    whole.train()
    halved = trainer()
    halved.add_callback(Stop(3))
    halved.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / kind / "checkpoint-3"))
    expected = whole.model.state_dict()
    assert any(not torch.equal(value, expected[name]) for name, value in halved.model.state_dict().items())
    for name, value in resumed.model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


# --- diffusers pipelines


def class_pipeline(folder: Path) -> Path:
    """A tiny class-conditional pipeline with random weights."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
    )
    autoencoder = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=2, sample_size=8)
    DiTPipeline(transformer, autoencoder, DDIMScheduler()).save_pretrained(folder)
    index = json.loads((folder / INDEX).read_text())
    names = {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus"}
    (folder / INDEX).write_text(json.dumps({**index, "id2label": names}))
    return folder


def text_pipeline(folder: Path) -> Path:
    """A tiny Stable Diffusion with random weights and a tokenizer of single characters."""
    torch.manual_seed(0)
    characters = [*string.ascii_lowercase, ",", "."]
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=16
    )
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        *(autoencoder, encoder, tokenizer, unet, scheduler), None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def class_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_pipeline(tmp_path_factory.mktemp("pipelines") / "dit")


@pytest.fixture(scope="module")
def text_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipeline(tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture(scope="module")
def class_bundle(class_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundles") / "classes"
    train_here(*TASK, "--base-model", class_source, "--output-dir", place)
    return place


@pytest.fixture(scope="module")
def text_bundle(text_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundles") / "texts"
    train_here(*TASK, "--base-model", text_source, "--output-dir", place)
    return place


@pytest.fixture(scope="module")
def class_engine(class_bundle: Path) -> Engine:
    return Engine(class_bundle, threads=1, max_inference_steps=4)


@pytest.fixture(scope="module")
def text_engine(text_bundle: Path) -> Engine:
    return Engine(text_bundle, threads=1, max_inference_steps=4)


def by_diffusers(folder: Path, seed: int, **inputs: Any) -> np.ndarray:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    [image] = pipeline(**inputs, generator=torch.Generator().manual_seed(seed)).images
    return np.asarray(image).astype(int)


def test_a_class_pipeline_gives_what_diffusers_gives(class_engine: Engine, class_source: Path) -> None:
    for name, index in (("goldfish", 1), ("Carassius auratus", 1), ("tench", 0)):
        found = pixels(painted(ask(class_engine, name, seed=3, num_inference_steps=2, guidance_scale=1.5)))
        inputs = {"class_labels": [index], "num_inference_steps": 2, "guidance_scale": 1.5}
        assert np.abs(found - by_diffusers(class_source, 3, **inputs)).max() <= 1
    # Without a number, the pipeline's own would be over the limit.
    found = pixels(painted(ask(class_engine, "tench", seed=3)))
    assert np.abs(found - by_diffusers(class_source, 3, class_labels=[0], num_inference_steps=4)).max() <= 1


def test_a_text_pipeline_gives_what_diffusers_gives(text_engine: Engine, text_source: Path) -> None:
    parameters = {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "bad", "width": 24, "height": 16}
    result = ask(text_engine, "a red bike", seed=5, **parameters)
    found = pixels(painted(result))
    assert found.shape == (16, 24, 3)
    assert np.abs(found - by_diffusers(text_source, 5, prompt="a red bike", **parameters)).max() <= 1
    assert isinstance(result, Result)
    assert (result.usage.tokens, result.usage.truncated) == (10, False)


def test_pipelines_are_bundled_as_they_are(class_source: Path, class_bundle: Path) -> None:
    files = [path.relative_to(class_source) for path in class_source.rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        assert (class_bundle / file).read_bytes() == (class_source / file).read_bytes()
    examples = golden.read(class_bundle / golden.FILE_NAME)
    assert [example["inputs"] for example in examples] == ["tench", "Tinca tinca"]
    assert golden.replay(Engine(class_bundle, threads=1), class_bundle / golden.FILE_NAME) == 0


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"num_inference_steps": 5}, "at most 4"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"width": 16}, "together"),
        ({"width": 12, "height": 12}, "multiples of 8"),
        ({"width": 2048, "height": 2048}, "pixels"),
        ({"guidance_scale": -1.0}, "at least 0"),
        ({"negative_prompt": "x" * 10_001}, "10000 characters"),
    ],
)
def test_limits_of_a_pipeline(text_engine: Engine, parameters: dict[str, Any], said: str) -> None:
    outcome = ask(text_engine, "a", **{"num_inference_steps": 1, **parameters})
    assert isinstance(outcome, InvalidParameter)
    assert said in str(outcome)


def test_what_a_pipeline_does_not_take_is_refused(class_engine: Engine) -> None:
    outcome = ask(class_engine, "tench", width=16, height=16)
    assert isinstance(outcome, InvalidParameter)
    assert "it takes: details, guidance_scale, num_inference_steps, overflow, seed" in str(outcome)
    assert "'tench', 'Tinca tinca'" in str(ask(class_engine, "cat"))


def test_a_long_text_is_cut_only_where_that_is_wanted(text_engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    text = "secret " * 4
    outcome = ask(text_engine, text, num_inference_steps=1)
    assert isinstance(outcome, TooLarge)
    assert "26 tokens and the model takes 16" in str(outcome)
    assert isinstance(ask(text_engine, "a", negative_prompt=text), TooLarge)
    result = ask(text_engine, text, num_inference_steps=1, overflow="truncate", seed=1)
    assert isinstance(result, Result)
    assert result.usage.truncated
    longer = ask(text_engine, f"{text} end", num_inference_steps=1, overflow="truncate", seed=1)
    assert painted(result) == painted(longer)
    printed = capfd.readouterr()
    assert "secret" not in printed.out + printed.err


def test_what_the_safety_checker_withholds_is_an_error(text_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Withheld:
        nsfw_content_detected = (True,)
        images = (np.zeros((8, 8, 3), dtype=np.float32),)

    monkeypatch.setattr(text_engine.task._artist, "_pipeline", lambda **_: Withheld)  # type: ignore[attr-defined]
    monkeypatch.setattr(text_engine.task._artist, "tokens", lambda _: (1, None))  # type: ignore[attr-defined]
    outcome = ask(text_engine, "a")
    assert isinstance(outcome, InvalidInput)
    assert "safety checker" in str(outcome)


def changed(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **entries}))


DANGEROUS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (lambda folder: (folder / "vae" / "model.bin").write_bytes(b""), "pickled weights"),
    "checkpoint": (lambda folder: (folder / "model.ckpt").write_bytes(b""), "pickled weights"),
    "code": (lambda folder: (folder / "vae" / "my_vae.py").write_text(""), "is not run"),
    "custom pipeline": (lambda folder: changed(folder, _class_name=["mine", "Mine"]), "no pipeline of the installed"),
    "no pipeline": (lambda folder: changed(folder, _class_name="AutoencoderKL"), "no pipeline of the installed"),
    "unknown": (lambda folder: changed(folder, _class_name="MyPipeline"), "no pipeline of the installed"),
    "foreign library": (lambda folder: changed(folder, vae=["os", "system"]), "only diffusers and transformers"),
    "path": (lambda folder: changed(folder, vae=["../models", "AutoencoderKL"]), "only diffusers and transformers"),
    "no texts": (lambda folder: changed(folder, _class_name="DDPMPipeline"), "neither of texts nor of classes"),
    "no names": (lambda folder: changed(folder, id2label={}), "have no names"),
    "broken": (lambda folder: (folder / INDEX).write_text("{"), "cannot be read"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "cannot be read"),
}


@pytest.mark.parametrize("kind", DANGEROUS)
def test_a_pipeline_that_could_run_code_is_refused(class_source: Path, tmp_path: Path, kind: str) -> None:
    spoil, said = DANGEROUS[kind]
    folder = tmp_path / "pipeline"
    shutil.copytree(class_source, folder)
    assert list(check(folder)) == ["tench", "Tinca tinca", "goldfish", "Carassius auratus"]
    spoil(folder)
    with pytest.raises(ValueError, match=said):
        check(folder)
    with pytest.raises(UserError, match=f"--base-model pipeline: .*{said}"):
        train_here(*TASK, "--base-model", folder, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write = Settings(task="text-to-image")
    with pytest.raises(ValueError, match=said):
        task.TextToImage(folder, write, {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "needs --from-scratch"),
        (("--from-scratch", "bert", "--train-file", "IMAGES"), "takes marble-vae and marble-gan"),
        (("--from-scratch", "marble-vae image_size=30", "--train-file", "IMAGES"), "not a multiple of 4"),
        (("--from-scratch", "marble-vae latent=3", "--train-file", "IMAGES"), "latent_size"),
        (("--from-scratch", f"marble-vae {SIZES}"), "--train-file"),
        (("--base-model", "PIPELINE", "--train-file", "IMAGES"), "not trained"),
        (("--base-model", "PIPELINE", "--overflow", "window"), "--overflow window"),
        (
            ("--from-scratch", f"marble-gan {SIZES}", "--train-file", "IMAGES", "--early-stopping-patience", 1),
            "does not tell",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    images: Path, class_source: Path, tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    places = {"IMAGES": images, "PIPELINE": class_source}
    given = [places.get(str(argument), argument) for argument in arguments]
    with pytest.raises(UserError, match=said):
        train_here(*TASK, "--output-dir", tmp_path / "out", *given)


def test_it_runs_on_torch_only(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch backend only"):
        Engine(vae, backend="openvino")
    with pytest.raises(UserError, match="text-to-image runs on torch only"):
        archiver.main(["--bundle", str(vae), "--store", str(tmp_path), "--backend", "openvino"])
    with pytest.raises(ValueError, match="not bert"):
        task.TextToImage(tmp_path, Settings(task="text-to-image"), {"model_type": "bert"})


# --- through a real server


@pytest.fixture(scope="module")
def served(vae: Path, class_bundle: Path, shared_store: Path, serve_models: Callable[..., Served]) -> Served:
    build_here(vae, shared_store, "shapes", precision="auto")
    build_here(class_bundle, shared_store, "fish", precision="auto")
    return serve_models("shapes", "fish")


def same_image(found: bytes, expected: bytes) -> bool:
    return bool(np.abs(pixels(found) - pixels(expected)).max() <= 1)


def test_the_hubs_client_gets_an_image(inference_client: HubClient, engine: Engine, class_engine: Engine) -> None:
    image = inference_client("shapes").text_to_image("row", seed=3)
    assert isinstance(image, Image.Image)
    assert np.abs(np.asarray(image).astype(int) - pixels(painted(ask(engine, "row", seed=3)))).max() <= 1
    assert inference_client("shapes").text_to_image("row").size == (8, 8)
    parameters = {"seed": 2, "num_inference_steps": 2, "guidance_scale": 1.0}
    fish = inference_client("fish").text_to_image("goldfish", **parameters)
    expected = pixels(painted(ask(class_engine, "goldfish", **parameters)))
    assert np.abs(np.asarray(fish).astype(int) - expected).max() <= 1
    for refused in ({"width": 8, "height": 8}, {"scheduler": "ddim"}):
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as raised:
            inference_client("shapes").text_to_image("row", **refused)
        assert raised.value.response.status_code == 422
        assert "seed" in raised.value.response.json()["error"]


def test_rest_formats(served: Served, engine: Engine) -> None:
    inputs = {"inputs": "row", "parameters": {"seed": 3}}
    single = served.post("/predictions/shapes", inputs)
    assert single.headers["content-type"] == "image/png"
    details = {"inputs": "row", "parameters": {"seed": 3, "details": True}}
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["row"]}
    encoded = [
        served.post("/predictions/shapes", {**inputs, "inputs": ["row"]}).json()[0],
        served.post("/predictions/shapes", details).json()["predictions"],
        served.post("/v1/models/shapes:predict", {"instances": ["row"], "parameters": {"seed": 3}}).json()[
            "predictions"
        ][0],
        served.post("/v2/models/shapes/infer", {"inputs": [tensor], "parameters": {"seed": 3}}).json()["outputs"][0][
            "data"
        ][0],
    ]
    expected = painted(ask(engine, "row", seed=3))
    for content in (single.content, *map(base64.b64decode, encoded)):
        assert same_image(content, expected)
    mixed = served.post("/predictions/shapes", {**inputs, "inputs": ["row", "circle"]}).json()
    assert same_image(base64.b64decode(mixed[0]), expected)
    assert mixed[1]["code"] == 422
    refused = served.post("/predictions/shapes", {"inputs": "circle"})
    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/json")


def test_the_marble_client_over_rest_and_grpc(served: Served, engine: Engine, shared: Path, same_workers: None) -> None:
    expected = painted(ask(engine, "column", seed=2))
    with served.rest_client() as rest, served.grpc_client() as grpc:
        for client in (rest, grpc):
            answer = client.predict("shapes", "column", {"seed": 2})
            assert same_image(base64.b64decode(str(answer.predictions)), expected)
            assert client.canary("fish") <= 1e-3
            with pytest.raises(marble_client.MarbleError, match="'column', 'row'"):
                client.predict("shapes", "circle")
    texts: list[str] = json.loads((shared / "naughty_strings" / "blns.json").read_text(encoding="utf-8"))
    for start in range(0, len(texts), 64):
        refused = served.post("/predictions/shapes", {"inputs": texts[start : start + 64]})
        assert refused.status_code == 422
