"""The GAN example: who trains on which batch, the pictures, and that it learns something."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import raylit
from tests.two_process.harness import Processes, run_here

MAIN = str(Path(__file__).resolve().parents[2] / "examples" / "02_gan" / "main.py")
Load = Callable[[str], ModuleType]


@pytest.fixture
def gan(load_example: Load) -> ModuleType:
    return load_example("02_gan")


def quiet_trainer(tmp_path: Path, **arguments: object) -> raylit.Trainer:
    return raylit.Trainer(num_workers=0, storage_path=str(tmp_path), enable_progress_bar=False,
                          enable_model_summary=False, seed=0, **arguments)  # fmt: skip


def test_critic_trains_on_five_batches_and_the_generator_on_the_sixth(gan: ModuleType, tmp_path: Path) -> None:
    changed: list[list[str]] = []

    class Watch(raylit.Callback):
        def on_train_batch_start(self, trainer: raylit.Trainer, module: raylit.Module, batch: object) -> None:
            self.before = {name: value.clone() for name, value in module.state_dict().items()}

        def on_train_batch_end(self, trainer: raylit.Trainer, module: raylit.Module) -> None:
            state = module.state_dict()
            changed.append(sorted({name.split(".")[0] for name in state if (state[name] != self.before[name]).any()}))

    loader = gan.digits_loader(16)
    trainer = quiet_trainer(tmp_path, max_epochs=2, limit_train_batches=7, callbacks=[Watch()])
    trainer.fit(gan.Gan(width=16), loader)
    # Twelve batches are two rounds; the second epoch goes on in the middle of the second round.
    assert changed == [*[["critic"]] * 5, ["generator"], *[["critic"]] * 5, ["generator"], ["critic"], ["critic"]]


def test_critic_step_equals_the_same_step_written_by_hand(gan: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(3)
    module, batch = gan.Gan(width=16), torch.rand(8, 64) * 2 - 1
    hand = gan.Gan(width=16)
    hand.load_state_dict(module.state_dict())
    optimizer = torch.optim.Adam(hand.critic.parameters(), lr=4e-4, betas=(0.0, 0.9))
    loader = DataLoader(torch.utils.data.TensorDataset(batch), batch_size=8)

    class Same(raylit.Callback):
        def on_train_batch_start(self, trainer: raylit.Trainer, module: raylit.Module, batch: object) -> None:
            torch.manual_seed(7)

    quiet_trainer(tmp_path, max_epochs=1, callbacks=[Same()]).fit(module, loader)

    torch.manual_seed(7)
    fake = hand.generator(torch.randn(8, 32)).detach()
    share = torch.rand(8, 1)
    between = (share * batch + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(hand.critic(between).sum(), between, create_graph=True)
    penalty = ((gradient.norm(dim=1) - 1) ** 2).mean()
    loss = 10 * penalty - (hand.critic(batch).mean() - hand.critic(fake).mean())
    loss.backward()
    optimizer.step()
    for name, value in hand.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)


class Seeded(raylit.Callback):
    """The same noise in each batch of each rank, however it is run."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(10 * batch_idx + trainer.global_rank)


def pixels_and_gan() -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)
    gan = runpy.run_path(MAIN)["Gan"](width=16, picture_every=100)
    return torch.rand(6 * 2 * 4, 64) * 2 - 1, gan


def train_as_a_worker(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    pixels, gan = pixels_and_gan()
    gan.on_train_epoch_end = lambda: None  # no pictures
    loader = DataLoader(torch.utils.data.TensorDataset(pixels), batch_size=4)
    return run_here(gan, loader, rank=rank, world_size=world_size, callbacks=[Seeded()]).weights


def test_two_workers_average_the_gradients_of_the_penalty_too(two: Processes) -> None:
    first, second = two(train_as_a_worker)
    pixels, gan = pixels_and_gan()
    parts = (gan.critic, gan.generator)
    optimizers = [torch.optim.Adam(part.parameters(), lr=4e-4, betas=(0.0, 0.9)) for part in parts]
    for batch_idx in range(6):
        for rank in range(2):
            torch.manual_seed(10 * batch_idx + rank)
            real = pixels[8 * batch_idx + 4 * rank :][:4]
            fake = gan.generator(torch.randn(4, 32))
            if batch_idx == 5:
                loss = -gan.critic(fake).mean()
            else:
                fake, share = fake.detach(), torch.rand(4, 1)
                between = (share * real + (1 - share) * fake).requires_grad_()
                (gradient,) = torch.autograd.grad(gan.critic(between).sum(), between, create_graph=True)
                penalty = ((gradient.norm(dim=1) - 1) ** 2).mean()
                loss = 10 * penalty - gan.critic(real).mean() + gan.critic(fake).mean()
            (loss / 2).backward()
        optimizers[batch_idx == 5].step()
        gan.zero_grad()
    for name, value in gan.named_parameters():
        torch.testing.assert_close(first[name], value.detach(), msg=name)
        torch.testing.assert_close(second[name], value.detach(), msg=name)


def test_pictures_are_written_every_few_epochs_and_at_the_end(gan: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    trainer = quiet_trainer(tmp_path, max_epochs=3, limit_train_batches=2)
    result = trainer.fit(gan.Gan(width=16, picture_every=2), gan.digits_loader(16))
    pictures = sorted(Path(result.path).glob("*.png"))
    assert [p.name for p in pictures] == ["samples_002.png", "samples_003.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (320, 320)
    events = b"".join(p.read_bytes() for p in Path(result.path).glob("events*"))
    assert events.count(b"samples") == 2


def test_a_run_that_keeps_nothing_draws_no_pictures(gan: ModuleType, tmp_path: Path) -> None:
    quiet_trainer(tmp_path, fast_dev_run=6).fit(gan.Gan(width=16), gan.digits_loader(16))
    assert not list(tmp_path.iterdir())


def test_sheet_puts_picture_n_at_row_and_column(gan: ModuleType) -> None:
    pixels = torch.full((64, 64), -1.0)
    pixels[11] = 1.0  # the second row's fourth picture
    sheet = gan.sheet(pixels)
    assert sheet.shape == (80, 80)
    assert sheet[11:19, 31:39].eq(1).all()
    assert sheet.sum() == 64


def test_runs_as_a_script(run_script: Callable[..., str]) -> None:
    out = run_script("02_gan", "--num-workers", "0", "--max-epochs", "1", "--batch-size", "256")
    assert "critic's distance between real and made-up digits: " in out
    assert "samples_001.png" in out
