"""Two small models that paint an image for a label: a conditional variational autoencoder and a conditional GAN.

Both are transformers models: importing this module makes `AutoConfig` and `AutoModel` know the types marble-vae and
marble-gan. `forward` gives the loss to train with, `paint` makes images.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel


@strict
class LabelToImageConfig(PreTrainedConfig):
    """image_size: pixels of a side, a multiple of 4. num_channels: 1 (grey) or 3 (RGB).

    latent_size: random numbers that an image is made from. hidden_size: channels of the widest feature maps but one.
    """

    image_size: int = 28
    num_channels: int = 1
    latent_size: int = 32
    hidden_size: int = 32

    def validate_sizes(self) -> None:
        """Raises ValueError for sizes that no model can be built from."""
        if self.image_size < 4 or self.image_size % 4:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 4")
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels {self.num_channels} is neither 1 (grey) nor 3 (RGB)")


@strict
class VaeConfig(LabelToImageConfig):
    """kl_weight: how much nearness to the prior counts; a higher one makes images that are tidier and vary less."""

    model_type = "marble-vae"

    kl_weight: float = 4.0


@strict
class GanConfig(LabelToImageConfig):
    """gradient_penalty: how smooth the critic must be around real and painted images."""

    model_type = "marble-gan"

    gradient_penalty: float = 0.2


class LabelToImage(PreTrainedModel):
    """What both models have: a painter, from random numbers and a label to pixels."""

    base_model_prefix = ""

    def __init__(self, config: LabelToImageConfig) -> None:
        super().__init__(config)
        self.painter = Painter(config)

    def paint(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images float [batch, channels, height, width], 0 to 1.

        noise: float [batch, latent_size], normally distributed; labels: int64 [batch], class indices.
        """
        return torch.sigmoid(self.painter(noise, labels))

    def _init_weights(self, module: nn.Module) -> None:
        """Weights start as torch's own layers start."""
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


class Vae(LabelToImage):
    """A conditional variational autoencoder (Kingma and Welling 2014; Sohn et al. 2015)."""

    config_class = VaeConfig

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        self.features = _features(config)
        self.label_embedding = nn.Embedding(_classes(config), config.latent_size)
        self.posterior = nn.Linear(_feature_size(config) + config.latent_size, 2 * config.latent_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The negative evidence lower bound per pixel, its second term weighted.

        pixel_values: float [batch, channels, height, width], 0 to 1; labels: int64 [batch].
        """
        features = torch.cat([self.features(pixel_values), self.label_embedding(labels)], dim=1)
        mean, log_variance = self.posterior(features).float().chunk(2, dim=1)
        spread = torch.randn_like(mean) * (log_variance / 2).exp() if self.training else 0
        painted = self.painter(mean + spread, labels).float()
        difference = functional.binary_cross_entropy_with_logits(painted, pixel_values)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean() / 2
        return {"loss": difference + self.config.kl_weight * divergence / pixel_values[0].numel()}


class Gan(LabelToImage):
    """A conditional generative adversarial network with the relativistic loss and both gradient penalties of R3GAN
    (Huang et al. 2024), which learn steadily without tricks."""

    config_class = GanConfig

    def __init__(self, config: GanConfig) -> None:
        super().__init__(config)
        self.critic = Critic(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of painter and critic added up: neither has gradients for the parameters of the other.

        pixel_values: float [batch, channels, height, width], 0 to 1; labels: int64 [batch].
        """
        # Second derivatives need full precision.
        with torch.autocast(pixel_values.device.type, enabled=False):
            noise = torch.randn(len(labels), self.config.latent_size, device=labels.device)
            painted = self.paint(noise, labels)
            frozen = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
            real_score = functional_call(self.critic, frozen, (pixel_values, labels))
            painter_loss = functional.softplus(real_score - functional_call(self.critic, frozen, (painted, labels)))
            real_score, real_penalty = self._judge(pixel_values, labels)
            painted_score, painted_penalty = self._judge(painted.detach(), labels)
            critic_loss = functional.softplus(painted_score - real_score)
            penalty = self.config.gradient_penalty / 2 * (real_penalty + painted_penalty)
            return {"loss": (painter_loss + critic_loss + penalty).mean()}

    def _judge(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The critic's scores and the squares of their gradients' lengths, both [batch]."""
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            scores = self.critic(images, labels)
            [gradients] = torch.autograd.grad(scores.sum(), images, create_graph=self.training)
        return scores, gradients.square().sum(dim=(1, 2, 3))


class Painter(nn.Module):
    """Random numbers [batch, latent_size] and labels [batch] to logits of pixels [batch, channels, height, width]."""

    def __init__(self, config: LabelToImageConfig) -> None:
        super().__init__()
        width, side = config.hidden_size, config.image_size // 4
        self.label_embedding = nn.Embedding(_classes(config), config.latent_size)
        self.layers = nn.Sequential(
            nn.Linear(2 * config.latent_size, 2 * width * side**2),
            nn.Unflatten(1, (2 * width, side, side)),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, config.num_channels, kernel_size=4, stride=2, padding=1),
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        pixels: Tensor = self.layers(torch.cat([noise, self.label_embedding(labels)], dim=1))
        return pixels


class Critic(nn.Module):
    """Images [batch, channels, height, width] and labels [batch] to scores [batch]: higher for real images.

    How much the images of a batch differ is one of its features: a painter that always paints the same is found out.
    """

    size = 128

    def __init__(self, config: LabelToImageConfig) -> None:
        super().__init__()
        self.features = nn.Sequential(_features(config), nn.Linear(_feature_size(config), self.size), nn.LeakyReLU(0.2))
        self.score = nn.Linear(self.size + 1, 1)
        self.label_embedding = nn.Embedding(_classes(config), self.size)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        features = self.features(images)
        variety = features.std(dim=0, correction=0).mean().expand(len(features), 1)
        score = self.score(torch.cat([features, variety], dim=1))[:, 0]
        # Whether it is an image of its label: a projection (Miyato and Koyama 2018).
        fit = (self.label_embedding(labels) * features).sum(dim=1) / self.size**0.5
        total: Tensor = score + fit
        return total


def _features(config: LabelToImageConfig) -> nn.Sequential:
    """Images [batch, channels, height, width] to features [batch, `_feature_size`]."""
    width = config.hidden_size
    return nn.Sequential(
        nn.Conv2d(config.num_channels, width, kernel_size=4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
    )


def _classes(config: LabelToImageConfig) -> int:
    return len(config.id2label or ())


def _feature_size(config: LabelToImageConfig) -> int:
    return int(2 * config.hidden_size * (config.image_size // 4) ** 2)


_TYPES: tuple[tuple[Any, Any], ...] = ((VaeConfig, Vae), (GanConfig, Gan))
MODEL_TYPES = tuple(str(config.model_type) for config, _ in _TYPES)
for _config, _model in _TYPES:
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
