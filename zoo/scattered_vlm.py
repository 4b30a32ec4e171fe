"""Trains zoo/scattered-vlm, zoo/fashion-vlm tuned for images of 144 tokens: `torchrun --nproc-per-node 2 zoo/scattered_vlm.py`.

Most of an image is empty, so that most of its tokens can go; and a random share of the empty ones is masked in training, so that a number
is not told from the share of tokens that show items. A training chat asks once for each item, for its place or its kind, for a number and
a detail, and last for a description of the image; the loss is that of all answers. Each process computes the gradients of its own chats
on one thread. With --check and without torchrun it prints how many held-out answers the saved model gets right, seeing and shown the next
image.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import collages
import fashion
import fashion_vlm
import scattered
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

import aerogel
from aerogel.data import chats
from aerogel.io.processors import Pair

OUTPUT = Path(__file__).parent / "scattered-vlm"
IMAGES, BATCH, RATE = 28_000, 8, 1.2e-3
"""Images of the whole training, of one process in a step, and the highest rate."""


def taught(items: collages.Items, number: int, seed: int) -> list[scattered.Chat]:
    """Chats that ask once for each item, in any order, and for a description behind them, which no question can be answered from."""
    dice, drawn = random.Random(seed), []
    for _ in range(number):
        laid, image = scattered.scene(items, dice)
        once = scattered.asked(laid, dice)
        turns = [once["count"], once["detail"], *scattered.one_each(laid, dice)]
        dice.shuffle(turns)
        drawn.append(scattered.Chat("description", (image,), (*turns, scattered.described(laid))))
    return drawn


def fewer_empty_tokens(kwargs: dict[str, Any], model: torch.nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """Mask a random share of each image's empty tokens; all others keep their positions."""
    image_BS = kwargs["input_ids"] == model.config.image_token_id
    darkest = (scattered.NOISE / 255 - 0.5) / 0.5
    empty_T = kwargs["pixel_values"].reshape(int(image_BS.sum()), -1).amax(1) < darkest
    empty_BS = torch.zeros_like(image_BS)
    empty_BS[image_BS] = empty_T
    share_B1 = torch.rand(len(image_BS), 1, generator=generator)
    masked_BS = empty_BS & (torch.rand(image_BS.shape, generator=generator) < share_B1)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    position_ids_3BS, _ = model.model.get_rope_index(**{name: kwargs[name] for name in names})
    return {**kwargs, "position_ids": position_ids_3BS, "attention_mask": kwargs["attention_mask"] * ~masked_BS}


def read(chat: scattered.Chat) -> chats.Chat:
    """A chat as the product reads it."""
    return chats.Chat(chat.messages(), tuple(Image.fromarray(image) for image in chat.images))


def all_answers(ids_BS: Tensor, pair: Pair) -> Tensor:
    """Labels for every answer, its end among them."""
    opening = pair.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    ends = pair.tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels_BS = torch.full_like(ids_BS, chats.IGNORED)
    for row, ids in enumerate(ids_BS.tolist()):
        for at in range(len(opening), len(ids)):
            if ids[at - len(opening) : at] == opening:
                end = ids.index(ends, at) + 1
                labels_BS[row, at:end] = ids_BS[row, at:end]
    return labels_BS


def right(logits_BSV: Tensor, labels_BS: Tensor) -> float:
    """The share of answers of which every token is the likeliest one."""
    wanted_BS, likeliest_BS = labels_BS[:, 1:], logits_BSV[:, :-1].argmax(-1)
    answers, wrong = [], (wanted_BS != likeliest_BS) & (wanted_BS != chats.IGNORED)
    for row, asked in enumerate(wanted_BS != chats.IGNORED):
        edges = torch.diff(asked.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
        for first, end in zip((edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0], strict=True):
            answers.append(not wrong[row, first:end].any())
    return sum(answers) / len(answers)


def averaged(model: torch.nn.Module) -> None:
    """Replace the gradients of each process by their mean over processes; an expert that was given no token has none."""
    parameters = list(model.parameters())
    flat = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in parameters])
    dist.all_reduce(flat)
    for parameter, mean in zip(parameters, flat.div_(dist.get_world_size()).split([one.numel() for one in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)


def train(model: torch.nn.Module, pair: Pair, items: collages.Items, given: argparse.Namespace) -> None:
    """AdamW under one cosine with a warm-up."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    steps = given.images // (BATCH * processes)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.rate, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(given.seed * processes + rank)
    start, seen = time.monotonic(), []
    model.train()
    for step in range(steps):
        drawn = [read(chat) for chat in taught(items, BATCH, (given.seed * steps + step) * processes + rank)]
        (call,) = chats.calls(drawn, pair, BATCH, padded=True)
        kwargs = {**call.kwargs, "labels": all_answers(call.kwargs["input_ids"], pair)}
        answered = model(**fewer_empty_tokens(kwargs, model, generator), output_router_logits=True)
        optimizer.zero_grad(set_to_none=True)
        answered.loss.backward()
        averaged(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append((answered.loss.item(), right(answered.logits.detach(), kwargs["labels"])))
        if rank == 0 and (step % 50 == 49 or step == steps - 1):
            loss, share = (sum(column) / len(seen) for column in zip(*seen, strict=True))
            print(f"{step + 1}/{steps} loss {loss:.4f}, {share:.3f} of answers right, {time.monotonic() - start:.0f} s", flush=True)
            seen.clear()
        if rank == 0 and step % 250 == 249:
            fashion_vlm.save(model, pair, given.output)


@torch.no_grad()
def check(folder: Path, count: int, seed: int) -> None:
    """Print the share of held-out questions answered word for word, by kind, seeing and blind."""
    network = aerogel.load(folder, lazy=False)
    drawn = scattered.draw(collages.Items.held_out(), count, seed)
    others = [scattered.Chat(one.kind, other.images, one.turns) for one, other in zip(drawn, drawn[1:] + drawn[:1], strict=True)]
    for name, asked in (("seeing", drawn), ("blind", others)):
        fashion_vlm.print_shares(network, name, [chat.kind for chat in asked], [read(chat) for chat in asked])


def main() -> None:
    """Train and save, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--weights", type=Path, default=fashion_vlm.OUTPUT, help="Folder of the weights to begin with.")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=fashion.INSTALLED, help="Folder with the files of Fashion-MNIST.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--check", type=int, default=0, metavar="COUNT", help="Ask the saved model so many held-out questions instead.")
    given = parser.parse_args()
    if given.check:
        check(given.output, given.check, given.seed)
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    items = fashion_vlm.training_items(given.data)
    torch.manual_seed(given.seed)
    network = aerogel.load(given.weights, lazy=False)
    train(network.module.float(), network.processor, items, given)
    if dist.get_rank() == 0:
        fashion_vlm.save(network.module, network.processor, given.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
