"""Made-up digits: a Wasserstein GAN on scikit-learn's 1,797 scanned digits of 8 x 8 pixels.

    python main.py --num-workers 0                     in this process, without Ray
    python main.py --num-workers 2                     two Ray workers, DDP

Two optimizers with frequencies: the critic trains on five batches, then the generator on one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit

CRITIC, GENERATOR = 0, 1  # optimizer_idx: the order in which configure_optimizers returns them
PASSES = 10  # over the 1,797 pictures in what is called an epoch here: one pass is 0.2 seconds


def digits_loader(batch_size: int) -> DataLoader:
    """Return batches of pictures (batch, 64), from -1 (paper) to 1 (ink)."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    return DataLoader(TensorDataset(pixels.repeat(PASSES, 1)), batch_size=batch_size, shuffle=True)


class Gan(raylit.Module):
    """A generator and a critic of three linear layers each; the critic's gradient is held near 1 (WGAN-GP)."""

    def __init__(self, lr: float = 4e-4, latent: int = 32, width: int = 256, penalty: float = 10.0,
                 critic_steps: int = 5, picture_every: int = 10) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.generator = nn.Sequential(
            nn.Linear(latent, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Linear(width, 64), nn.Tanh(),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )
        # The same noise in each picture, so that one can watch a digit take shape.
        self.register_buffer("noise", torch.randn(64, latent))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: list[Tensor], batch_idx: int, optimizer_idx: int) -> Tensor:
        (real,) = batch
        noise = torch.randn(len(real), self.hparams.latent, device=self.device)
        if optimizer_idx == GENERATOR:
            return -self.critic(self(noise)).mean()
        with torch.no_grad():
            fake = self(noise)
        distance = self.critic(real).mean() - self.critic(fake).mean()
        self.log("distance", distance, on_step=False, on_epoch=True, prog_bar=True)
        return self.hparams.penalty * self._gradient_penalty(real, fake) - distance

    def _gradient_penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        share = torch.rand(len(real), 1, device=self.device)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return (gradient.norm(dim=1) - 1).square().mean()

    def on_train_epoch_end(self) -> None:
        epoch = self.current_epoch + 1
        if epoch % self.hparams.picture_every and epoch != self.trainer.max_epochs:
            return
        with torch.no_grad():
            grid = sheet(self(self.noise))
        # On ranks other than 0 the experiment accepts every call and does nothing.
        self.logger.experiment.add_image("samples", grid, self.global_step, dataformats="HW")
        if self.global_rank == 0 and self.trainer.log_dir:  # none in a run that keeps nothing
            save_picture(grid, Path(self.trainer.log_dir) / f"samples_{epoch:03d}.png")

    def configure_optimizers(self) -> list[dict]:
        # beta1 of 0, as in the WGAN-GP paper (Gulrajani et al., 2017).
        critic = torch.optim.Adam(self.critic.parameters(), lr=self.hparams.lr, betas=(0.0, 0.9))
        generator = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=(0.0, 0.9))
        return [
            {"optimizer": critic, "frequency": self.hparams.critic_steps},
            {"optimizer": generator, "frequency": 1},
        ]


def sheet(pixels: Tensor) -> Tensor:
    """Lay out 64 pictures (64, 64 pixels) as one of 8 x 8 pictures, 80 x 80 pixels, 0 (paper) to 1."""
    framed = nn.functional.pad((pixels + 1).div(2).reshape(8, 8, 8, 8), (1, 1, 1, 1))
    return framed.permute(0, 2, 1, 3).reshape(80, 80).cpu()


def save_picture(grid: Tensor, path: Path) -> None:
    """Write the sheet as a PNG, four times as large, ink in black."""
    levels = (255 * (1 - grid)).round().to(torch.uint8).numpy()
    Image.fromarray(levels).resize((320, 320), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, default=0, help="Ray workers; 0: this process, without Ray")
    parser.add_argument("--max-epochs", type=int, default=40, help=f"of {PASSES} passes over the pictures each")
    parser.add_argument("--batch-size", type=int, default=64, help="per worker")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the noise and the order of the pictures")
    args = parser.parse_args()

    raylit.seed_everything(args.seed)
    trainer = raylit.Trainer(num_workers=args.num_workers, max_epochs=args.max_epochs, seed=args.seed)
    result = trainer.fit(Gan(), digits_loader(args.batch_size))
    print(f"critic's distance between real and made-up digits: {result.metrics['distance']:.3f}")
    for picture in sorted(Path(result.path).glob("samples_*.png")):
        print(f"picture: {picture}")


if __name__ == "__main__":
    main()
