"""Trains zoo/fashion-vlm, a mixture of experts that answers questions about collages: `python zoo/fashion_vlm.py`.

A Qwen3-VL-MoE of 7.6 M parameters (six layers of 16 experts, four a token) with a tokenizer of its own; with --check it prints how
many held-out answers the saved model gets right, and how many it gets right blind: shown the images of other questions.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import collages
import fashion
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import aerogel
from aerogel.data import chats
from aerogel.data.chats import Chat
from aerogel.io.processors import Pair
from aerogel.model.network import Network

OUTPUT = Path(__file__).parent / "fashion-vlm"
TURNS, BATCH, RATE = 150_000, 32, 2e-3
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def training_items(folder: Path) -> collages.Items:
    """The items of the training set, without their border."""
    images, labels = fashion.load("train", folder)
    shades = ((images[:, 0, 2:-2, 2:-2] + 1) * 127.5).round().to(torch.uint8)
    return collages.Items(shades.numpy(), labels.numpy())


def processor(items: collages.Items) -> Pair:
    """A tokenizer that knows the words of the questions and every byte, and an image processor for small images."""
    said = (f"{turn.question}\n{turn.answer}" for turn in collages.draw(items, 4000, 0))
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learned.train_from_iterator(said, trainers.BpeTrainer(vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL[1:]),
        chat_template=TEMPLATE, padding_side="left",
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 448 * 448}, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )  # fmt: skip
    return Pair(tokenizer, images, "<|image_pad|>")


def build(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLMoeForConditionalGeneration:
    """The network before training."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    text = {
        "vocab_size": 512, "hidden_size": 192, "intermediate_size": 384, "moe_intermediate_size": 96, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"], "bos_token_id": None, "router_aux_loss_coef": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": 7, "out_hidden_size": 192,
        "num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    named = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    named |= {f"vision_{end}_token_id": f"<|vision_{end}|>" for end in ("start", "end")}
    marks = {key: ids[name] for key, name in named.items()}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **marks)
    return Qwen3VLMoeForConditionalGeneration(config)


def chat(turn: collages.Turn) -> Chat:
    """A turn as the product reads it."""
    return Chat(turn.messages(), tuple(Image.fromarray(image).convert("RGB") for image in turn.images))


def train(model: Qwen3VLMoeForConditionalGeneration, pair: Pair, items: collages.Items, given: argparse.Namespace) -> None:
    """AdamW under one cosine with a warm-up; the loss is that of the answers, and the routers' own."""
    steps = given.turns // BATCH
    decaying = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decaying}, {"params": others, "weight_decay": 0.0}], weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.03)
    start = time.monotonic()
    model.train()
    for step in range(steps):
        turns = collages.draw(items, BATCH, given.seed + step)
        (call,) = chats.calls([chat(turn) for turn in turns], pair, BATCH)
        loss = model(**call.kwargs, output_router_logits=True).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{step}/{steps} loss {loss.item():.4f}, {time.monotonic() - start:.0f} s", flush=True)
        if step % 500 == 499:
            save(model, pair, given.output)


def save(model: Qwen3VLMoeForConditionalGeneration, pair: Pair, folder: Path) -> None:
    """Half precision on disk, single precision here."""
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=halves)
    pair.save_pretrained(folder)


@torch.no_grad()
def check(folder: Path, count: int, seed: int) -> None:
    """Print the share of held-out questions answered word for word, by kind, seeing and blind."""
    network = aerogel.load(folder, lazy=False)
    turns = collages.draw(collages.Items.held_out(), count, seed)
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, turn in enumerate(turns):
        by_shape[tuple(len(image) * 1000 + len(image[0]) for image in turn.images)].append(number)
    blind = list(turns)
    for numbers in by_shape.values():
        for number, other in zip(numbers, numbers[1:] + numbers[:1], strict=True):
            blind[number] = collages.Turn(turns[number].kind, turns[other].images, turns[number].question, turns[number].answer)
    for name, asked in (("seeing", turns), ("blind", blind)):
        print_shares(network, name, [turn.kind for turn in asked], [chat(turn) for turn in asked])


def print_shares(network: Network, name: str, kinds: Sequence[str], asked: Sequence[Chat]) -> None:
    """Print the share of chats answered word for word, by the kind of their questions."""
    said: list[str] = []
    for inputs in chats.prompts(asked, network.processor, BATCH):
        made = network.module.generate(**inputs, max_new_tokens=96, do_sample=False)
        said += network.processor.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right: dict[str, list[bool]] = defaultdict(list)
    for kind, one, answer in zip(kinds, asked, said, strict=True):
        right[kind].append(answer == one.answer)
    shares = ", ".join(f"{kind} {np.mean(found):.2f}" for kind, found in right.items())
    print(f"{name}: {np.mean([one for found in right.values() for one in found]):.3f} of {len(asked)} ({shares})", flush=True)


def main() -> None:
    """Train and save, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=fashion.INSTALLED, help="Folder with the files of Fashion-MNIST.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--check", type=int, default=0, metavar="COUNT", help="Ask the saved model so many held-out questions instead.")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.check:
        check(given.output, given.check, given.seed)
        return
    items = training_items(given.data)
    torch.manual_seed(given.seed)
    pair = processor(items)
    model = build(pair.tokenizer)
    train(model, pair, items, given)
    save(model, pair, given.output)


if __name__ == "__main__":
    main()
