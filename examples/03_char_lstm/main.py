"""A letter at a time: an LSTM on the help texts that come with Python (``help("topics")``): some 400,000 characters.

    python main.py --num-workers 0                     in this process, without Ray
    python main.py --num-workers 2                     two Ray workers, DDP

Truncated back-propagation through time: a batch of 512 characters is trained in pieces of 64, one optimizer step each,
and the LSTM's state goes from each piece to the next.
"""

from __future__ import annotations

import argparse
import math
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit

State = tuple[Tensor, Tensor]  # of an LSTM: hidden and cell, each (layers, batch, width)


class HelpTexts(raylit.DataModule):
    """Windows of ``window`` characters, each with the characters that follow: (batch, window) twice, as indices."""

    def __init__(self, batch_size: int = 16, window: int = 512) -> None:
        super().__init__()
        self.batch_size, self.window = batch_size, window
        # Some topics repeat others: every paragraph once, or what is validated on would have been trained on.
        self.text = "\n\n".join(dict.fromkeys("\n\n".join(topics.values()).split("\n\n")))
        self.alphabet = "".join(sorted(set(self.text)))

    def setup(self, stage: str) -> None:
        codes = torch.tensor([self.alphabet.index(letter) for letter in self.text])
        cut = len(codes) * 9 // 10  # the last tenth is for validation
        self.train, self.val = self._windows(codes[:cut]), self._windows(codes[cut:])

    def _windows(self, codes: Tensor) -> TensorDataset:
        count = (len(codes) - 1) // self.window
        used = count * self.window
        return TensorDataset(codes[:used].view(count, -1), codes[1 : used + 1].view(count, -1))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)


class CharLstm(raylit.Module):
    """Letter -> vector -> LSTM -> a score for each letter that may come next."""

    def __init__(self, alphabet: str, lr: float = 4e-3, width: int = 256, truncated: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.truncated_bptt_steps = truncated
        self.embedding = nn.Embedding(len(alphabet), 64)
        self.lstm = nn.LSTM(64, width, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.scores = nn.Linear(width, len(alphabet))

    def forward(self, codes: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the scores (batch, time, letters) and the state after the last letter of ``codes`` (batch, time)."""
        hidden, state = self.lstm(self.embedding(codes), state)
        return self.scores(self.dropout(hidden)), state

    def _nats(self, codes: Tensor, following: Tensor, state: State | None) -> tuple[Tensor, State]:
        scores, state = self(codes, state)
        return F.cross_entropy(scores.flatten(0, 1), following.flatten()), state

    def training_step(self, batch: list[Tensor], batch_idx: int, hiddens: State | None) -> dict:
        # hiddens: None in the first piece of a batch, then what the piece before returned, detached.
        loss, state = self._nats(*batch, hiddens)
        self.log("bits_per_char", loss / math.log(2), on_step=False, on_epoch=True, prog_bar=True)
        return {"loss": loss, "hiddens": state}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        # Evaluation gets the whole window, and starts each from an empty state.
        loss, _ = self._nats(*batch, None)
        self.log("val_bits_per_char", loss / math.log(2), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        # The mean over all letters of all workers is there by now; a mean of perplexities would be another number.
        self.log("val_perplexity", 2 ** self.trainer.callback_metrics["val_bits_per_char"], prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)}

    @torch.no_grad()
    def write(self, beginning: str, letters: int, boldness: float = 0.6) -> str:
        """Go on from ``beginning``. ``boldness``: near 0 the likeliest letter each time, 1 as likely as it is."""
        self.eval()
        text, state = beginning, None
        codes = torch.tensor([[self.hparams.alphabet.index(letter) for letter in beginning]])
        for _ in range(letters):
            scores, state = self(codes, state)
            codes = torch.multinomial((scores[:, -1] / boldness).softmax(1), 1)
            text += self.hparams.alphabet[codes.item()]
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, default=0, help="Ray workers; 0: this process, without Ray")
    parser.add_argument("--max-epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 512 characters, per worker")
    parser.add_argument("--width", type=int, default=256, help="of the LSTM")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the sample of text")
    args = parser.parse_args()

    raylit.seed_everything(args.seed)
    data = HelpTexts(args.batch_size)
    model = CharLstm(data.alphabet, width=args.width)
    trainer = raylit.Trainer(num_workers=args.num_workers, max_epochs=args.max_epochs, gradient_clip_val=1.0,
                             seed=args.seed)  # fmt: skip
    result = trainer.fit(model, datamodule=data)
    print(f"bits per character: {result.metrics['val_bits_per_char']:.3f}  "
          f"perplexity: {result.metrics['val_perplexity']:.2f}")  # fmt: skip
    print("sample:\n" + model.write("The for statement ", 400))


if __name__ == "__main__":
    main()
