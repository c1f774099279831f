"""Train the small language model that ``fedforward demo`` starts from.

A byte-level tokenizer and a Llama of under a million parameters learn the invented world of
``fedforward.demo.text``: they know its facts and answer in plain sentences, because most of the
text does. The result, in bfloat16, is committed; this script shows where it comes from.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from fedforward.demo.text import (  # noqa: E402
    EXAMPLE_QUESTION,
    PROMPT,
    pretraining_documents,
    site_examples,
)

DEFAULT = ROOT / "src/fedforward/demo/model"
PAD, BOS, EOS = 0, 1, 2
IGNORED = -100  # what the loss skips
BATCH = 48
PEAK_RATE = 4e-3
WARM_UP = 60


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: small, and able to read any text a user might type."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def new_model(vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels, padded on the right to the longest document of each batch."""
    split = PROMPT[PROMPT.index("### Answer") :]
    documents = pretraining_documents(seed, count * BATCH)
    for _ in range(count):
        rows = []
        for _ in range(BATCH):
            # Prompt and answer are encoded apart, as they are in tuning, so that no token ever
            # spans the border between them.
            question, border, answer = next(documents).partition(split)
            prompt_ids = tokenizer(question + border, add_special_tokens=False).input_ids
            answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
            rows.append(torch.tensor([*prompt_ids, *answer_ids, EOS]))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        yield ids, ids.masked_fill(ids == PAD, IGNORED)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> float:
    """AdamW with a linear warm-up and a cosine fall to zero; return the last steps' mean loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARM_UP))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [WARM_UP])
    model.train()
    losses: list[float] = []
    recent = 0.0
    started = time.perf_counter()
    for step, (ids, labels) in enumerate(batches(tokenizer, seed, steps), start=1):
        # Padding is on the right and attention is causal, so no mask is needed.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            seconds = time.perf_counter() - started
            print(f"step {step:5d}  loss {recent:.4f}  {seconds:.0f} s", flush=True)
    return recent


@torch.no_grad()
def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    prompt = tokenizer(
        PROMPT.format(question=question), add_special_tokens=False, return_tensors="pt"
    )
    out = model.generate(
        prompt.input_ids,
        attention_mask=prompt.attention_mask,
        do_sample=False,
        max_new_tokens=60,
    )
    return tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)


def share_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of facts, over sampled questions, that the greedy answers contain."""
    rows = site_examples(seed=1, per_site=25)
    right = total = 0
    for row in rows:
        given = answer(model, tokenizer, row["question"])
        for pair in row["answer"].split(" | "):
            total += 1
            right += pair.split(": ")[1] in given
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(list(pretraining_documents(arguments.seed, 4000)))
    model = new_model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")

    loss = train(model, tokenizer, arguments.steps, arguments.seed)
    model.to(torch.bfloat16).eval()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    # Every version of transformers knows the class by this name; only recent ones by the other.
    settings = arguments.out / "tokenizer_config.json"
    settings.write_text(
        settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    )

    print(f"final loss {loss:.4f}, facts right {share_right(model, tokenizer):.1%}")
    print(EXAMPLE_QUESTION)
    print(answer(model, tokenizer, EXAMPLE_QUESTION))


if __name__ == "__main__":
    main()
